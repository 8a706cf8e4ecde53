"""Taking the network, and every other way out, from a process that holds the data.

This module is part of the core of the privacy guarantee. Never call a process isolated without
asking the kernel, and never add a way back to the network.

Imports nothing that starts a thread: the kernel gives a new user namespace to a process of one
thread only, so this runs before NumPy and PyTorch are loaded.
"""

import ctypes
import errno
import os
import socket
from enum import Enum
from pathlib import Path

from umbel_host.processes.landlock import only_own_processes
from umbel_host.processes.lifecycle import hide_memory
from umbel_host.processes.seccomp import only_accept

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000

# Addresses that are reserved for documentation. Nothing is sent: only a route is looked up.
_NOWHERE = (
    (socket.AF_INET, ("192.0.2.1", 9)),
    (socket.AF_INET6, ("2001:db8::1", 9)),
)


class Network(Enum):
    """What a process can reach besides Unix sockets."""

    NONE = "none"
    """No route leads anywhere."""
    REACHABLE = "reachable"
    """The process could open a connection to another machine."""


def network() -> Network:
    """Asks the kernel for a route to another machine."""
    for family, address in _NOWHERE:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return Network.REACHABLE
        except OSError:
            continue
    return Network.NONE


def drop_network() -> str | None:
    """Takes every way out from this process and from all processes that it starts, for good.

    Two locks are on the network, and each alone is enough: an empty network namespace, and a filter
    of system calls. A container of stock Kubernetes gets no namespace, and has the filter.

    The filter also leaves nobody whom this process could have speak for it: it connects to no
    socket of another program, and opens no other process. It only accepts, on Unix sockets. Files
    in /proc, which no filter sees, are closed by Landlock where the kernel has it. Open sockets
    continue to work.

    Returns:
        None when the process has no way out now; else which one, and why the kernel left it.
    """
    try:
        refused = _empty_namespace()
    except OSError as error:
        return str(error)
    only_own_processes()
    unfiltered = only_accept()
    if network() is Network.REACHABLE:
        return os.strerror(refused) if refused else "the new network namespace is not empty"
    if unfiltered:
        return f"no filter closes the sockets of other programs: {os.strerror(unfiltered)}"
    return None


def confine_command() -> None:
    """Confines a command that opens data or reads a key, as the trainer's process is confined.

    Where the kernel refuses, a line on standard error says so.
    """
    refused = drop_network()
    hide_memory()
    if refused is not None:
        # Not before: its packages are not those that this module may import.
        from umbel_host.terminal import say

        say(f"warning: THIS COMMAND HAS A WAY OUT: {refused}", err=True)


def _empty_namespace() -> int:
    """Moves this process into a network namespace of its own; returns 0 or the error number.

    Raises:
        OSError: it is in one, but its user has no name there, and it could make no file.
    """
    refused = _unshare(_CLONE_NEWNET)
    if refused == errno.EPERM:
        # A kernel may give the namespace and then refuse the name (AppArmor on Ubuntu 24.04), and
        # there is no way back: a child tries both first.
        refused = _tried_by_a_child()
        if refused == 0:
            refused = _own_user_namespace()
    return refused


def _tried_by_a_child() -> int:
    child = os.fork()
    if child == 0:
        try:
            os._exit(_own_user_namespace())
        except OSError as error:
            os._exit(error.errno or errno.EPERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _own_user_namespace() -> int:
    user, group = os.geteuid(), os.getegid()
    refused = _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    if refused == 0:
        _keep_own_names(user, group)
    return refused


def _unshare(flags: int) -> int:
    """Returns 0 or the error number."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return errno.ENOSYS
    return 0 if libc.unshare(flags) == 0 else ctypes.get_errno()


def _keep_own_names(user: int, group: int) -> None:
    """Names this process's user in its new user namespace: without a name it could make no file."""
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
