"""What a container runtime does to a process in a pod under PodSecurity restricted, for tests."""

RUNTIME_FILTER = """
import ctypes, struct
_libc = ctypes.CDLL(None, use_errno=True)
_calls = {"x86_64": (272, 308), "aarch64": (97, 268)}[__import__("platform").machine()]
_program = b"".join(struct.pack("HBBI", *instruction) for instruction in (
    (0x20, 0, 0, 0),
    (0x15, 1, 0, _calls[0]),
    (0x15, 0, 1, _calls[1]),
    (0x06, 0, 0, 0x00050000 | 1),
    (0x06, 0, 0, 0x7FFF0000),
))
_code = ctypes.create_string_buffer(_program, len(_program))
assert _libc.prctl(38, 1, 0, 0, 0) == 0
assert _libc.prctl(22, 2, ctypes.c_char_p(
    struct.pack("HxxxxxxP", 5, ctypes.addressof(_code)))) == 0
"""
"""Python that refuses `unshare` and `setns` to its process with EPERM, as the default profiles of
containerd and CRI-O do to a process without CAP_SYS_ADMIN, and takes its way to privileges away."""
