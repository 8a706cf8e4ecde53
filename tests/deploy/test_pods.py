"""A job through the pods that the charts render: an operator and three sites."""

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.charts import Object, render
from deploy.pods import Cluster, Pod, missing
from e2e.daemons import Clinics, Site

from umbel_common.plans.plan_file import plan_to_json
from umbel_common.trust.identity import sign

pytestmark = pytest.mark.skipif(
    missing() is not None, reason=f"this machine runs no pods: {missing()}"
)
PORT = 9443
UNFILTERED = """
import sys
import umbel_client.trainer.isolation
import umbel_client.trainer_process
umbel_client.trainer.isolation.only_accept = lambda: 38
sys.argv = ["trainer", "client.toml"]
sys.exit(umbel_client.trainer_process.main())
"""
REACH = f"""
import socket
socket.create_connection(("127.0.0.1", {PORT}), timeout=5).close()
"""


class Federation:
    """Four pods."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.cluster = Cluster()
        self.clinics = Clinics(folder, model)
        self.model = model
        self.operator = self._operator(folder / "operator")
        self.sites = {name: self._site(site) for name, site in self.clinics.sites.items()}

    def close(self) -> None:
        self.cluster.close()
        self.clinics.close()

    def wait(self, job: str, state: str, seconds: float = 600) -> None:
        """Until a job is in this state."""
        deadline = time.monotonic() + seconds
        said = ""
        while time.monotonic() < deadline:
            said = self.server("job", "status", job, "--json")
            if (found := json.loads(said)["state"]) == state:
                return
            if found == "failed":
                break
            time.sleep(3)  # each look is a program that starts
        raise AssertionError((said, *(pod.logs() for pod in self.cluster.pods)))

    def server(self, *arguments: str) -> str:
        """`umbel-server`, as the operator's people give it."""
        done = self.operator.exec("rounds", "umbel-server", *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    def start_job(self) -> str:
        """As docs/deploy/kubernetes.md says."""
        plan = self.clinics.plan()
        text = plan_to_json(plan, sign(self.clinics.operator, plan).signature)
        script = "cat > /tmp/signed.json && umbel-server job start /tmp/signed.json"
        done = self.operator.exec("rounds", "sh", "-c", script, data=text)
        assert done.returncode == 0, done.stderr
        return plan.job

    def _operator(self, folder: Path) -> Pod:
        self.clinics.limit(offer_seconds=300, train_seconds=300, stage_seconds=120)
        values: Object = {
            "serverToml": (folder / "server.toml").read_text(),
            "roster": (folder / "roster.json").read_text(),
            "sites": (folder / "sites.json").read_text(),
        }
        secrets = {
            "operator-identity": {"identity.pem": (folder / "identity.pem").read_bytes()},
            "operator-tls": {
                "key.pem": (folder / "tls" / "key.pem").read_bytes(),
                "certificate.pem": (folder / "tls" / "certificate.pem").read_bytes(),
                "ca.pem": (folder / "ca" / "certificate.pem").read_bytes(),
            },
        }
        return self.cluster.pod(render("umbel-operator", folder, values), secrets)

    def _site(self, site: Site) -> Pod:
        text = site.config.read_text().replace(f":{self.clinics.port}", f":{PORT}")
        values: Object = {
            "clientToml": text,
            "roster": (site.folder / "roster.json").read_text(),
            "data": {"existingClaim": f"{site.name}-data"},
        }
        relay = {
            name: (site.folder / "relay" / name).read_bytes()
            for name in ("key.pem", "certificate.pem", "server-ca.pem")
        }
        secrets = {
            "north-identity": {"identity.pem": (site.folder / "identity.pem").read_bytes()},
            "north-relay": relay,
        }
        data = site.folder / "claim"
        data.mkdir()
        (data / "data.jsonl").write_bytes((site.folder / "data.jsonl").read_bytes())
        objects = render("umbel-site", site.folder, values, name=site.name)
        return self.cluster.pod(objects, secrets, data=data, model=self.model)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("pods"), tiny_model)
    yield made
    made.close()


