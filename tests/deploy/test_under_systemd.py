"""A federation whose operator and one site really run by their units, under a real systemd."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.federation import SECRETS, SITE, UNITS, Deployment
from deploy.machine import missing
from e2e.tunnel_proxy import TunnelProxy
from support.waiting import HANGING

from umbel_client.trainer.isolation import Network
from umbel_server.operator.authority import key_pem

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(missing() is not None, reason=f"no machine of its own: {missing()}"),
]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path_factory.mktemp("systemd"), tiny_model)
    yield made
    made.close()


@pytest.mark.timeout(600)
def test_a_job_runs_and_the_relay_takes_the_proxy_of_its_environment_file(
    deployment: Deployment,
) -> None:
    machine = deployment.machine
    with TunnelProxy() as proxy:
        address = f"HTTPS_PROXY=http://127.0.0.1:{proxy.port}\n"
        machine.put("/etc/umbel/relay.env", address.encode(), 0o600)
        deployment.start()
        job = deployment.start_job()
        deployment.wait(job, "finished")
        assert proxy.targets == {f"127.0.0.1:{deployment.clinics.port}"}
        shown = deployment.client("status").stdout
        assert "relay    connected" in shown
        assert "network  none" in shown
        adapter = f"state/adapters/{job}/adapter_model.safetensors"
        theirs = {
            (site.folder / adapter).read_bytes()
            for name, site in deployment.clinics.sites.items()
            if name != SITE
        }
        assert {machine.inside(f"/var/lib/umbel-trainer/{adapter}").read_bytes()} == theirs
        relay_cannot_read(deployment)
        trainer_has_no_network(deployment)
        what_root_writes_is_for_the_units_too(deployment)
        stops_cleanly(deployment)


def relay_cannot_read(deployment: Deployment) -> None:
    """Nor the rounds' files the port. Each file is there: root reads it."""
    machine = deployment.machine
    for path in SECRETS:
        machine.run("sha256sum", path)
        assert machine.run("sha256sum", path, user="umbel-relay", check=False).returncode != 0
    rounds = ("/etc/umbel-server/identity.pem", "/var/lib/umbel-server/journal.sqlite")
    for path in (*rounds, "/var/lib/umbel-server/queue.sqlite"):
        machine.run("sha256sum", path)
        assert machine.run("sha256sum", path, user="umbel-port", check=False).returncode != 0
    # Each of the two has a state folder of its own, and the port's is where the jobs' would be.
    port = deployment.main_process("umbel-port")
    listed = machine.run("nsenter", f"--target={port}", "--mount", "ls", "/var/lib/umbel-server")
    assert "superlink.sqlite" in listed.stdout
    assert "journal.sqlite" not in listed.stdout
    held = machine.run("ls", "/var/lib/umbel-server").stdout
    assert "superlink.sqlite" not in held
    # With its modes gone, the unit's own view of the files still keeps the relay out.
    key, relay = "/etc/umbel/identity.pem", deployment.main_process("umbel-relay")
    machine.run("chmod", "644", key)
    machine.run("cat", key, user="umbel-relay")
    view = ("nsenter", f"--target={relay}", "--mount", "setpriv", "--reuid=umbel-relay")
    read = machine.run(*view, "--clear-groups", "--regid=umbel-relay", "cat", key, check=False)
    assert "Permission denied" in read.stderr
    deployment.own()


def trainer_has_no_network(deployment: Deployment) -> None:
    """From its namespace the port is not there; from the machine's it is."""
    machine, trainer = deployment.machine, deployment.main_process("umbel-trainer")
    port = deployment.clinics.port
    connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
    machine.python("-c", connect)
    inside = ("nsenter", f"--target={trainer}", "--net", "/opt/umbel/bin/python", "-c", connect)
    assert "refused" in machine.run(*inside, check=False).stderr
    source = "from umbel_client.trainer.isolation import network; print(network().value)"
    asked = ("nsenter", f"--target={trainer}", "--net", "env")
    shown = machine.run(*asked, deployment.source, "/opt/umbel/bin/python", "-c", source)
    assert shown.stdout.strip() == Network.NONE.value
    assert deployment.machine.log("umbel-trainer").count("THE TRAINER HAS A WAY OUT") == 0
    assert deployment.machine.log("umbel-rounds").count("keeps its network") == 0


def what_root_writes_is_for_the_units_too(deployment: Deployment) -> None:
    """Without another systemd-tmpfiles: the folder hands its group on."""
    machine = deployment.machine
    key = key_pem(deployment.clinics.authority._key)
    machine.put("/etc/umbel-server/ca/key.pem", key, 0o600)
    certificate = "/etc/umbel-server/tls/certificate.pem"
    before = machine.inside(certificate).read_bytes()
    config = "--config=/etc/umbel-server/server.toml"
    machine.python("-m", "umbel_server.cli", "renew", config)
    assert machine.inside(certificate).read_bytes() != before
    machine.run("sha256sum", certificate, user="umbel-port")


