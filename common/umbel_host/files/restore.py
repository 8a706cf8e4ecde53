"""Puts a backup back: unpacked beside its place, compared, and moved there by one rename."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from umbel_common.errors import StorageError
from umbel_host.files.backup import Manifest, unpack
from umbel_host.files.durable import all_or_nothing, create, make_folder, sync_folder
from umbel_host.processes.lifecycle import locked


@contextmanager
def config_of(backup: Path, manifest: Manifest, name: str, config: Path) -> Iterator[Path]:
    """Yields the configuration file that says where parts belong.

    It is the one that is there, or else that of the backup, as if it were there already.

    Args:
        name: name of the configuration's part.
        config: path at which the configuration is, or would be.

    Raises:
        StorageError: the backup has no configuration either, or the folder cannot be written.
    """
    if config.exists():
        yield config
        return
    with workplace(config.absolute().parent, f"{config.name}.restoring") as place:
        unpack(backup, manifest, place, only=name)
        draft = config.with_name(f".{place.name}.toml")
        try:
            (place / name).rename(draft)
            yield draft
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def vacant(state: Path, lock: str, what: str) -> Iterator[None]:
    """Keeps a state folder missing or empty while something is put in its place.

    Args:
        lock: name of the file that the folder's process locks.
        what: that process, for the error.

    Raises:
        StorageError: the folder has something in it, or the process is running.
    """
    if not state.exists():
        yield
        return
    # A folder that nobody ever locked gets no lock file here either.
    with locked(state / lock, what) if (state / lock).exists() else nullcontext():
        held = sorted(path.name for path in state.iterdir() if path.suffix != ".lock")
        if held:
            raise StorageError(
                "a backup is restored into an empty state folder only; nothing was changed",
                file=state,
                found=tuple(held[:5]),
                remedy="move the folder away, and keep it: it may have more than the backup has",
            )
        yield


def put_back(
    staged: Path, state: Path, files: Mapping[Path, Path]
) -> tuple[list[Path], list[Path]]:
    """Moves an unpacked state folder to its place, with the files beside it: all or nothing.

    Args:
        staged: the new state folder, on the same file system.
        state: missing, or empty but for lock files.
        files: place of each file -> the unpacked file. A file that is there already is kept, since
            it is no older than the backup.

    Returns:
        the files that were written, and those that were kept.

    Raises:
        StorageError: something cannot be written; nothing was changed.
    """
    written: list[Path] = []
    kept: list[Path] = []
    try:
        with all_or_nothing() as made:
            for target, source in files.items():
                if target.exists():
                    kept.append(target)
                    continue
                made += make_folder(target.parent, 0o700)
                create(target, source.read_bytes(), mode=0o600)
                made.append(target)
                written.append(target)
            if state.exists():
                for path in state.glob("*.lock"):
                    path.unlink()
            # A rename over an empty folder is one step, so the state is there whole or not at all.
            staged.rename(state)
            sync_folder(state.parent)
    except OSError as error:
        raise StorageError(
            "a backup cannot be put back; nothing was changed",
            file=error.filename or state,
            found=error.strerror,
        ) from None
    return written, kept


@contextmanager
def workplace(folder: Path, name: str) -> Iterator[Path]:
    """Makes a folder for the owner only, beside the place of its content, and removes it later.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    place = folder / f".{name}-{os.getpid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.mkdir(mode=0o700)
        yield place
    except OSError as error:
        raise StorageError(
            "a folder cannot be written", file=error.filename or place, found=error.strerror
        ) from None
    finally:
        with suppress(OSError):
            shutil.rmtree(place)
