"""A process that gives its network away, tried against the kernel of this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from umbel_client.isolation import Network, network

PROBE = """
import json, os, pathlib, socket, sys
from umbel_client.isolation import drop_network, network
here = socket.socket(socket.AF_UNIX); here.connect(sys.argv[1])
refused = drop_network()
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=2).close()
    loopback = "reached"
except OSError as error:
    loopback = type(error).__name__
pathlib.Path(sys.argv[3]).write_text("made")
again = socket.socket(socket.AF_UNIX); again.connect(sys.argv[1])
print(json.dumps([refused, network().value, loopback, os.stat(sys.argv[3]).st_uid == os.geteuid()]))
"""


def test_without_a_network_only_unix_sockets_and_files_are_left(tmp_path: Path) -> None:
    if network() is Network.NONE:
        pytest.skip("this machine has no network that could be taken away")
    import socket

    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as inet:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                PROBE,
                str(tmp_path / "s"),
                str(inet.getsockname()[1]),
                str(tmp_path / "file"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    refused, left, loopback, own = json.loads(done.stdout)
    if refused is not None:
        pytest.skip(f"this kernel gives no empty network namespace: {refused}")
    assert left == "none"
    assert loopback == "OSError"
    assert own


def test_taking_the_network_away_starts_no_thread_and_loads_no_numbers() -> None:
    script = (
        "import sys, threading, umbel_client.isolation;"
        "assert not {'numpy', 'torch', 'grpc'} & set(sys.modules), sorted(sys.modules);"
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