def stops_cleanly(deployment: Deployment) -> None:
    """One name stops both of the operator's processes."""
    deployment.machine.run("systemctl", "stop", "umbel-server", "umbel-relay", "umbel-trainer")
    for unit in UNITS:
        assert deployment.show(unit, "ActiveState") == "inactive", deployment.logs()
        assert "Traceback" not in deployment.machine.log(unit)


CASES = {
    "a secret that is missing": ("trainer", "rm /etc/umbel/identity.pem", 20, "cannot be read"),
    "a key that others may read": (
        "trainer",
        "chmod 640 /etc/umbel/identity.pem",
        20,
        "mode 0640",
    ),
    "a key of another user": (
        "trainer",
        "chown root /etc/umbel/identity.pem",
        20,
        "Permission denied, for user umbel-trainer",
    ),
    "a state folder of another user": (
        "trainer",
        "chown root /var/lib/umbel-trainer/state",
        50,
        "the state folder cannot be used",
    ),
    "data that the trainer may not read": (
        "trainer",
        "chmod 0 /var/lib/umbel-trainer/data.jsonl",
        11,
        "Permission denied, for user umbel-trainer",
    ),
    "a model that the trainer may not read": (
        "trainer",
        "chmod 0 /var/lib/umbel-trainer/model",
        12,
        "Permission denied, for user umbel-trainer",
    ),
    "no configuration": ("trainer", "rm /etc/umbel/client.toml", 10, "client.toml"),
    "a relay's key that others may read": (
        "relay",
        "chmod 640 /etc/umbel/relay/key.pem",
        20,
        "mode 0640",
    ),
    "a relay's key of another user": (
        "relay",
        "chown root /etc/umbel/relay/key.pem",
        20,
        "Permission denied, for user umbel-relay",
    ),
    "a folder for sockets that is closed": ("relay", "chmod 700 /run/umbel", 50, "/run/umbel"),
    "a server's key that others may read": (
        "port",
        "chmod 640 /etc/umbel-server/tls/key.pem",
        20,
        "mode 0640",
    ),
    "a list of sites that the port may not read": (
        "port",
        "chmod 600 /etc/umbel-server/sites.json",
        20,
        "Permission denied, for user umbel-port",
    ),
    "a folder for state that is closed": (
        "port",
        "chown root /var/lib/umbel-port",
        50,
        "the state folder cannot be used",
    ),
    "a roster that is missing": ("rounds", "rm /etc/umbel-server/roster.json", 20, "roster.json"),
    "an operator's key of another user": (
        "rounds",
        "chown umbel-port /etc/umbel-server/identity.pem",
        20,
        "Permission denied, for user umbel-rounds",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_unit_cannot_use_is_one_error_before_anything_starts(
    deployment: Deployment, case: str
) -> None:
    name, spoil, code, said = CASES[case]
    unit, machine = f"umbel-{name}", deployment.machine
    machine.run("systemctl", "stop", unit)
    machine.run(
        "sh", "-c", "rm -rf /saved; mkdir /saved; cp -a /etc/umbel /etc/umbel-server /saved"
    )
    machine.run("sh", "-c", spoil)
    machine.run("journalctl", "--rotate", "--vacuum-time=1s")
    since = machine.run("date", "+%s.%N").stdout.strip()
    try:
        machine.run("systemctl", "start", unit)
        deadline = time.monotonic() + HANGING
        while deployment.show(unit, "ExecMainStatus") == "0":
            assert time.monotonic() < deadline, machine.log(unit)
            time.sleep(0.2)
        assert deployment.show(unit, "ExecMainStatus") == str(code), machine.log(unit)
        log = machine.run("journalctl", "-o", "cat", "-u", unit, f"--since=@{since}").stdout
        assert log.count("error: ") == 1, log
        assert said in log
        assert "Traceback" not in log
        # What a file is the reason for is not tried again; a full disk may pass.
        assert deployment.show(unit, "Result") == "exit-code"
        assert (deployment.show(unit, "ActiveState") == "failed") == (code != 50)
    finally:
        machine.run("systemctl", "stop", unit)
        machine.run("systemctl", "reset-failed")
        machine.run("sh", "-c", "rm -rf /etc/umbel /etc/umbel-server; cp -a /saved/* /etc")
        machine.run("sh", "-c", "chmod 700 /var/lib/umbel-trainer/model")
        machine.run("sh", "-c", "chmod 600 /var/lib/umbel-trainer/data.jsonl")
        deployment.own()
