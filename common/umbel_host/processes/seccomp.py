"""A seccomp filter that leaves a process, and all that it starts, Unix sockets only, for good.

A container of stock Kubernetes can install it where the kernel refuses it namespaces: the filter
takes no privilege, and the filter of the container runtime allows it. This module imports nothing
that starts a thread.
"""

import ctypes
import errno
import platform
import socket
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_TSYNC = 1
"""Flag that installs the filter for all threads of the process, or for none."""

# Offsets in struct seccomp_data, which a filter is given.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16

# Instructions of classic BPF: load a word, compare, return.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW = 0x7FFF0000
_ERROR = 0x00050000
_KILL_PROCESS = 0x80000000

_X32 = 0x40000000
"""First number of x86-64's other ABI, which has the same system calls under other numbers."""
_IO_URING_SETUP = 425
"""Number of the system call for rings, which open sockets without a call that a filter sees."""

# AUDIT_ARCH_*, and the numbers of seccomp, socket and socketpair.
_MACHINES = {
    "x86_64": (0xC000003E, 317, 41, 53),
    "aarch64": (0xC00000B7, 277, 198, 199),
}


def only_unix_sockets() -> int:
    """Forbids this process and its children all new sockets but Unix sockets, for good.

    Sockets that are open already stay open.

    Returns:
        0, or the error number; ENOSYS: there is no filter for this machine.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None or sys.maxsize < 2**32:
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return ctypes.get_errno()
    architecture, seccomp, open_one, open_pair = machine
    instructions = _filter(architecture, open_one, open_pair)
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(code))
    result = libc.syscall(
        ctypes.c_long(seccomp), _SET_MODE_FILTER, _TSYNC, ctypes.c_char_p(program)
    )
    # A result above 0 is the id of a thread that has another filter and so cannot take this one.
    return 0 if result == 0 else ctypes.get_errno() if result < 0 else errno.EBUSY


def _filter(architecture: int, open_one: int, open_pair: int) -> bytes:
    """The filter program, eight bytes for each instruction.

    Args:
        open_one: number of the system call `socket`.
        open_pair: number of `socketpair`. The first argument of both is the address family.
    """
    refuse = _ERROR | errno.EAFNOSUPPORT
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        # Another architecture's calls (int 0x80) have other numbers.
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        # The numbers of aarch64 end far below this, so both machines have one filter.
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_EQUAL, 0, 1, _IO_URING_SETUP),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        # For socket and socketpair the family is checked; anything else is allowed.
        (_EQUAL, 2, 0, open_one),
        (_EQUAL, 1, 0, open_pair),
        (_RETURN, 0, 0, _ALLOW),
        # The kernel reads the lower half of the register only, and so does this.
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 1, int(socket.AF_UNIX)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refuse),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
