"""Whether there is a place for what a command is going to write: asked before it begins to work."""

import errno
import os
from pathlib import Path

from umbel_common.errors import StorageError
from umbel_host.processes.lifecycle import reason


def require_new(path: Path) -> None:
    """Requires that a file or folder can be made, and that nothing of its name is there.

    Raises:
        StorageError: it is there already, or the system gives no place for it.
    """
    if os.path.lexists(path):
        raise StorageError(
            "a file or folder is in the way: nothing is ever overwritten",
            file=path,
            remedy="give another name, or move it away",
        )
    require_place(path)


def require_new_file(path: Path) -> None:
    """As `require_new`, for a file in a folder that must be there: no command makes it.

    Raises:
        StorageError: the folder is missing, or see `require_new`.
    """
    if not path.absolute().parent.is_dir():
        raise StorageError(
            "the folder of a new file does not exist",
            file=path,
            remedy="create it, or give another place",
        )
    require_new(path)


def require_place(path: Path) -> None:
    """Requires that a file or folder can be made, with the folders that lead to it.

    Raises:
        StorageError: the system gives no place for it.
    """
    try:
        folder, missing = path.absolute(), list[str]()
        while not os.path.lexists(folder):
            missing.append(folder.name)
            folder = folder.parent
        if missing:
            longest = max(len(os.fsencode(name)) for name in missing)
            if longest + len(_mark("")) > os.pathconf(folder, "PC_NAME_MAX"):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        # Nobody but the system knows: permissions, file systems and quotas say no in many ways.
        probe = folder / _mark("umbel")
        probe.mkdir(mode=0o700)
        probe.rmdir()
    except OSError as error:
        raise StorageError(
            "nothing can be written at this place",
            file=path,
            found=reason(error),
            remedy="give a place in a folder that this user can write to",
        ) from error


def _mark(name: str) -> str:
    """A name for what is not whole yet, as those who write folders have it."""
    return f".{name}.partial-{os.getpid()}"
