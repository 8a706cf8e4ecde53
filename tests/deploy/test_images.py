"""The Dockerfiles: what they promise, and, for want of an engine in CI, their steps carried out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deploy.dockerfile import ROOT, Replay, allowed, patterns, read

FILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
ROLES = {
    "server.Dockerfile": ("server", "umbel_server", ("umbel_client", "umbel_simulations")),
    "relay.Dockerfile": ("relay", "umbel_client", ("umbel_server", "umbel_simulations")),
    "trainer-cpu.Dockerfile": ("client-cpu", "umbel_client", ("umbel_server", "umbel_simulations")),
    "trainer-cuda.Dockerfile": ("client", "umbel_client", ("umbel_server", "umbel_simulations")),
}
HEAVY = ("torch", "transformers", "peft", "opacus", "datasets")
named = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def test_there_is_one_for_each_role() -> None:
    assert {path.name for path in FILES} == set(ROLES)


@named
def test_hadolint_finds_nothing(path: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@named
def test_nothing_runs_as_root_and_a_probe_is_asked(path: Path) -> None:
    _, stages = read(path)
    last = stages[-1]
    (user,) = last.texts("USER")
    assert user == "10001:10000"
    assert last.steps[-1].name == "CMD"
    (probe,) = last.texts("HEALTHCHECK")
    assert '"umbel_host.probe", "unix:/run/umbel/' in probe
    (labels,) = last.texts("LABEL")
    for label in ("title", "description", "version", "revision", "licenses", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels


@named
def test_every_package_comes_by_its_hash(path: Path) -> None:
    _, stages = read(path)
    lock = f"deploy/requirements/{ROLES[path.name][0]}.txt"
    commands = [text for stage in stages for text in stage.texts("RUN")]
    installs = [
        part
        for text in commands
        for part in text.split("&&")
        if "pip install" in " ".join(part.split())
    ]
    assert len(installs) == 3
    for command in installs:
        assert "--require-hashes" in command or "--no-index --no-deps" in command
    assert any(lock in command for command in installs)
    assert not any(stage.texts("ADD") for stage in stages)
    assert "pip" not in " ".join(stages[-1].texts("RUN"))


@named
def test_python_finds_no_module_in_the_folder_that_it_works_in(path: Path) -> None:
    _, stages = read(path)
    assert "PYTHONSAFEPATH=1" in " ".join(stages[-1].texts("ENV")).split()


@named
def test_all_stages_have_the_base_that_was_given(path: Path) -> None:
    head, stages = read(path)
    assert [step.text for step in head] == ["BASE=docker.io/library/python:3.11-slim-bookworm"]
    assert [stage.base for stage in stages] == ["${BASE} AS build", "${BASE}"]


@named
@pytest.mark.parametrize(
    ("version", "base", "code"),
    [
        ("unreleased", "python:3.11-slim", 0),
        ("0.1.0", "python:3.11-slim", 1),
        ("0.1.0", "python@sha256:" + "0" * 64, 0),
    ],
)
def test_a_release_takes_its_base_by_digest(path: Path, version: str, base: str, code: int) -> None:
    _, stages = read(path)
    check = stages[0].texts("RUN")[0]
    done = subprocess.run(
        ["/bin/sh", "-c", check],
        env={"VERSION": version, "BASE": base},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert done.stderr.count("\n") == code
    if code:
        assert "BASE: found python:3.11-slim, accepted for release 0.1.0" in done.stderr


def test_the_context_holds_what_is_copied_and_nothing_private() -> None:
    lines = patterns()
    for path in (
        "deploy/compose/.env",
        "deploy/compose/operator/identity.pem",
        "deploy/compose/site-a/data.jsonl",
        "federation/operator/ca/key.pem",
        "runs/quickstart/report.html",
        ".git/config",
        ".venv/bin/python",
        "tests/conftest.py",
        "common/umbel_host/__pycache__/keys.cpython-311.pyc",
        "identity.pem",
    ):
        assert not allowed(path, lines), path
    for path in (
        "pyproject.toml",
        "server/umbel_server/cli/command.py",
        "deploy/requirements/relay.txt",
    ):
        assert allowed(path, lines), path


def python(replay: Replay, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [replay.installed / "bin" / "python", *arguments],
        env=environment,
        cwd=replay.installed,
        capture_output=True,
        text=True,
        check=False,
    )


def carried_out(name: str, folder: Path, **arguments: str) -> Replay:
    """The build stage of a Dockerfile, and what it must not have brought."""
    replay = Replay(ROOT / "deploy" / "docker" / name, folder, arguments)
    replay.run()
    _, package, absent = ROLES[name]
    for module in absent:
        assert python(replay, "-c", f"import {module}").returncode == 1, module
    assert python(replay, "-c", f"import {package}.cli").returncode == 0
    assert python(replay, "-m", "pip").returncode == 1
    done = python(replay, "-P", "-m", "umbel_host.probe", "unix:/nowhere.sock")
    assert (done.returncode, done.stderr.count("\n")) == (44, 1)
    return replay


@pytest.mark.soak  # all packages of a role, by hash, into a folder of its own
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("server.Dockerfile", "umbel_server.port_process"),
        ("server.Dockerfile", "umbel_server.rounds_process"),
        ("relay.Dockerfile", "umbel_client.relay"),
    ],
    ids=["port", "rounds", "relay"],
)
def test_the_steps_bring_what_runs_and_no_torch(
    name: str, module: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    replay = built(name, tmp_path_factory)
    for heavy in HEAVY:
        assert python(replay, "-c", f"import {heavy}").returncode == 1, heavy
    done = python(replay, "-P", "-m", module, str(tmp_path / "none.toml"))
    assert done.returncode == 10, done.stderr
    assert "a configuration file cannot be read" in done.stderr


_BUILT: dict[str, Replay] = {}


def built(name: str, folders: pytest.TempPathFactory) -> Replay:
    """Each is built once for the tests of this file."""
    if name not in _BUILT:
        _BUILT[name] = carried_out(name, folders.mktemp("image"))
    return _BUILT[name]


@pytest.mark.soak  # two gigabytes of PyTorch are downloaded and unpacked
@pytest.mark.timeout(3600)
def test_the_steps_of_the_trainer_on_the_cpu_train(tmp_path: Path) -> None:
    given = {"TORCH_WHEELS": os.environ["TORCH_CPU"]} if "TORCH_CPU" in os.environ else {}
    replay = carried_out("trainer-cpu.Dockerfile", tmp_path, **given)
    done = python(
        replay, "-c", "import torch; print(torch.cuda.is_available(), torch.ones(2).sum())"
    )
    assert done.stdout == "False tensor(2.)\n", done.stderr
    done = python(replay, "-P", "-m", "umbel_client.trainer_process", str(tmp_path / "none.toml"))
    assert done.returncode == 10, done.stderr
