"""A Landlock domain of this process' own, out of which it cannot look.

Landlock is the kernel's way for a process without privileges to restrict itself. This module
imports nothing that starts a thread.
"""

import ctypes
import errno
import os
import struct

_PR_SET_NO_NEW_PRIVS = 38
# The same numbers on every machine.
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_VERSION = 1
"""Flag that asks the kernel which version of Landlock it has."""
_WITH_TCP, _WITH_SCOPES = 4, 6
"""Versions from which on a domain can be about TCP, and about signals and abstract Unix sockets."""
_TCP = 0b11
_SIGNALS_AND_ABSTRACT_SOCKETS = 0b11


def only_own_processes() -> int:
    """Closes other programs' processes to this thread and to all that it starts, for good.

    A process in a domain of Landlock cannot trace a process outside of it, even of the same user:
    it reads neither its memory nor its descriptors, also through files in /proc, where no filter of
    system calls looks. It opens no TCP connection, and sends other programs no signal.

    Returns:
        0, or the error number; ENOSYS: the kernel has no Landlock, or one that knows files only
        (before Linux 6.7).
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        result = libc.syscall(ctypes.c_long(number), *arguments)
        return int(result)

    version = call(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < _WITH_TCP:
        return errno.ENOSYS
    rules = struct.pack("QQ", 0, _TCP)
    if version >= _WITH_SCOPES:
        rules += struct.pack("Q", _SIGNALS_AND_ABSTRACT_SOCKETS)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return ctypes.get_errno()
    ruleset = call(_CREATE_RULESET, ctypes.c_char_p(rules), ctypes.c_size_t(len(rules)), 0)
    if ruleset < 0:
        return ctypes.get_errno()
    refused = 0 if call(_RESTRICT_SELF, ruleset, 0) == 0 else ctypes.get_errno()
    os.close(ruleset)
    return refused
