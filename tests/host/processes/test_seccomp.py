"""The filters, tried against the kernel of this machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from umbel_host.processes.seccomp import CALLS

ATTACK = """
import ctypes, errno, json, os, socket, sys, threading
from umbel_host.processes.seccomp import only_accept, only_unix_sockets
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
numbers = {"x86_64": (41, 425, 56, 16, 435), "aarch64": (198, 425, 220, 29, 435)}[
    os.uname().machine]
def namespace():
    # CLONE_NEWUSER, and the signal of a fork
    if libc.syscall(ctypes.c_long(numbers[2]), ctypes.c_long(0x10000011), 0, 0, 0, 0) == 0:
        os._exit(0)
    if ctypes.get_errno():
        raise OSError(ctypes.get_errno(), "")
told, late = threading.Event(), []
other = threading.Thread(target=lambda: (told.wait(), late.append(result(socket.socket))))
other.start()
service = socket.socket(socket.AF_UNIX)
service.bind("\\0umbel-" + str(os.getpid()))
service.listen()
install = {"filter": only_unix_sockets, "accept": only_accept, "nothing": lambda: 0}[sys.argv[1]]
refused = install()
told.set()
other.join()
found = {"refused": refused, "thread": late[0],
    "unix": result(lambda: socket.socket(socket.AF_UNIX)),
    "pair": result(socket.socketpair),
    "connect": result(lambda: socket.socket(socket.AF_UNIX).connect(service.getsockname())),
    "packets": result(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)),
    "datagrams": result(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)),
    "namespace": result(namespace),
    "typing": result(lambda: call(numbers[3], 0, 0x5412, 0))}
for name in ("AF_INET", "AF_INET6", "AF_NETLINK"):
    found[name] = result(lambda: socket.socket(getattr(socket, name), socket.SOCK_DGRAM))
found["high bits"] = result(lambda: call(numbers[0], 0x100000000 | 2, 1, 0))
found["new clone"] = result(lambda: call(numbers[4], 0, 0))
found["ring"] = result(lambda: call(numbers[1], 2, ctypes.addressof((ctypes.c_char * 128)())))
child = "import socket; socket.socket(socket.AF_INET)"
found["child"] = __import__("subprocess").run(
    [sys.executable, "-c", child], capture_output=True).returncode
print(json.dumps(found))
"""


def attacked(how: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", ATTACK, how],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_without_the_filter_every_socket_opens() -> None:
    found = attacked("nothing")
    own = {name: found.pop(name) for name in ("ring", "namespace", "typing", "new clone")}
    assert found == dict.fromkeys(found, "open") | {"refused": 0, "child": 0}
    # A kernel, or a container around this test, may have switched rings and namespaces off already.
    assert own["ring"] in {"open", "EINVAL", "EPERM", "ENOSYS"}
    # These reach the kernel, which finds no terminal and no arguments.
    assert (own["typing"], own["new clone"]) == ("ENOTTY", "EINVAL")


@pytest.mark.parametrize(("how", "connect"), [("filter", "open"), ("accept", "EPERM")])
def test_with_it_only_connections_of_unix_sockets_are_left(how: str, connect: str) -> None:
    refused = "EAFNOSUPPORT"
    assert attacked(how) == {
        "refused": 0,
        "thread": refused,
        "unix": "open",
        "pair": "open",
        "packets": "open",
        "connect": connect,
        "datagrams": "EPERM",
        "AF_INET": refused,
        "AF_INET6": refused,
        "AF_NETLINK": refused,
        "high bits": refused,
        "namespace": "EPERM",
        "typing": "EPERM",
        "new clone": "ENOSYS",
        "ring": "ENOSYS",
        "child": 1,
    }


@pytest.mark.parametrize(
    ("number", "header"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        (1, "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_numbers_are_the_kernels_own(number: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip("the kernel's headers are not installed")
    found = dict(
        re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", Path(header).read_text(), re.M)
    )
    assert {name: str(numbers[number]) for name, numbers in CALLS.items()} == {
        name: found[name] for name in CALLS
    }
