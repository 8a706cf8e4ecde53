"""deploy/compose/check: one clear line for whatever is wrong, before anything starts."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.testing

import umbel_client.cli.command
import umbel_server.cli.command

FOLDER = Path(__file__).parents[2] / "deploy" / "compose"
SERVER = {
    r'^state = ".*"$': 'state = "/var/lib/umbel"',
    r'^sites = ".*"$': 'sites = "sites/sites.json"',
    r'^# socket = ".*"$': 'socket = "/run/umbel/carrier.sock"',
}
CLIENT = {
    r'^state = ".*"$': 'state = "/var/lib/umbel"\nisolation = "required"',
    r'^path = "model"$': 'path = "/model"',
    r'^socket = ".*"$': 'socket = "/run/umbel/trainer.sock"',
}


def edit(path: Path, changes: dict[str, str]) -> None:
    text = path.read_text()
    for old, new in changes.items():
        text, count = re.subn(old, new, text, flags=re.MULTILINE)
        assert count == 1, (path, old)
    path.write_text(text)


def command(app: typer.Typer, *arguments: object) -> None:
    done = typer.testing.CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What somebody has who followed the documentation: an operator and one site."""
    shutil.copy(FOLDER / "check", tmp_path)
    text = (FOLDER / "env.example").read_text()
    (tmp_path / ".env").write_text(text.replace("site-a,site-b,site-c", "site-a"))
    operator, site = tmp_path / "operator", tmp_path / "site-a"
    command(
        umbel_server.cli.command.app,
        *("init", "--federation", "clinics", "--address", "operator:9443", "--folder", operator),
    )
    (operator / "sites").mkdir()
    edit(operator / "server.toml", SERVER)
    command(
        umbel_client.cli.command.app,
        *("init", "--site", "north", "--federation", "clinics", "--folder", site),
    )
    edit(site / "client.toml", CLIENT)
    # What join and approve make, and the model: the check sees that they are there.
    for name in ("relay/certificate.pem", "relay/server-ca.pem", "roster.json"):
        (site / name).touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    return tmp_path


def check(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["/bin/sh", "./check", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_what_is_right_passes(folder: Path) -> None:
    done = check(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "nothing wrong: docker compose up --detach\n"


ENV: dict[str, tuple[str, str, str]] = {
    "a port that is none": ("UMBEL_PORT=9443", "UMBEL_PORT=94430", "UMBEL_PORT: found 94430,"),
    "a port in words": ("UMBEL_PORT=9443", "UMBEL_PORT=https", "UMBEL_PORT: found https,"),
    "another port": ("UMBEL_PORT=9443", "UMBEL_PORT=9444", "found 9444, accepted: 9443"),
    "no value": ("UMBEL_PORT=9443", "UMBEL_PORT=", "UMBEL_PORT: found nothing,"),
    "no line": ("UMBEL_MODEL=./model", "", "UMBEL_MODEL: found nothing,"),
    "a wrong name": ("UMBEL_PORT=9443", "UMBEL_PROT=9443", "UMBEL_PROT: found an unknown name,"),
    "a name twice": (
        "UMBEL_PORT=9443",
        "UMBEL_PORT=9443\nUMBEL_PORT=1",
        "UMBEL_PORT: found 2 lines,",
    ),
    "no name": ("UMBEL_PORT=9443", "9443", "line: found 9443,"),
    "a volume": (
        "=./operator",
        "=operator",
        "UMBEL_OPERATOR: found operator, accepted: a path that",
    ),
    "a folder that is not there": ("=./site-a", "=./nowhere", "./nowhere: path: found nothing,"),
    "an unknown part": ("operator,site-a", "operator,site-x", "COMPOSE_PROFILES: found site-x,"),
    "memory in words": ("=8g", "=plenty", "UMBEL_TRAINER_MEMORY: found plenty,"),
    "memory without unit": ("=8g", "=8", "UMBEL_TRAINER_MEMORY: found 8,"),
    "a remark behind": ("=8g", "=8g # enough", "UMBEL_TRAINER_MEMORY: found 8g # enough,"),
}


@pytest.mark.parametrize("name", ENV)
def test_a_wrong_value_is_one_line(folder: Path, name: str) -> None:
    old, new, said = ENV[name]
    text = (folder / ".env").read_text()
    assert text.count(old) == 1
    (folder / ".env").write_text(text.replace(old, new))
    refused(check(folder), said)


def refused(done: "subprocess.CompletedProcess[str]", said: str) -> None:
    assert (done.returncode, done.stdout) == (10, "")
    assert said in done.stderr
    assert ", accepted: " in done.stderr
    assert "; what to do: " in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_file_at_all(folder: Path) -> None:
    (folder / ".env").unlink()
    refused(check(folder), ".env: path: found nothing,")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no key": (
        lambda at: (at / "operator/identity.pem").unlink(),
        "identity.pem: path: found nothing",
    ),
    "an open key": (
        lambda at: (at / "operator/tls/key.pem").chmod(0o640),
        "key.pem: mode: found 640,",
    ),
    "an open key of a site": (
        lambda at: (at / "site-a/identity.pem").chmod(0o604),
        "site-a/identity.pem: mode: found 604,",
    ),
    "an operator that was not edited": (
        lambda at: edit(at / "operator/server.toml", {r'^socket = ".*"$': ""}),
        'server.toml: socket: found nothing, accepted: "/run/umbel/carrier.sock"',
    ),
    "a trainer that would run with a network": (
        lambda at: edit(
            at / "site-a/client.toml", {r'^isolation = ".*"$': 'isolation = "preferred"'}
        ),
        'client.toml: isolation: found preferred, accepted: "required"',
    ),
    "a field of another table": (
        lambda at: edit(
            at / "site-a/client.toml",
            {r'^isolation = ".*"$': "", r"^\[relay\]$": '[relay]\nisolation = "required"'},
        ),
        "client.toml: isolation: found nothing,",
    ),
    "a socket elsewhere": (
        lambda at: edit(at / "site-a/client.toml", {r'^socket = ".*"$': 'socket = "run/a.sock"'}),
        "client.toml: relay.socket: found run/a.sock,",
    ),
    "no kit": (lambda at: (at / "site-a/relay/certificate.pem").unlink(), "umbel-client join KIT"),
    "no roster": (lambda at: (at / "site-a/roster.json").unlink(), "umbel-client roster approve"),
    "no model": (lambda at: (at / "model/config.json").unlink(), "put the base model there"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_one_line(folder: Path, name: str) -> None:
    spoil, said = FILES[name]
    spoil(folder)
    refused(check(folder), said)


def test_a_part_that_is_not_for_this_machine_is_not_looked_at(folder: Path) -> None:
    shutil.rmtree(folder / "operator")
    text = (folder / ".env").read_text()
    (folder / ".env").write_text(text.replace("operator,site-a", "site-a"))
    assert check(folder).returncode == 0


def test_a_wrong_command_line(folder: Path) -> None:
    done = check(folder, "everything")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
