"""A federation in containers, where an engine is: the real images through the real compose.yaml.

UMBEL_IMAGES names the images of server, relay and trainer, with commas between them; compose speaks
to the engine that DOCKER_HOST or the machine names. docs/deploy/containers.md tells it in words.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deploy.test_check import CLIENT, SERVER, edit
from deploy.test_compose import engine
from e2e.daemons import DRAFT

from umbel_host.files.model_digest import folder_digest

IMAGES = os.environ.get("UMBEL_IMAGES", "").split(",")
SITES = ("a", "b", "c")
COMPOSE = Path(__file__).parents[2] / "deploy" / "compose"
POLICY = {
    r"^models = .*$": "models = [{digest}]\nminimum_cohort = 2\ncolluding_sites = 0",
    r"^labels = .*$": 'labels = ["a", "b"]',
    r"^max_epsilon = .*$": "max_epsilon = 8.0\nmax_delta = 1e-4",
    r"^total_epsilon = .*$": "total_epsilon = 8.0",
    r"^public_size = .*$": "public_size = 40",
}
pytestmark = [
    pytest.mark.soak,  # two gigabytes of images, made before, and minutes
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        engine() is None or len(IMAGES) != 3,
        reason="needs a container engine, compose, and UMBEL_IMAGES=server,relay,trainer",
    ),
]


class Compose:
    """One project of compose in a folder of the test's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._command = engine() or []

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = self._run(*arguments)
        assert (done.returncode == 0) == (code == 0), (arguments, done.stdout, done.stderr)
        return done.stdout if code == 0 else done.stdout + done.stderr

    def _run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self._command, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def admin(self, part: str, *command: str) -> str:
        return self("run", "--rm", "-T", f"{part}-admin", *command)

    def inside(self, service: str, *command: str) -> str:
        return self("exec", "-T", service, *command)

    def until(self, service: str, text: str, *command: str, seconds: float = 240) -> str:
        deadline = time.monotonic() + seconds
        said = ""
        while text not in said:
            assert time.monotonic() < deadline, (said, self("logs", "--tail", "20"))
            time.sleep(2)
            # The process may still be starting.
            done = self._run("exec", "-T", service, *command)
            said = done.stdout if done.returncode == 0 else ""
        return said

    def own(self, *parts: str) -> None:
        """What people put there belongs to the user of the containers."""
        for part in parts:
            for path in (self.folder / part, *(self.folder / part).rglob("*")):
                os.chown(path, 10001, 10000)


def fingerprint(text: str) -> str:
    (found,) = re.findall(r"^fingerprint\s+(\S+)", text, re.MULTILINE)
    return str(found)


@pytest.fixture
def compose(tmp_path: Path, tiny_model: Path) -> Iterator[Compose]:
    for name in ("compose.yaml", "check"):
        shutil.copy(COMPOSE / name, tmp_path)
    env = (COMPOSE / "env.example").read_text()
    for name, image in zip(("SERVER", "RELAY", "TRAINER"), IMAGES, strict=True):
        env = re.sub(rf"^(UMBEL_{name}_IMAGE)=.*$", rf"\1={image}", env, flags=re.MULTILINE)
    env = env.replace("PROJECT_NAME=umbel", f"PROJECT_NAME=umbeltest{os.getpid()}")
    (tmp_path / ".env").write_text(env.replace("=8g", "=2g"))
    shutil.copytree(tiny_model, tmp_path / "model")
    for part in ("operator", *(f"site-{site}" for site in SITES)):
        (tmp_path / part).mkdir(mode=0o750)
    made = Compose(tmp_path)
    made.own("model", "operator", *(f"site-{site}" for site in SITES))
    yield made
    made("down", "--volumes")