def test_a_job_runs_through_pods(federation: Federation) -> None:
    for pod in federation.cluster.pods:
        pod.start()
    job = federation.start_job()
    federation.wait(job, "finished")
    adapter = Path("state/adapters") / job / "adapter_model.safetensors"
    adapters = {(pod.volume("state") / adapter).read_bytes() for pod in federation.sites.values()}
    assert len(adapters) == 1
    shown = federation.sites["north"].exec("trainer", "umbel-client", "status").stdout
    assert "relay    connected" in shown
    assert "network  none" in shown
    for pod in federation.cluster.pods:
        for name in ("rounds", "port") if pod is federation.operator else ("trainer", "relay"):
            assert pod.running(name)
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert pod.probe(name, probe) == 0, (pod.name, name, probe)


def status(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_no_process_has_a_privilege_and_each_is_a_user_of_its_own(federation: Federation) -> None:
    north = federation.sites["north"]
    trainer, relay = (status(north.process(name)) for name in ("trainer", "relay"))
    for found in (trainer, relay):
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
        assert {found[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert trainer["Uid"].split() == ["10001"] * 4
    assert relay["Uid"].split() == ["10002"] * 4


def test_the_trainer_shares_its_relays_network_and_can_use_none_of_it(
    federation: Federation,
) -> None:
    north = federation.sites["north"]
    spaces = {os.readlink(f"/proc/{north.process(name)}/ns/net") for name in ("trainer", "relay")}
    assert len(spaces) == 1
    # Its own filter, above the runtime's.
    filters = [int(status(north.process(name))["Seccomp_filters"]) for name in ("trainer", "relay")]
    assert filters[0] > filters[1]
    assert north.exec("relay", "python", "-c", REACH).returncode == 0
    dropping = (
        "from umbel_client.trainer.isolation import drop_network\nassert not drop_network()\n"
    )
    dropped = dropping + REACH
    done = north.exec("trainer", "python", "-c", dropped)
    assert done.returncode == 1
    assert "Address family not supported by protocol" in done.stderr


def test_the_process_with_the_operators_key_has_a_filter_of_its_own(
    federation: Federation,
) -> None:
    rounds, port = (
        int(status(federation.operator.process(name))["Seccomp_filters"])
        for name in ("rounds", "port")
    )
    assert rounds > port


def test_the_relay_finds_nothing_of_the_sites(federation: Federation) -> None:
    north = federation.sites["north"]
    for path in ("/data/data.jsonl", "/model/config.json", "/var/lib/umbel/state/ledger.sqlite"):
        assert north.exec("trainer", "test", "-s", path).returncode == 0, path
        assert north.exec("relay", "test", "-e", path).returncode == 1, path
    assert north.exec("trainer", "ls", "/keys").stdout.split() == ["identity.pem"]
    keys = ["certificate.pem", "key.pem", "server-ca.pem"]
    assert north.exec("relay", "ls", "/keys").stdout.split() == keys
    assert "identity" not in north.exec("relay", "cat", "/keys/key.pem").stdout


def test_keys_and_ledger_are_their_processes_alone(federation: Federation) -> None:
    north = federation.sites["north"]
    for path, user in (
        (north.volume("trainer-keys") / "identity.pem", 10001),
        (north.volume("relay-keys") / "key.pem", 10002),
        (north.volume("state") / "state", 10001),
    ):
        found = path.stat()
        assert found.st_uid == user
        assert stat.S_IMODE(found.st_mode) & 0o077 == 0, path


def test_nothing_is_written_to_the_root_or_to_what_is_read(federation: Federation) -> None:
    north = federation.sites["north"]
    for path in ("/etc/umbel/client.toml", "/keys/identity.pem", "/data/x", "/model/x", "/opt/x"):
        done = north.exec("trainer", "sh", "-c", f"echo > {path}")
        assert "Read-only file system" in done.stderr, path


def test_a_second_trainer_on_one_ledger_does_not_run(federation: Federation) -> None:
    done = federation.sites["north"].instead(
        "trainer", "python", "-P", "-m", "umbel_client.trainer_process", "client.toml"
    )
    assert done.returncode != 0
    assert "this site's trainer" in done.stderr


def test_a_trainer_that_cannot_give_its_network_away_does_not_run(federation: Federation) -> None:
    north = federation.sites["north"]
    north.kill()
    done = north.instead("trainer", "python", "-c", UNFILTERED)
    assert done.returncode == 10
    assert "the trainer cannot close every way out" in done.stderr
    assert "Operation not permitted" in done.stderr
