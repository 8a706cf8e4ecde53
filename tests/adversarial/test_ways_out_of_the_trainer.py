"""The trainer only accepts: what code inside it could try to have somebody else speak for it.

The attacks run as the user of the trainer, which is that of its victim too, as under `umbel-client
run`. Each reaches its goal as long as nothing holds it.
"""

import json

import pytest
from support.other_user import run_unprivileged

ATTACKS = """
import ctypes, errno, json, os, socket, struct, subprocess, sys, tempfile
from umbel_client.trainer import isolation
from umbel_host.processes.seccomp import CALLS, REFUSED

locks, hidden = sys.argv[1].split("+"), sys.argv[2] == "hidden"
machine = ("x86_64", "aarch64").index(os.uname().machine)
libc = ctypes.CDLL(None, use_errno=True)

# Somebody else's services, and somebody else's process of the same user: the relay.
folder = tempfile.mkdtemp()
def service(address, kind=socket.SOCK_STREAM):
    server = socket.socket(socket.AF_UNIX, kind)
    server.bind(address)
    if kind == socket.SOCK_STREAM:
        server.listen()
    return server
services = [service(folder + "/stream"), service(folder + "/datagram", socket.SOCK_DGRAM),
            service("\\0umbel-" + folder)]
libc.shmat.restype = ctypes.c_void_p
source = "import ctypes, sys\\n"
if hidden:
    source += "from umbel_host.processes.lifecycle import hide_memory; hide_memory()\\n"
# Where Yama would keep all but its parents out, it lets everybody in.
source += "ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)\\n"
source += "libc = ctypes.CDLL(None); ours = libc.msgget(0, 0o1600), libc.shmget(0, 4096, 0o1600)\\n"
source += "print(id(sys), *ours, flush=True); sys.stdin.read()\\n"
source += "libc.msgctl(ours[0], 0, 0); libc.shmctl(ours[1], 0, 0)"
relay = subprocess.Popen(
    [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
address, queue, memory = map(int, relay.stdout.readline().split())

isolation._empty_namespace = lambda: errno.EPERM  # as in a container of stock Kubernetes
if "filter" not in locks:
    isolation.only_accept = lambda: errno.ENOSYS
if "landlock" not in locks:
    isolation.only_own_processes = lambda: errno.ENOSYS
isolation.drop_network()

def call(name, *arguments):
    given = [one if isinstance(one, ctypes.c_char_p) else ctypes.c_long(one) for one in arguments]
    result = libc.syscall(ctypes.c_long(CALLS[name][machine]), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result
def stream(address):
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(address)
        end.send(b"a record")
def datagram():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.sendto(b"a record", folder + "/datagram")
def pair():
    for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
        end.sendto(b"a record", folder + "/datagram")
def raw():
    with socket.socket(socket.AF_UNIX, socket.SOCK_RAW) as end:
        end.sendto(b"a record", folder + "/datagram")
def descriptor():
    os.close(call("pidfd_getfd", call("pidfd_open", relay.pid, 0), 1, 0))
def queued():
    if libc.msgsnd(queue, struct.pack("l8s", 1, b"a record"), 8, 0):
        raise OSError(ctypes.get_errno(), "msgsnd")
def shared():
    if libc.shmat(memory, None, 0) == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "shmat")
def trace():
    call("ptrace", 0x4206, relay.pid, 0, 0)
def read_memory():
    buffer = ctypes.create_string_buffer(8)
    here, there = struct.pack("QQ", ctypes.addressof(buffer), 8), struct.pack("QQ", address, 8)
    call("process_vm_readv", relay.pid, ctypes.c_char_p(here), 1, ctypes.c_char_p(there), 1, 0)
def memory_file():
    open(f"/proc/{relay.pid}/mem", "r+b", buffering=0).close()
def descriptor_file():
    os.close(os.open(f"/proc/{relay.pid}/fd/1", os.O_WRONLY))
words = [ctypes.c_char_p(one) for one in (b"user", b"umbel", b"")]
def key():
    call("add_key", words[0], words[1], words[1], 1, -1)
def upcall():
    try:
        call("request_key", words[0], words[1], words[2], 0)
    except OSError as error:
        if error.errno != errno.ENOKEY:
            raise

attacks = {
    "a service's socket": lambda: stream(folder + "/stream"),
    "a service's abstract socket": lambda: stream("\\0umbel-" + folder),
    "a datagram": datagram, "a datagram from a pair": pair, "a datagram from a raw socket": raw,
    "a queue of another program": queued, "memory of another program": shared,
    "a descriptor of the relay": descriptor, "tracing the relay": trace,
    "memory of the relay": read_memory, "its memory as a file": memory_file,
    "its descriptor as a file": descriptor_file,
    "a key for the kernel": key, "the kernel asks for a key": upcall,
}
found = {}
for name, attack in attacks.items():
    try:
        attack()
        found[name] = "reached"
    except OSError as error:
        found[name] = "refused"
# Last, because some of these would change this process.
calls = {}
if "filter" in locks:
    for name in REFUSED:
        try:
            calls[name] = call(name, 0, 0, 0, 0, 0, 0)
        except OSError as error:
            calls[name] = errno.errorcode[error.errno]
relay.stdin.close()
relay.wait()
print(json.dumps([found, calls]))
"""
BY_FILES = {"its memory as a file", "its descriptor as a file"}
OF_THE_RELAY = BY_FILES | {"a descriptor of the relay", "tracing the relay", "memory of the relay"}


def reached(locks: str, victim: str = "plain") -> tuple[set[str], dict[str, str]]:
    found, calls = json.loads(run_unprivileged(ATTACKS, locks, victim).stdout)
    assert len(found) == 14
    return {name for name, what in found.items() if what == "reached"}, calls


def test_without_the_locks_every_attack_reaches_its_goal() -> None:
    found, _ = reached("nothing")
    assert len(found) == 14, found


def test_the_filter_alone_leaves_what_is_reached_through_files() -> None:
    found, calls = reached("filter")
    assert found == BY_FILES
    assert set(calls.values()) == {"EPERM"}


def test_a_relay_that_hides_its_memory_is_closed_to_its_own_user() -> None:
    found, _ = reached("nothing", "hidden")
    assert not found & OF_THE_RELAY
    assert not reached("filter", "hidden")[0]


def test_with_landlock_no_process_of_the_same_user_is_reached() -> None:
    found, _ = reached("landlock")
    if found & OF_THE_RELAY:
        pytest.skip("this kernel has no Landlock that knows TCP (Linux 6.7)")
    assert not reached("filter+landlock")[0]
