"""The life of a process: one of a kind, in a folder of its own, ended by a signal."""

import ctypes
import errno
import fcntl
import os
import pwd
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from umbel_common.errors import StorageError, UmbelError

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
"""Options of mallopt, from glibc's malloc.h."""
_PR_SET_DUMPABLE = 4


def hide_memory() -> None:
    """Keeps this process' memory to itself: a key or records may come into it.

    A crash writes no core file, and no process of the same user can read the memory or take a
    descriptor; only root can. It must come after `drop_network`, which needs files in /proc/self.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def give_memory_back() -> None:
    """Lets this process return memory to the kernel; to be called before it has threads.

    With the defaults, each thread of a process that carries large messages would keep what it once
    needed for one of them.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 18)


def this_user() -> str:
    """Name of the user that this process runs as."""
    return user_name(os.geteuid())


def user_name(user: int) -> str:
    """Name of a user, or the number where this machine has no name for it, as in a container."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def reason(error: OSError) -> str:
    """Why a file cannot be used, as text for an error; with the user if permissions forbid it."""
    text = error.strerror or str(error)
    return f"{text}, for user {this_user()}" if isinstance(error, PermissionError) else text


def refused(error: OSError) -> StorageError:
    """The error that the system refused something, where the code did not expect it."""
    what = "a file cannot be used" if error.filename is not None else "the system refused a step"
    advice = None
    if isinstance(error, PermissionError):
        what, advice = (
            "a file or folder is closed to the user that gave this command",
            _whose(error),
        )
    elif error.errno == errno.ENAMETOOLONG:
        advice = "give a shorter path: a name in it has at most 255 bytes"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, advice = "there is no space left", "make room on the disk, then repeat the command"
    elif error.filename is None and isinstance(error, FileNotFoundError):
        what, advice = "the folder that this command runs in is gone", "cd to one that is there"
    return StorageError(what, file=error.filename, found=reason(error), remedy=advice)


def explained(error: UmbelError) -> UmbelError:
    """An error of ours; if the system gave the reason for it, with this user and the owner."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError) and error.found is cause:
        error.found = reason(cause)
    if isinstance(cause, PermissionError):
        error.found = reason(cause)
        error.remedy = "; or ".join(filter(None, (_whose(cause), error.remedy)))
    return error


def _whose(error: PermissionError) -> str:
    owner = None if error.filename is None else _owner(Path(os.fsdecode(error.filename)))
    if owner is None or owner == os.geteuid():
        return "run this as the user that the file belongs to, or change its permissions"
    if owner == 0:
        return "it belongs to root: change its permissions, or choose another place"
    return f"run this as {user_name(owner)}, who owns it: sudo -u {user_name(owner)} ..."


def _owner(path: Path) -> int | None:
    """Who owns a file, or the innermost folder around it that this user can look at."""
    for one in (path.absolute(), *path.absolute().parents):
        try:
            return one.stat().st_uid
        except OSError:
            continue
    return None


def require_state(folder: Path) -> None:
    """Makes the folder for a process' state, or checks that it can be used.

    Raises:
        StorageError: it cannot be made or written to; another user could change what is in it; or
            this process is root and the folder is another user's, who could not write root's files
            any more.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise StorageError(
            "the state folder cannot be used",
            file=folder,
            found=reason(error),
            remedy="give it to the user that this process runs as, or run it as its owner",
        ) from None
    if os.geteuid() == 0 != owner:
        raise StorageError(
            "the state folder belongs to another user, who could not use what root writes there",
            file=folder,
            found=f"user {this_user()}",
            accepted=f"the folder's owner, user {user_name(owner)}",
        )
    require_own(folder)


def require_own(path: Path) -> None:
    """Refuses a file or folder that another user put there, or may change.

    A folder may be shared with a process of another user, as the operator's state is under systemd.
    What that process leaves there under one of our names must not be used.

    Raises:
        StorageError: it, or a link in its place, belongs to another user than this one, root, and
            the owner of the folder that it is in, who could replace it anyway; or users besides
            this one and its own group may write to it. A folder that is sticky, or not this user's
            to close, may be open to others: each file in it is checked.
    """
    try:
        found = os.lstat(path)
        owners = {found.st_uid}
        if stat.S_ISLNK(found.st_mode):
            found = os.stat(path)
            owners.add(found.st_uid)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError("a file cannot be used", file=path, found=reason(error)) from None
    strangers = owners - {os.geteuid(), 0, os.stat(path.parent).st_uid}
    others = stat.S_IWOTH | (0 if found.st_gid == os.getegid() else stat.S_IWGRP)
    shared = stat.S_ISDIR(found.st_mode) and (
        found.st_mode & stat.S_ISVTX or found.st_uid != os.geteuid()
    )
    if strangers:
        held = f"owner {', '.join(map(user_name, sorted(strangers)))}"
    elif found.st_mode & others and not shared:
        held = f"mode {stat.S_IMODE(found.st_mode):04o}, group {found.st_gid}"
    else:
        return
    raise StorageError(
        "another user of this machine may have put something here, or may change it",
        file=path,
        found=held,
        accepted=f"owner {this_user()}, and writable for nobody else",
        remedy="find out who did that; then chown and chmod it if it is yours, or move it away",
    )


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds a lock on a file; the lock ends with the process, however that ends.

    Args:
        what: the process, for the error.

    Raises:
        StorageError: another process holds it, or the file cannot be opened.
    """
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        require_own(path)
        lock = open(path, "ab", opener=_private)  # noqa: SIM115  # closed below
    except OSError as error:
        raise StorageError("a lock cannot be opened", file=path, found=reason(error)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"{what} is already running",
                file=path,
                remedy="stop the other process first: two of them would not know of each other's"
                " work",
            ) from None
        yield


def stop_on_signals() -> threading.Event:
    """Handles SIGTERM and SIGINT from now on; returns an event that the first of them sets.

    Only the main thread can call this.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def wait_for(event: threading.Event) -> None:
    """Waits for an event, and lets Python run its signal handlers meanwhile."""
    while not event.wait(1.0):
        pass


def _private(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, 0o600)
