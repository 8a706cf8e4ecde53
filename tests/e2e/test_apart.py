"""The operator's two processes as containers have them: each with a state folder of its own, and
one socket between them. And what probes are told of all four kinds of process."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.daemons import Clinics, Daemon
from support.waiting import HANGING

from umbel_common.errors import UnreachableError
from umbel_host.transport.sockets import is_healthy
from umbel_server.storage.job_queue import JobState


@pytest.fixture
def clinics(tmp_path: Path, tiny_model: Path) -> Iterator[Clinics]:
    made = Clinics(tmp_path, tiny_model)
    rounds_toml = made.operator_folder / "server.toml"
    text = rounds_toml.read_text()
    rounds_toml.write_text(f'socket = "run/carrier.sock"\n{text}')
    port_toml = made.operator_folder / "port.toml"
    port_toml.write_text(
        f'state = "port"\nsocket = "run/carrier.sock"\nidentity = "/nowhere"\n'
        f'roster = "/nowhere"\n{text}'
    )
    made.port_process = Daemon(made.operator_folder, "umbel_server.port_process", str(port_toml))
    yield made
    made.close()


def soon(path: Path) -> bool:
    """Whether the process behind a socket is well within a minute."""
    deadline = time.monotonic() + HANGING
    while time.monotonic() < deadline:
        try:
            if is_healthy(path, HANGING):
                return True
        except UnreachableError:
            pass
        time.sleep(0.2)
    return False


@pytest.mark.soak
def test_two_state_folders_and_one_socket_make_a_job(clinics: Clinics) -> None:
    clinics.start_all()
    operator, north = clinics.operator_folder, clinics.sites["north"]
    for socket in (
        operator / "run" / "carrier.sock",
        operator / "state" / "rounds.sock",
        north.socket,
        north.socket.with_name("relay.sock"),
    ):
        assert soon(socket), (socket, clinics.logs())
    job = clinics.add(training=clinics.plan().training)
    assert clinics.wait(job, JobState.FINISHED).state is JobState.FINISHED
    assert {path.name for path in (operator / "port").iterdir()} >= {"superlink.sqlite"}
    assert not (operator / "state" / "superlink.sqlite").exists()
    assert not (operator / "state" / "carrier.sock").exists()


def test_a_relay_whose_server_is_away_is_not_well(clinics: Clinics) -> None:
    north = clinics.sites["north"]
    north.relay.start()
    probe = north.socket.with_name("relay.sock")
    deadline = time.monotonic() + HANGING
    while not probe.exists():
        assert time.monotonic() < deadline, clinics.logs()
        time.sleep(0.1)
    time.sleep(1)
    assert not is_healthy(probe, HANGING)


def test_jobs_that_end_leave_no_socket_behind(clinics: Clinics) -> None:
    clinics.rounds_process.start()
    assert soon(clinics.operator_folder / "state" / "rounds.sock"), clinics.logs()
    assert clinics.rounds_process.stop() == 0
    assert not (clinics.operator_folder / "state" / "rounds.sock").exists()


def test_the_process_with_the_key_can_open_no_socket_to_the_network(clinics: Clinics) -> None:
    clinics.port_process.start()
    clinics.rounds_process.start()
    assert soon(clinics.operator_folder / "state" / "rounds.sock"), clinics.logs()

    def filters(process: int) -> int:
        found = re.search(r"Seccomp_filters:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
        assert found is not None
        return int(found[1])

    assert filters(clinics.rounds_process.pid) == filters(clinics.port_process.pid) + 1
