"""What a site's people and the operator see of running processes, by their commands."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.daemons import Clinics, Site
from support import warm_python
from support.waiting import HANGING

from umbel_client.site.ipc import TrainerStub
from umbel_client.trainer.isolation import Network, network
from umbel_common.errors import ConfigError, UnreachableError
from umbel_common.protocol.wire import MAGIC
from umbel_host.entry import INTERRUPTED
from umbel_host.transport.sockets import is_healthy
from umbel_server.storage.job_queue import JobState

STATES = ("ok", "look", "FAIL")


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Clinics]:
    """Running, with sites where people approve each plan."""
    names = ("north", "south")
    made = Clinics(tmp_path_factory.mktemp("clinics"), tiny_model, policy="", names=names)
    text = made.draft.read_text()
    assert "rounds = 3" in text
    made.draft.write_text(text.replace("rounds = 3", "rounds = 2"))
    made.start_all()
    for site in made.sites.values():
        site.status()
    yield made
    made.close()


def command(folder: Path, module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return warm_python.run(
        "-m", module, *arguments, cwd=folder, env={**os.environ, "COLUMNS": "120"}
    )


def client(site: Site, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs `umbel-client` as a person in the site's folder would."""
    return command(site.folder, "umbel_client.cli", *arguments)


def server(clinics: Clinics, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs `umbel-server` in the operator's folder."""
    return command(clinics.operator_folder, "umbel_server.cli", *arguments)


def findings(site: Site, *, code: int = 0) -> dict[str, str]:
    """Name of each check of `doctor` -> ok, look or FAIL."""
    done = client(site, "doctor")
    assert done.returncode == code
    lines = done.stdout.splitlines()
    return {line[6:19].strip(): line[:5].strip() for line in lines if line[:5].strip() in STATES}


def waiting(site: Site, job: str) -> str:
    """What `umbel-client plans` prints once the job's plan is there."""
    deadline = time.monotonic() + HANGING
    while job not in site.status().waiting:
        assert time.monotonic() < deadline, site.trainer.log.read_text()
        time.sleep(0.1)
    listed = client(site, "plans").stdout
    assert job in listed
    return listed


@contextmanager
def watch(site: Site, lines: list[str]) -> Iterator[None]:
    """`umbel-client watch` prints what happens meanwhile into `lines`, until it is interrupted."""
    watching = subprocess.Popen(
        [sys.executable, "-m", "umbel_client.cli", "watch"],
        cwd=site.folder,
        env={**os.environ, "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    reading = threading.Thread(target=lambda: lines.extend(watching.stdout or ()))
    stub = TrainerStub(site.socket)
    try:
        # It prints from now on, whenever now is: two kinds of nonsense in turn, until one is seen.
        printed = select.poll()
        printed.register(watching.stdout or 0, select.POLLIN)
        deadline = time.monotonic() + HANGING
        while not printed.poll(100):
            assert time.monotonic() < deadline
            for nonsense in (b"nonsense", MAGIC + bytes(100)):
                stub.handle(nonsense)
        reading.start()
        yield
        watching.send_signal(signal.SIGINT)
        assert watching.wait(HANGING) == INTERRUPTED
        reading.join(HANGING)
    finally:
        watching.kill()
        watching.wait(HANGING)
        stub.close()


@pytest.fixture(scope="module")
def watched(clinics: Clinics) -> list[str]:
    """What south's `watch` printed while a plan went from its draft to everybody's adapter, by
    commands only."""
    lines: list[str] = []
    with watch(clinics.sites["south"], lines):
        for arguments in (
            ("plan", "new", str(clinics.draft), "--out", "plan.json"),
            ("plan", "sign", "plan.json", "--out", "signed.json"),
            ("job", "start", "signed.json"),
        ):
            done = server(clinics, *arguments)
            assert done.returncode == 0, done.stderr
        digest = clinics.plan().digest().hex()
        for site in clinics.sites.values():
            assert "epsilon 8" in waiting(site, "triage")
            done = client(site, "approve", "triage", "--digest", digest)
            assert done.returncode == 0, done.stderr
            assert f"approved: {digest}" in done.stdout
            assert "budget  spent epsilon 0, this plan " in done.stdout
            assert "No plan waits" in client(site, "plans").stdout
        queued = clinics.wait("triage", JobState.FINISHED, JobState.FAILED)
        assert queued.state is JobState.FINISHED, (queued.detail, clinics.logs())
    return lines


@pytest.mark.usefixtures("watched")
def test_a_plan_goes_from_its_draft_to_everybodys_adapter_by_commands_only(
    clinics: Clinics,
) -> None:
    assert "signed by" in server(clinics, "plan", "show", "signed.json").stdout
    assert "not signed" in server(clinics, "plan", "show", "plan.json").stdout
    assert "triage" in client(clinics.sites["north"], "adapters").stdout
    assert "finished" in server(clinics, "job", "status").stdout
    rows = json.loads(server(clinics, "job", "status", "--json").stdout)
    assert [(row["job"], row["state"], row["round"]) for row in rows] == [("triage", "finished", 2)]
    assert rows[0]["server_running"]
    assert {
        one["site"]: (one["stage"], one["refused"]) for one in rows[0]["sites"]
    } == dict.fromkeys(clinics.sites, ("finish", None))
    assert all(one["last_contact"] is not None for one in rows[0]["sites"])
    detailed = server(clinics, "job", "status", "triage")
    assert "finish of round 2" in detailed.stdout
    assert " s ago" in detailed.stdout
    assert "No server is running" not in detailed.stderr
    assert len(json.loads(server(clinics, "adapters", "list", "--json").stdout)) == 3
    listed = server(clinics, "adapters", "list").stdout
    assert len([line for line in listed.splitlines() if line.startswith("triage")]) == 3
    exported = server(clinics, "adapters", "export", "triage", "--out", "adapter")
    assert exported.returncode == 0, exported.stderr
    north = clinics.sites["north"]
    received = north.folder / "state" / "adapters" / "triage"
    assert json.loads(client(north, "adapters", "--json").stdout) == [
        {"job": "triage", "folder": str(received)}
    ]
    assert f"triage is finished; its adapter is in {received}" in north.trainer.log.read_text()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours = (clinics.operator_folder / "adapter" / name).read_bytes()
        assert ours == (received / name).read_bytes()
    assert server(clinics, "adapters", "export", "triage", "--out", "adapter").returncode == 50
    assert server(clinics, "job", "start", "signed.json").returncode == 51


def test_watch_prints_what_happens_until_it_is_interrupted(watched: list[str]) -> None:
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    assert all(re.match(moment + r"\S", line) for line in watched), watched
    texts = [line[21:].strip() for line in watched]
    for number in (1, 2):
        speed = rf"round {number}: step 2 of 2, about [\d.e+]+ records/s"
        assert any(re.fullmatch(speed, text) for text in texts), texts
    assert any(text.startswith("round 2 is charged: epsilon") for text in texts), texts


def test_status_says_how_both_processes_stand(clinics: Clinics) -> None:
    site = clinics.sites["north"]
    done = client(site, "status")
    assert done.returncode == 0, done.stderr
    assert "connected" in done.stdout
    assert "north of clinics" in done.stdout
    document = json.loads(client(site, "status", "--json").stdout)
    assert document["trainer"]["site"] == "north"
    assert document["relay"] == "connected"


def test_one_command_asks_all_four_processes_whether_they_are_well(clinics: Clinics) -> None:
    site = clinics.sites["north"]
    state = clinics.operator_folder / "state"
    sockets = [
        site.folder / "run" / "trainer.sock",
        site.folder / "run" / "relay.sock",
        state / "carrier.sock",
        state / "rounds.sock",
    ]
    probed = [command(site.folder, "umbel_host.probe", f"unix:{path}") for path in sockets]
    assert [done.returncode for done in probed] == [0, 0, 0, 0], [done.stderr for done in probed]
    # Who cannot reach the server is not well, and still runs.
    clinics.port_process.stop()
    try:
        done = command(site.folder, "umbel_host.probe", f"unix:{state / 'carrier.sock'}")
        assert done.returncode == UnreachableError.exit_code
        relay, deadline = site.folder / "run" / "relay.sock", time.monotonic() + HANGING
        while is_healthy(relay, HANGING):
            assert time.monotonic() < deadline
            time.sleep(0.3)
        done = command(site.folder, "umbel_host.probe", f"unix:{relay}")
        assert done.returncode == 1, done.stderr
    finally:
        clinics.port_process.start()


def test_a_pause_is_seen_and_undone(clinics: Clinics) -> None:
    site = clinics.sites["south"]
    assert client(site, "pause").returncode == 0
    assert "paused" in client(site, "status").stdout
    assert client(site, "resume").returncode == 0
    assert "paused" not in client(site, "status").stdout


def test_nobody_approves_what_they_did_not_see(clinics: Clinics) -> None:
    done = client(clinics.sites["north"], "approve", "nothing")
    assert done.returncode != 0
    assert "umbel-client plans" in done.stderr


def test_a_healthy_site_is_fine(clinics: Clinics) -> None:
    site = clinics.sites["north"]
    (site.folder / "data.jsonl").chmod(0o640)
    found = findings(site)
    expected = dict.fromkeys(found, "ok")
    if network() is Network.REACHABLE and found["isolation"] == "look":
        # A kernel that gives no network namespace.
        expected["isolation"] = "look"
    # Whoever runs this test runs trainer and relay.
    expected["users"] = expected["trainer"] = "look"
    assert len(found) == 14
    assert found == expected


def test_one_user_for_both_is_said_and_refused_where_isolation_is_required(
    clinics: Clinics,
) -> None:
    """The test's own user runs all of them."""
    site = clinics.sites["north"]
    assert "NOT KEPT APART: the trainer" in client(site, "status").stdout
    for daemon in (site.trainer, site.relay):
        assert "TRAINER AND RELAY ARE NOT KEPT APART" in daemon.log.read_text()
    strict = site.folder / "strict.toml"
    strict.write_text('isolation = "required"\n' + site.config.read_text())
    for module in ("umbel_client.trainer_process", "umbel_client.relay"):
        done = command(site.folder, module, str(strict))
        assert done.returncode == ConfigError.exit_code
        assert "trainer and relay are not kept apart" in done.stderr


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        ("identity", 'identity = "identity.pem"', 'identity = "none.pem"'),
        ("roster", 'roster = "roster.json"', 'roster = "none.json"'),
        ("model", "models = [", 'models = ["' + "0" * 64 + '"] #'),
        ("data", 'labels = ["a", "b"]', 'labels = ["a", "c"]'),
        ("certificate", 'socket = "', 'certificate = "none.pem"\nsocket = "'),
        ("server", 'server = "127.0.0.1:', 'server = "127.0.0.1:1" #'),
    ],
)
def test_what_is_broken_is_found_and_named(
    clinics: Clinics, check: str, old: str, new: str
) -> None:
    site = clinics.sites["south"]
    text = site.config.read_text()
    assert old in text
    site.config.write_text(text.replace(old, new))
    try:
        assert findings(site, code=1)[check] == "FAIL"
    finally:
        site.config.write_text(text)


def test_commands_about_a_job_that_is_none_are_one_clear_error(clinics: Clinics) -> None:
    for arguments in (("status", "none"), ("stop", "none"), ("resume", "none")):
        done = server(clinics, "job", *arguments)
        assert done.returncode == 14
        assert "no job of this name" in done.stderr
    done = server(clinics, "job", "start", "plan.json")
    assert done.returncode == 13
    assert "umbel-server plan sign" in done.stderr
