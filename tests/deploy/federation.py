"""An operator and one of three sites as systemd runs them; the other two are ordinary processes."""

import json
import shutil
import subprocess
import time
from pathlib import Path

from deploy.machine import SOURCE_PATH, Machine
from e2e.daemons import Clinics

from umbel_common.plans.plan_file import plan_to_json
from umbel_common.trust.identity import sign

SITE = "north"
UNITS = ("umbel-trainer", "umbel-relay", "umbel-port", "umbel-rounds")
OPERATOR_FILES = (
    "identity.pem",
    "roster.json",
    "sites.json",
    "ca/certificate.pem",
    "tls/certificate.pem",
    "tls/key.pem",
)
SITE_FILES = (
    "identity.pem",
    "roster.json",
    "relay/server-ca.pem",
    "relay/certificate.pem",
    "relay/key.pem",
)
SECRETS = (
    "/etc/umbel/identity.pem",
    "/var/lib/umbel-trainer/data.jsonl",
    "/var/lib/umbel-trainer/state/ledger.sqlite",
    "/var/lib/umbel-trainer/state/session.sqlite",
)
"""What a relay must not be able to read."""

# The tests' Python is not one that pip installed the packages into.
_ENVIRONMENT = f"[Service]\nEnvironment={SOURCE_PATH} LD_LIBRARY_PATH=/opt/python/lib\n"
_CLIENT_TOML = (
    ('state = "state"', 'isolation = "required"\nstate = "/var/lib/umbel-trainer/state"'),
    ('path = "data.jsonl"', 'path = "/var/lib/umbel-trainer/data.jsonl"'),
    ('socket = "run/trainer.sock"', 'socket = "/run/umbel/trainer.sock"'),
)


class Deployment:
    """One machine with both roles, as docs/deploy/systemd.md sets them up."""

    source = SOURCE_PATH

    def __init__(self, folder: Path, model: Path) -> None:
        self.clinics = Clinics(folder, model)
        self.machine = Machine()
        for role in ("operator", "site"):
            self.machine.run("/opt/umbel-source/deploy/systemd/install", role)
        self._put_operator()
        self._put_site(model)
        self.own()
        for unit in UNITS:
            self.machine.put(
                f"/etc/systemd/system/{unit}.service.d/python.conf", _ENVIRONMENT.encode()
            )
        self.machine.run("systemctl", "daemon-reload")

    def close(self) -> None:
        self.machine.close()
        self.clinics.close()

    def own(self) -> None:
        """Gives every file the owner and mode that the units need."""
        self.machine.run("systemd-tmpfiles", "--create", "umbel-site.conf", "umbel-operator.conf")
        self.machine.run("chown", "-R", "umbel-trainer:umbel-trainer", "/var/lib/umbel-trainer")

    def start(self) -> None:
        """Everything, here and in the machine."""
        self.machine.run("systemctl", "start", "umbel-server", "umbel-trainer", "umbel-relay")
        for name, site in self.clinics.sites.items():
            if name != SITE:
                site.trainer.start()
                site.relay.start()

    def start_job(self) -> str:
        """Queues the plan's job as the operator's people do; its name."""
        plan = self.clinics.plan()
        text = plan_to_json(plan, sign(self.clinics.operator, plan).signature)
        self.machine.put("/tmp/signed.json", text.encode())
        self.server("job", "start", "/tmp/signed.json")
        return plan.job

    def wait(self, job: str, state: str, seconds: float = 400) -> None:
        """Until a job is in this state."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = json.loads(self.server("job", "status", job, "--json").stdout)
            if found["state"] == state:
                return
            time.sleep(0.5)
        raise AssertionError((found, self.logs()))

    def server(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """`umbel-server`, given by the operator's people."""
        config = "--config=/etc/umbel-server/server.toml"
        return self.machine.python(
            "-m", "umbel_server.cli", *arguments, config, user="umbel-rounds"
        )

    def client(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """`umbel-client`, given by the site's people."""
        config = "--config=/etc/umbel/client.toml"
        return self.machine.python(
            "-m", "umbel_client.cli", *arguments, config, user="umbel-trainer"
        )

    def show(self, unit: str, value: str) -> str:
        """What systemd knows of a unit under this name."""
        return self.machine.run("systemctl", "show", "--value", f"-p{value}", unit).stdout.strip()

    def main_process(self, unit: str) -> int:
        """The number of a unit's process, as the machine counts."""
        return int(self.show(unit, "MainPID"))

    def logs(self) -> str:
        """What every unit and every process here said."""
        texts = [f"--- {unit}\n{self.machine.log(unit)[-4000:]}" for unit in UNITS]
        return "\n".join([*texts, self.clinics.logs()])

    def _put_operator(self) -> None:
        folder = self.clinics.operator_folder
        places = 'state = "/var/lib/umbel-server"\nsocket = "/run/umbel-server/carrier.sock"\n'
        text = places + (folder / "server.toml").read_text()
        self.machine.put("/etc/umbel-server/server.toml", text.encode())
        for name in OPERATOR_FILES:
            data = (folder / name).read_bytes()
            self.machine.put(f"/etc/umbel-server/{name}", data, 0o600)

    def _put_site(self, model: Path) -> None:
        site = self.clinics.sites[SITE]
        text = site.config.read_text().replace(str(model), "/var/lib/umbel-trainer/model")
        for old, new in _CLIENT_TOML:
            assert old in text
            text = text.replace(old, new)
        self.machine.put("/etc/umbel/client.toml", text.encode())
        for name in SITE_FILES:
            self.machine.put(f"/etc/umbel/{name}", (site.folder / name).read_bytes(), 0o600)
        self.machine.put(
            "/var/lib/umbel-trainer/data.jsonl", (site.folder / "data.jsonl").read_bytes()
        )
        shutil.copytree(model, self.machine.inside("/var/lib/umbel-trainer/model"))
