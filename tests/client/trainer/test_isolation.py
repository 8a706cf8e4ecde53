"""A process that gives its network away, tried against the kernel of this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.container_filter import RUNTIME_FILTER
from support.other_user import run_unprivileged

from umbel_client.trainer.isolation import Network, network

PROBE = """
import json, os, pathlib, socket, sys
from umbel_client.trainer.isolation import drop_network, network
exec(sys.argv[4])
here = socket.socket(socket.AF_UNIX); here.connect(sys.argv[1])
namespace = os.readlink("/proc/self/ns/net")
refused = drop_network()
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=2).close()
    loopback = "reached"
except OSError as error:
    loopback = type(error).__name__
pathlib.Path(sys.argv[3]).write_text("made")
here.send(b"still open")
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
    other = "reached"
except OSError as error:
    other = type(error).__name__
moved = namespace != os.readlink("/proc/self/ns/net")
own = os.stat(sys.argv[3]).st_uid == os.geteuid()
print(json.dumps([refused, network().value, loopback, other, own, moved]))
"""
NO_FILTER = """
import umbel_client.trainer.isolation as i
i.only_accept = i.only_own_processes = lambda: 38
"""


def tried(folder: Path, *, before: str = "") -> tuple[str | None, str, str, str, bool, bool]:
    """What `drop_network` said, what is left, the loopback, another program's socket, own files,
    another namespace."""
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as inet:
        unix.bind(str(folder / "s"))
        unix.listen()
        port = str(inet.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(folder / "s"), port, str(folder / "file"), before],
            capture_output=True,
            text=True,
            check=True,
        )
    refused, left, loopback, other, own, moved = json.loads(done.stdout)
    return refused, left, loopback, other, own, moved


@pytest.fixture(autouse=True)
def _a_network_to_take_away() -> None:
    if network() is Network.NONE:
        pytest.skip("this machine has no network that could be taken away")


def test_without_a_network_only_what_is_open_and_files_are_left(tmp_path: Path) -> None:
    refused, left, loopback, other, own, _ = tried(tmp_path)
    assert (refused, left, loopback, other, own) == (
        None,
        "none",
        "OSError",
        "PermissionError",
        True,
    )


def test_an_empty_namespace_alone_is_enough_for_the_network(tmp_path: Path) -> None:
    refused, left, loopback, other, own, moved = tried(tmp_path, before=NO_FILTER)
    if not moved:
        pytest.skip(f"this kernel gives no empty network namespace: {refused}")
    assert refused == f"no filter closes the sockets of other programs: {os.strerror(38)}"
    # The host's own services are files, which no namespace of networks hides.
    assert (left, loopback, other, own, moved) == ("none", "OSError", "reached", True, True)


def test_in_a_container_without_namespaces_the_filter_is_enough(tmp_path: Path) -> None:
    refused, left, loopback, other, own, moved = tried(tmp_path, before=RUNTIME_FILTER)
    assert (refused, left, loopback, own, moved) == (None, "none", "OSError", True, False)
    assert other == "PermissionError"


def test_in_a_container_without_namespaces_and_without_the_filter_there_is_a_network(
    tmp_path: Path,
) -> None:
    refused, left, loopback, _, _, moved = tried(tmp_path, before=f"{RUNTIME_FILTER}\n{NO_FILTER}")
    assert (left, loopback, moved) == ("reachable", "reached", False)
    assert refused == os.strerror(1)


def test_where_the_kernel_refuses_a_user_its_name_the_filter_is_enough_and_files_stay_own() -> None:
    """As AppArmor does on Ubuntu 24.04: a process in such a namespace could make no file."""
    script = (
        "import os, tempfile, umbel_client.trainer.isolation as i\n"
        "def refuse(user, group): raise PermissionError(1, 'no name')\n"
        "i._keep_own_names = refuse\n"
        "refused = i.drop_network()\n"
        "with tempfile.NamedTemporaryFile() as file:\n"
        "    print(refused, i.network().value, os.stat(file.name).st_uid == os.geteuid())"
    )
    assert run_unprivileged(script).stdout.split() == ["None", "none", "True"]


def test_taking_the_network_away_starts_no_thread_and_loads_no_numbers() -> None:
    script = (
        "import sys, threading, umbel_client.trainer.isolation;"
        "assert not {'numpy', 'torch', 'grpc'} & set(sys.modules), sorted(sys.modules);"
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
