"""The filter that allows Unix sockets only, tried against the kernel of this machine."""

import json
import subprocess
import sys

ATTACK = """
import ctypes, errno, json, socket, sys, threading
from umbel_host.processes.seccomp import only_unix_sockets
def result(attempt):
    try:
        attempt()
        return "open"
    except OSError as error:
        return errno.errorcode[error.errno]
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*map(ctypes.c_long, arguments)) < 0:
        raise OSError(ctypes.get_errno(), "")
told, late = threading.Event(), []
other = threading.Thread(target=lambda: (told.wait(), late.append(result(socket.socket))))
other.start()
refused = only_unix_sockets() if sys.argv[1] == "filter" else 0
told.set()
other.join()
found = {"refused": refused, "thread": late[0],
    "unix": result(lambda: socket.socket(socket.AF_UNIX)),
    "pair": result(socket.socketpair)}
for name in ("AF_INET", "AF_INET6", "AF_NETLINK"):
    found[name] = result(lambda: socket.socket(getattr(socket, name), socket.SOCK_DGRAM))
numbers = {"x86_64": (41, 425), "aarch64": (198, 425)}[__import__("platform").machine()]
found["high bits"] = result(lambda: call(numbers[0], 0x100000000 | 2, 1, 0))
found["ring"] = result(lambda: call(numbers[1], 2, ctypes.addressof((ctypes.c_char * 128)())))
child = "import socket; socket.socket(socket.AF_INET)"
found["child"] = __import__("subprocess").run(
    [sys.executable, "-c", child], capture_output=True).returncode
print(json.dumps(found))
"""


def attacked(how: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", ATTACK, how], capture_output=True, text=True, check=True
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_without_the_filter_every_socket_opens() -> None:
    found = attacked("nothing")
    ring = found.pop("ring")
    assert found == dict.fromkeys(found, "open") | {"refused": 0, "child": 0}
    # A kernel, or a container around this test, may have switched rings off already.
    assert ring in {"open", "EINVAL", "EPERM", "ENOSYS"}


def test_with_it_only_unix_sockets_open_in_all_threads_and_children() -> None:
    refused = "EAFNOSUPPORT"
    assert attacked("filter") == {
        "refused": 0,
        "thread": refused,
        "unix": "open",
        "pair": "open",
        "AF_INET": refused,
        "AF_INET6": refused,
        "AF_NETLINK": refused,
        "high bits": refused,
        "ring": "ENOSYS",
        "child": 1,
    }
