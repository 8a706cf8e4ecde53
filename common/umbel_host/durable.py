"""Small files that are on disk, whole, when a call returns."""

import os
from pathlib import Path


def create(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes a new file, never over another.

    Args:
        mode: permissions at most; the umask takes away from them.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be written.
    """
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Puts `data` in the place of a file, or makes it: readers see the one or the other.

    Raises:
        OSError: it cannot be written; the former file stays.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        create(partial, data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names in `folder` as durable as the files behind them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