def set_up(compose: Compose) -> None:
    """The operator, three sites with their data, and everybody's approval of everybody."""
    at = compose.folder
    address = ("--address", "operator:9443")
    compose.admin(
        "operator", "umbel-server", "init", "--folder", ".", "--federation", "clinics", *address
    )
    edit(at / "operator" / "server.toml", SERVER)
    (at / "operator" / "sites").mkdir()
    compose.own("operator")
    for site in SITES:
        folder, name = at / f"site-{site}", f"hospital-{site}"
        said = compose.admin(
            f"site-{site}",
            *("umbel-client", "init", "--site", name, "--federation", "clinics"),
        )
        shutil.copy(folder / f"{name}.request.json", at / "operator")
        compose.admin(
            "operator",
            *("umbel-server", "sites", "add", f"{name}.request.json", "--out", f"{site}.kit.json"),
            *("--fingerprint", fingerprint(said)),
        )
        shutil.copy(at / "operator" / f"{site}.kit.json", folder / "kit.json")
        compose.own(f"site-{site}")
        compose.admin(f"site-{site}", "umbel-client", "join", "kit.json")
    said = compose.admin("operator", "umbel-server", "roster", "export", "--out", "clinics.json")
    (digest,) = re.findall(r"^digest\s+(\w+)", said, re.MULTILINE)
    for site in SITES:
        folder = at / f"site-{site}"
        shutil.copy(at / "operator" / "clinics.json", folder)
        model = json.dumps(folder_digest(at / "model").hex())
        edit(folder / "client.toml", CLIENT)
        edit(folder / "client.toml", {old: new.format(digest=model) for old, new in POLICY.items()})
        random = np.random.default_rng(ord(site))
        rows = [
            {"text": " ".join(f"w{word}" for word in random.integers(0, 35, 5)), "label": label}
            for label in ("a", "b") * 20
        ]
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (folder / "draft.toml").write_text(DRAFT.format(model='"/model"'))
        compose.own(f"site-{site}")
        compose.admin(
            f"site-{site}", "umbel-client", "roster", "approve", "clinics.json", "--digest", digest
        )


def test_a_federation_in_containers(compose: Compose) -> None:
    set_up(compose)
    at = compose.folder
    # A trainer that might run with a network is not started, nor is its relay.
    edit(at / "site-b" / "client.toml", {r'^isolation = ".*"$': 'isolation = "preferred"'})
    assert "isolation: found preferred" in compose("run", "--rm", "site-b-check", code=10)
    edit(at / "site-b" / "client.toml", {r'^isolation = ".*"$': 'isolation = "required"'})

    compose("up", "--detach")
    for service, lines in {
        "rounds": "lo",
        "trainer-a": "lo",
        "relay-a": "eth0 lo",
    }.items():
        said = compose.inside(
            service,
            *(
                "sh",
                "-c",
                "ls /sys/class/net; grep -E 'CapEff|NoNewPrivs' /proc/self/status; id -u",
            ),
        )
        words = " ".join(said.split())
        assert words == f"{lines} CapEff: 0000000000000000 NoNewPrivs: 1 10001", (service, said)
        refused = "touch /umbel/x /opt/x /x 2>&1 | grep -c 'Read-only file system'"
        assert compose.inside(service, "sh", "-c", refused).strip() == "3"
    assert "identity.pem" not in compose.inside("relay-a", "find", "/umbel")
    assert "key.pem" not in compose.inside("trainer-a", "find", "/umbel")
    assert "key.pem" not in compose.inside("rounds", "find", "/umbel")

    compose.until("trainer-a", "relay    connected", "umbel-client", "status")
    plan = compose.admin("site-a", "python", "-P", "-m", "umbel_client.drafting", "draft.toml")
    (at / "operator" / "plan.json").write_text(plan[plan.index("{") :])
    compose.own("operator")
    compose.admin("operator", "umbel-server", "plan", "sign", "plan.json", "--out", "signed.json")
    compose.admin("operator", "umbel-server", "job", "start", "signed.json")
    for site in SITES:
        waiting = compose.until(f"trainer-{site}", "triage", "umbel-client", "plans", "--json")
        digest = json.loads(waiting)[0]["digest"]
        compose.inside(f"trainer-{site}", "umbel-client", "approve", "triage", "--digest", digest)
    compose.until("rounds", "finished", "umbel-server", "job", "status", "triage", seconds=400)
    sockets = {
        "port": "/run/umbel/carrier.sock",
        "rounds": "/var/lib/umbel/rounds.sock",
        "trainer-c": "/run/umbel/trainer.sock",
        "relay-c": "/run/umbel/relay.sock",
    }
    for service, socket in sockets.items():
        said = compose.inside(service, "python", "-P", "-m", "umbel_host.probe", f"unix:{socket}")
        assert said == f"unix:{socket}: serving\n"
    compose.admin("operator", "umbel-server", "adapters", "export", "triage", "--out", "adapter")
    assert (at / "operator" / "adapter" / "adapter_model.safetensors").stat().st_size > 0
