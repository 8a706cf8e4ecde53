"""compose.yaml: by the specification's schema, and no process with more than it needs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from umbel_client.ledger.register import MACHINE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "compose"
TEXT = (FOLDER / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
SITES = ("a", "b", "c")
ONLINE = {"port", *(f"relay-{site}" for site in SITES)}


def mounts(name: str) -> dict[str, dict[str, Any]]:
    """Where a service has something, and what."""
    volumes = {volume["target"]: volume for volume in SERVICES[name].get("volumes", ())}
    secrets = {secret["target"]: secret for secret in SERVICES[name].get("secrets", ())}
    return volumes | secrets


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_specification_allows_it(name: str) -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    command = [tool, "--builtin-schema", "vendor.compose-spec", FOLDER / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_a_process_may_do_next_to_nothing(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"]
    assert service["ulimits"] == {"core": 0}
    for tmpfs in service["tmpfs"]:
        assert "noexec,nosuid,nodev" in tmpfs
    assert not {"cap_add", "privileged", "devices", "user", "pid", "ipc", "environment"} & set(
        service
    )
    assert "docker.sock" not in TEXT


@pytest.mark.parametrize("name", SERVICES)
def test_only_the_port_and_the_relays_have_a_network(name: str) -> None:
    if name in ONLINE:
        assert "network_mode" not in SERVICES[name]
    else:
        assert SERVICES[name]["network_mode"] == "none"
    assert ("ports" in SERVICES[name]) == (name == "port")


@pytest.mark.parametrize("site", SITES)
def test_a_relay_has_no_data_no_identity_and_no_ledger(site: str) -> None:
    found = mounts(f"relay-{site}")
    assert set(found) == {
        "/umbel/client.toml",
        "/umbel/relay/certificate.pem",
        "/umbel/relay/server-ca.pem",
        "/umbel/relay/key.pem",
        "/run/umbel",
    }
    assert SERVICES[f"relay-{site}"]["networks"] == [f"site-{site}"]


@pytest.mark.parametrize("site", SITES)
def test_a_trainer_only_reads_its_folder_and_has_no_key_of_the_relays(site: str) -> None:
    found = mounts(f"trainer-{site}")
    assert set(found) == {
        *("/umbel", "/model", "/umbel/relay", "/umbel/identity.pem"),
        *("/run/umbel", "/var/lib/umbel", "/var/lib/umbel-ledgers"),
    }
    assert found["/umbel"]["read_only"]
    assert found["/model"]["read_only"]
    assert found["/umbel/relay"] == {
        "type": "volume",
        "source": "nothing",
        "target": "/umbel/relay",
        "read_only": True,
    }


@pytest.mark.parametrize("site", SITES)
def test_the_register_of_ledgers_is_the_machines_whatever_the_project(site: str) -> None:
    for name in (f"trainer-{site}", f"site-{site}-admin"):
        volume = mounts(name)[str(MACHINE)]
        assert not volume.get("read_only")
        assert yaml.safe_load(TEXT)["volumes"][volume["source"]] == {
            "name": f"umbel-site-{site}-ledgers"
        }


def test_the_operators_two_processes_share_a_socket_and_no_more() -> None:
    port, rounds = mounts("port"), mounts("rounds")
    assert set(port) == {
        *("/umbel/server.toml", "/umbel/sites", "/umbel/tls/certificate.pem"),
        *("/umbel/ca/certificate.pem", "/umbel/tls/key.pem", "/run/umbel", "/var/lib/umbel"),
    }
    assert all(volume.get("read_only") for path, volume in port.items() if path == "/umbel/sites")
    assert rounds["/umbel"]["read_only"]
    assert {rounds["/umbel/ca"]["source"], rounds["/umbel/tls"]["source"]} == {"nothing"}
    assert port["/var/lib/umbel"]["source"] != rounds["/var/lib/umbel"]["source"]
    shared = {v["source"] for v in port.values()} & {v["source"] for v in rounds.values()}
    assert shared == {"operator-socket"}


def test_nothing_starts_before_its_files_were_looked_at() -> None:
    for name, service in SERVICES.items():
        if name.endswith(("-check", "-admin")):
            assert "depends_on" not in service
            assert service["restart"] == "no"
            continue
        (part,) = service["profiles"]
        expected = {f"{part}-check": {"condition": "service_completed_successfully"}}
        assert service["depends_on"] == expected
        assert SERVICES[f"{part}-check"]["profiles"] == [part]


def test_the_three_sites_differ_in_their_letter_only() -> None:
    parts = re.split(r"\n  # ---- site . -+\n", TEXT.split("\n# Only a relay")[0])[1:]
    texts = {
        re.sub(rf"(?<=site-|ayer-|iner-|elay-){site}\b", "X", part).replace(
            f"SITE_{site.upper()}", "SITE_X"
        )
        for site, part in zip(SITES, parts, strict=True)
    }
    assert len(texts) == 1


def test_every_process_says_how_it_is() -> None:
    """The trainer's and the relay's probes are in their images."""
    for name, socket in (
        ("port", "/run/umbel/carrier.sock"),
        ("rounds", "/var/lib/umbel/rounds.sock"),
    ):
        test = SERVICES[name]["healthcheck"]["test"]
        assert test == ["CMD", "python", "-P", "-m", "umbel_host.probe", f"unix:{socket}"]


def test_every_value_is_in_the_example_and_no_other() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT))
    example = (FOLDER / "env.example").read_text()
    given = re.findall(r"^(\w+)=.+$", example, re.MULTILINE)
    assert set(given) == {*used, "COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME"}
    # Each is explained right above it, or shares what is said with the line above.
    for block in example.strip().split("\n\n"):
        assert block.startswith("# ")
    assert not [line for line in example.splitlines() if re.match(r"\w*(KEY|SECRET|PASS)", line)]


def test_keys_are_files() -> None:
    secrets = yaml.safe_load(TEXT)["secrets"]
    assert len(secrets) == 2 + 2 * len(SITES)
    assert all(set(secret) == {"file"} for secret in secrets.values())


def test_what_people_put_beside_it_stays_out_of_the_repository() -> None:
    names = [".env", "operator/identity.pem", "site-a/data.jsonl", "site-c/x", "model/config.json"]
    paths = [f"deploy/compose/{name}" for name in names]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == paths


def engine() -> list[str] | None:
    """A compose that works here: the plugin of docker, or the program of its own."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, "version"], capture_output=True, check=False)
        if done.returncode == 0:
            return command
    return None


@pytest.mark.skipif(engine() is None, reason="no docker compose on this machine reads the file")
def test_compose_itself_takes_it(tmp_path: Path) -> None:
    for name in ("compose.yaml", "compose.gpu.yaml", "check"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copy(FOLDER / "env.example", tmp_path / ".env")
    for part in ("operator", "site-a", "site-b", "site-c"):
        for file in ("identity.pem", "tls/key.pem", "relay/key.pem"):
            (tmp_path / part / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part / file).touch()
    command = engine()
    assert command is not None

    def config(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    done = config("-f", "compose.yaml", "-f", "compose.gpu.yaml", "config")
    assert done.returncode == 0, done.stderr
    assert "network_mode: none" in done.stdout
    env = (tmp_path / ".env").read_text()
    (tmp_path / ".env").write_text(re.sub(r"UMBEL_MODEL=.*\n", "", env))
    done = config("-f", "compose.yaml", "config")
    assert done.returncode != 0
