"""Small files that are whole and on disk when a call returns.

The law: no call returns before the file and its name are on disk, and no reader ever sees half a
file.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def create(path: Path, data: bytes | memoryview, mode: int = 0o666) -> None:
    """Writes a new file, never over another.

    Args:
        mode: largest permissions, from which the umask takes away.

    Raises:
        FileExistsError: the file exists.
        OSError: it cannot be written; nothing of it is left.
    """
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Puts `data` in the place of a file, or makes the file.

    Readers see the former content or the new one. The new file is closed to everybody to whom the
    former file was closed.

    Raises:
        OSError: it cannot be written; the former file stays.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        create(partial, data, _mode(path))
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return 0o666


@contextmanager
def all_or_nothing() -> Iterator[list[Path]]:
    """Runs a block that makes several files and folders, or leaves none of them.

    Yields:
        a list, to which the block adds each path that it made, in this order. If the block fails,
        they are removed again, a folder only if it is empty.
    """
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def make_folder(folder: Path, mode: int) -> list[Path]:
    """Makes a folder and the missing ones above it; returns what it made, outermost first.

    Args:
        mode: largest permissions, from which the umask takes away.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    for path in missing:
        path.mkdir(mode=mode)
    return missing


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
