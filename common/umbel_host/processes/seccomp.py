"""Seccomp filters: what a process with a secret, and all that it starts, can never ask the kernel.

A container of stock Kubernetes can install such a filter where the kernel refuses it namespaces: a
filter takes no privilege, and the filter of the container runtime allows it. This module imports
nothing that starts a thread.
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

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_MACHINES = tuple(_AUDIT_ARCH)
"""The machines that have a filter, in the order of the numbers below."""

CALLS = {
    # Needed here, or judged by their arguments.
    "seccomp": (317, 277),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "sendto": (44, 206),
    "clone": (56, 220),
    "ioctl": (16, 29),
    # Messages to named receivers: datagrams, and queues.
    "sendmmsg": (307, 269),
    "mq_open": (240, 180),
    # A queue can also be opened as a file of /dev/mqueue.
    "mq_timedsend": (242, 182),
    "mq_notify": (244, 184),
    # System V: small numbers, which can be guessed or read in /proc/sysvipc, name other programs'
    # queues and memory. They are used without having been opened.
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    # Other processes: their memory, their descriptors, what they share.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272),
    # Other namespaces, and other views of the files.
    "setns": (308, 268),
    "unshare": (272, 97),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # The kernel's own services: keys (which it may ask other programs for), programs, counters.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    # Another way to nearly every call, past any filter.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # Its arguments are in memory, where no filter looks. The C library then uses clone.
    "clone3": (435, 435),
}
"""Numbers of system calls, on each of the machines."""

_JUDGED = ("seccomp", "socket", "socketpair", "connect", "sendto", "clone", "ioctl")
_ABSENT = ("io_uring_setup", "io_uring_enter", "io_uring_register", "clone3")
"""Calls that a program does without where the kernel does not know them."""
REFUSED = tuple(name for name in CALLS if name not in _JUDGED + _ABSENT)

# Offsets in struct seccomp_data, which a filter is given. Both machines are little-endian.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

# Instructions of classic BPF: load a word, mask it, compare, return.
_LOAD, _MASK, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW = 0x7FFF0000
_ERROR = 0x00050000
_KILL_PROCESS = 0x80000000
_NOT_ALLOWED = _ERROR | errno.EPERM

_X32 = 0x40000000
"""First number of x86-64's other ABI, which has the same system calls under other numbers."""
_NEW_NAMESPACES = 0x7E020000
"""The flags of clone that make namespaces."""
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
"""They type into the terminal of the person who started this process, as if it were that person."""
_SOCKET_TYPE = 0xF
"""The part of socket's second argument that is the type; the rest is flags."""

_Instruction = tuple[int, int, int, int]


def only_unix_sockets() -> int:
    """Leaves this process and its children Unix sockets and itself, for good.

    The sockets are those with connections. Other sockets, other processes, namespaces, mounts and
    the kernel's own services are refused. Sockets that are open already stay open.

    Returns:
        0, or the error number; ENOSYS: there is no filter for this machine.
    """
    return _install(may_connect=True)


def only_accept() -> int:
    """As `only_unix_sockets`, and no call reaches another process' socket: this process and its
    children only accept."""
    return _install(may_connect=False)


def _install(*, may_connect: bool) -> int:
    machine = platform.machine()
    if machine not in _MACHINES or sys.maxsize < 2**32:
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return ctypes.get_errno()
    instructions = _filter(machine, may_connect)
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(code))
    seccomp = CALLS["seccomp"][_MACHINES.index(machine)]
    result = libc.syscall(
        ctypes.c_long(seccomp), _SET_MODE_FILTER, _TSYNC, ctypes.c_char_p(program)
    )
    # A result above 0 is the id of a thread that has another filter and so cannot take this one.
    return 0 if result == 0 else ctypes.get_errno() if result < 0 else errno.EBUSY


def _filter(machine: str, may_connect: bool) -> bytes:
    """The filter program, eight bytes for each instruction."""

    def on(call: str, *answer: _Instruction) -> list[_Instruction]:
        """Instructions that end the program if this call is made."""
        return [(_EQUAL, 0, len(answer), CALLS[call][_MACHINES.index(machine)]), *answer]

    refuse: _Instruction = (_RETURN, 0, 0, _NOT_ALLOWED)
    absent: _Instruction = (_RETURN, 0, 0, _ERROR | errno.ENOSYS)
    allow: _Instruction = (_RETURN, 0, 0, _ALLOW)
    # Only with an address, other than null, does sendto reach another socket than its peer.
    to_peer_only = (_half(4), (_EQUAL, 0, 3, 0), _half(4, upper=True), (_EQUAL, 0, 1, 0))
    connected = (
        _half(0),
        (_EQUAL, 1, 0, int(socket.AF_UNIX)),
        (_RETURN, 0, 0, _ERROR | errno.EAFNOSUPPORT),
        _half(1),
        (_MASK, 0, 0, _SOCKET_TYPE),
        # Both types send to their peer alone; a datagram goes to any name.
        (_EQUAL, 1, 0, int(socket.SOCK_STREAM)),
        (_EQUAL, 0, 1, int(socket.SOCK_SEQPACKET)),
        allow,
        refuse,
    )
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        # Another architecture's calls (int 0x80) have other numbers.
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        # The numbers of aarch64 end far below this, so both machines have one filter.
        (_AT_LEAST, 0, 1, _X32),
        absent,
        *on("socket", *connected),
        *on("socketpair", *connected),
        *on("sendto", *to_peer_only, allow, refuse),
        *on("clone", _half(0), (_ANY_BIT, 1, 0, _NEW_NAMESPACES), allow, refuse),
        *on("ioctl", _half(1), (_EQUAL, 2, 0, _TIOCSTI), (_EQUAL, 1, 0, _TIOCLINUX), allow, refuse),
    ]
    if not may_connect:
        program += on("connect", refuse)
    for call in REFUSED:
        program += on(call, refuse)
    for call in _ABSENT:
        program += on(call, absent)
    program.append(allow)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _half(argument: int, *, upper: bool = False) -> _Instruction:
    """Loads half of an argument; a number is in the lower half, and the kernel reads no more."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * argument + (4 if upper else 0))
