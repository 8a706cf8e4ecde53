"""Sockets of a process and of all that it starts: only Unix sockets, for good, by a seccomp filter.

What a container of stock Kubernetes may do, where the kernel refuses it namespaces: it takes no
privilege, and the filter that a container runtime installs leaves it allowed. Imports nothing that
starts a thread.
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
"""For all threads of the process, or none."""

# Offsets in what a filter is given (struct seccomp_data).
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16

# Of classic BPF: load a word, compare, return.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW = 0x7FFF0000
_ERROR = 0x00050000
_KILL_PROCESS = 0x80000000

_X32 = 0x40000000
"""System calls of another ABI of x86-64 begin here: the same calls under other numbers."""
_IO_URING_SETUP = 425
"""Rings open sockets with no system call that a filter sees."""

# AUDIT_ARCH_*, and the numbers of seccomp, socket and socketpair.
_MACHINES = {
    "x86_64": (0xC000003E, 317, 41, 53),
    "aarch64": (0xC00000B7, 277, 198, 199),
}


def only_unix_sockets() -> int:
    """From now on, this process and its children can make no socket but Unix sockets.

    Nothing takes it back. Sockets that are open already stay open.

    Returns:
        0, or the error number: ENOSYS on a machine for which there is no filter here.
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
    # Above 0: a thread that has another filter, and so goes its own way.
    return 0 if result == 0 else ctypes.get_errno() if result < 0 else errno.EBUSY


def _filter(architecture: int, open_one: int, open_pair: int) -> bytes:
    """The program: eight bytes an instruction.

    Args:
        open_one: number of the system call `socket`.
        open_pair: number of `socketpair`; of both the first argument is the family of addresses.
    """
    refuse = _ERROR | errno.EAFNOSUPPORT
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        # Another architecture's calls (int 0x80) have other numbers.
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        # Numbers of aarch64 end far below; so both have one filter.
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_EQUAL, 0, 1, _IO_URING_SETUP),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        # socket or socketpair: on to the family; anything else: allowed.
        (_EQUAL, 2, 0, open_one),
        (_EQUAL, 1, 0, open_pair),
        (_RETURN, 0, 0, _ALLOW),
        # The kernel takes the lower half of the register alone, and so does this.
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 1, int(socket.AF_UNIX)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refuse),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
