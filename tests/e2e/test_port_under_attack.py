"""The real port while strangers and a hostile site attack it: other sites are served."""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from e2e import attackers
from e2e.daemons import Clinics
from e2e.test_refused_from_outside import activate, fleet
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from support.waiting import HANGING

MEBIBYTE = 1 << 20
LONGEST_ANSWER = 3.0
"""Seconds that an answer may take. Without the limit of records at once, crumbs make it ten."""
MOST_GROWTH = 400
"""MiB by which the port may grow under any of these attacks, together."""

ATTACKS = [
    ("silent", 10_000),
    ("hello", 1_000),
    ("chunked", 16),
    ("stalled", 64),
    ("unsigned", 64),
    ("large", 64),
    ("nested", 64),
    ("crumbs", 12),
]


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Clinics]:
    made = Clinics(tmp_path_factory.mktemp("attacked"), tiny_model)
    made.port_process.start()
    deadline = time.monotonic() + HANGING
    while True:
        try:
            socket.create_connection(("127.0.0.1", made.port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline, made.logs()
            time.sleep(0.1)
    yield made
    made.close()


def memory(pid: int, name: str = "VmRSS") -> float:
    """In MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def served(clinics: Clinics, seconds: float) -> tuple[list[float], list[float], int]:
    """How long north waits for an answer to a heartbeat over the connection that it keeps, how long
    over a new one, and how many tries failed."""
    north = clinics.sites["north"]
    folder = north.folder / "relay"
    kept, new, failed = [], [], 0
    with fleet(clinics, folder, north.relay_key) as client:
        deadline = time.monotonic() + HANGING
        while True:
            try:
                node = activate(client, north.relay_key)
                break
            except httpx.TransportError:
                failed += 1
                assert time.monotonic() < deadline, clinics.logs()
        beat = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30.0)
        until = time.monotonic() + seconds
        while time.monotonic() < until or not new:
            began = time.monotonic()
            client.SendNodeHeartbeat(beat)
            kept.append(time.monotonic() - began)
            began = time.monotonic()
            try:
                with fleet(clinics, folder, north.relay_key) as other:
                    other.SendNodeHeartbeat(beat)
                new.append(time.monotonic() - began)
            except httpx.TransportError:
                failed += 1
                assert time.monotonic() < deadline, clinics.logs()
            time.sleep(0.1)
    return kept, new, failed


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "count"), ATTACKS)
def test_a_site_is_served_while_the_port_is_attacked(
    clinics: Clinics, kind: str, count: int
) -> None:
    pid = clinics.port_process.pid
    quiet, _, _ = served(clinics, 2.0)
    before = memory(pid)
    folder = clinics.sites["east"].folder / "relay"
    attacker = subprocess.Popen(
        [sys.executable, attackers.__file__, kind, str(clinics.port), str(folder), str(count)],
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(3.0)
        kept, new, failed = served(clinics, 8.0)
        most = memory(pid)
        files = len(os.listdir(f"/proc/{pid}/fd"))
        assert attacker.poll() is None
    finally:
        attacker.kill()
        attacker.wait()
    print(
        f"\n{kind} x {count}: a heartbeat takes {statistics.median(kept):.3f} s"
        f" (at most {max(kept):.3f}; before {statistics.median(quiet):.3f}), over a new connection"
        f" {statistics.median(new):.3f} s (at most {max(new):.3f}), {failed} of"
        f" {len(new) + failed} new connections failed; {files} files, the port grew by"
        f" {most - before:.0f} MiB"
    )
    assert failed <= len(new)
    assert statistics.median(kept) < LONGEST_ANSWER
    assert most - before < MOST_GROWTH
