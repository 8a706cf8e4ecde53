"""`umbel-server calibrate` as an operator gives it: sizes from the roster, a table, and a draft."""

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from client.planning.test_calibrating import DRAFT
from support import warm_python
from support.enrolling import Enrolling, give_command
from typer.testing import CliRunner

import umbel_server.cli.calibrate
import umbel_server.cli.command
from umbel_client.planning.draft import read_plan
from umbel_common.errors import ConfigError, IdentityError, StorageError
from umbel_common.plans.plan import DistributedPrivacy
from umbel_common.plans.requests import Bought, Calibration, CalibrationRequest
from umbel_common.plans.server_optimizer import ServerSgd
from umbel_host.processes.supervisor import belong_to_parent


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Enrolling:
    """An operator with three sites, of which two have a public size."""
    made = Enrolling(tmp_path_factory.mktemp("calibrate"))
    for site in ("east", "north", "south"):
        made.ask(site)
        made.add(site)
    made.server("sites", "size", "east", "--public-size", "2000")
    made.server("sites", "size", "north", "--public-size", "3000")
    (made.operator / "draft.toml").write_text(DRAFT.format(model="model"))
    return made


FOUND = Calibration(
    draft="the draft\n",
    mode="distributed",
    accounted=False,
    sites=3,
    records=9000,
    rounds=30,
    batch=900,
    rows=(Bought(3.0, "distributed", True, 0, 2, 30, 1_500_000, 900),),
    policy={"max_rounds": 30.0},
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CalibrationRequest]]:
    """The requests to the process that proposes, which answers always the same."""
    requests: list[CalibrationRequest] = []

    def proposed(python: str, request: CalibrationRequest) -> Calibration:
        assert python == sys.executable
        requests.append(request)
        return FOUND

    monkeypatch.setattr(umbel_server.cli.calibrate, "_proposed", proposed)
    return requests  # type: ignore[return-value]  # a fixture


def test_the_sizes_are_the_rosters_or_those_that_are_given(
    operator: Enrolling, asked: list[CalibrationRequest]
) -> None:
    words = ("calibrate", "draft.toml", "--out")
    shown = operator.server(*words, "a.toml", "--public-size", "south=4000")
    assert asked[-1].sizes == (2000, 3000, 4000)
    assert asked[-1].epsilons == (1.0, 3.0, 8.0)
    assert (operator.operator / "a.toml").read_text() == FOUND.draft
    assert re.search(r"3 +distributed +0 +2 .* 1\.5 MB +900 B +proposed", shown)
    assert "max_rounds  30" in shown
    assert "evaluation.python" in shown
    assert "max_clip_range leaves the noise out" in shown
    both = ("--public-size", "south=4000", "--public-size", "east=7", "--epsilon", "2")
    operator.server(*words, "b.toml", *both, "--dropouts", "0", "--colluding", "0")
    assert (asked[-1].sizes, asked[-1].epsilons) == ((7, 3000, 4000), (2.0,))
    assert (asked[-1].dropouts, asked[-1].colluding, asked[-1].mode) == (0, 0, None)
    # No roster is read where the sites are only numbers.
    numbers = ("--sites", "4", "--records", "1002", "--config", "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        operator.server(*words, "c.toml", *numbers)
    operator.server(*words, "c.toml", *numbers[:4], "--mode", "local")
    assert (asked[-1].sizes, asked[-1].mode) == ((251, 251, 250, 250), "local")


def test_without_a_search_the_rules_are_said_to_be_alone(
    operator: Enrolling, asked: list[CalibrationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(umbel_server.cli.calibrate, "_can_search", lambda: False)
    words = ("calibrate", "draft.toml", "--sites", "3", "--records", "9000", "--data", "p.jsonl")
    assert "are those of the rules" in operator.server(*words, "--out", "d.toml")
    document = json.loads(operator.server(*words, "--out", "e.toml", "--json"))
    assert (document["draft"], document["searched"], document["mode"]) == (
        *("e.toml", False),
        "distributed",
    )
    assert document["rows"][0]["honest"] == 2
    assert (operator.operator / "e.toml").read_text() == FOUND.draft


@pytest.mark.parametrize(
    ("words", "kind", "found"),
    [
        ((), ConfigError, "south"),
        (("--public-size", "south=5", "--public-size", "west=5"), IdentityError, "west"),
        (("--out", "draft.toml"), StorageError, None),
        (("--out", "../new.toml"), ConfigError, "../new.toml"),
    ],
)
def test_what_is_missing_or_unknown_is_named(
    operator: Enrolling,
    asked: list[CalibrationRequest],
    words: tuple[str, ...],
    kind: type[Exception],
    found: str | None,
) -> None:
    out = () if "--out" in words else ("--out", "new.toml")
    with pytest.raises(kind) as caught:
        operator.server("calibrate", "draft.toml", *out, *words)
    assert found in (None, str(getattr(caught.value, "found", None)))
    assert not asked


@pytest.mark.parametrize(
    "words",
    [
        ("--public-size", "south"),
        ("--public-size", "south=0"),
        ("--public-size", "south=many"),
        ("--sites", "3"),
        ("--records", "300"),
        ("--sites", "3", "--records", "2"),
        ("--sites", "3", "--records", "300", "--public-size", "south=3"),
        ("--sites", "3", "--records", "300", "--mode", "central"),
        ("--sites", "3", "--records", "300", "--epsilon", "0"),
    ],
)
def test_a_wrong_option_is_a_mistake_of_the_command_line(
    operator: Enrolling,
    asked: list[CalibrationRequest],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(operator.operator)
    app = umbel_server.cli.command.app
    done = CliRunner().invoke(app, ["calibrate", "draft.toml", "--out", "new.toml", *words])
    assert (done.exit_code, asked) == (2, [])
    assert not (operator.operator / "new.toml").exists()


def test_real_processes_propose_search_and_write_a_draft(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sites without a roster, and public records that are told apart by one word."""

    def run(command: list[str], *, input: bytes, **how: Any) -> object:
        assert (how["preexec_fn"], how["check"]) == (belong_to_parent, False)
        done = warm_python.run(*command[1:], input=input.decode())
        assert done.returncode == 0, done.stderr
        if how["stdout"] is None:
            print(done.stdout)
        return SimpleNamespace(returncode=0, stdout=done.stdout.encode())

    subprocess = SimpleNamespace(run=run, PIPE=-1, DEVNULL=-3)
    monkeypatch.setattr(umbel_server.cli.calibrate, "subprocess", subprocess)
    (tmp_path / "draft.toml").write_text(DRAFT.format(model="model"))
    (tmp_path / "model").symlink_to(tiny_model)
    random = np.random.default_rng(3)
    rows = [
        {"text": f"w{word % 30} w3{number % 2}", "label": "ab"[number % 2]}
        for number, word in enumerate(random.integers(0, 30, 60))
    ]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("calibrate", "draft.toml", "--out", "new.toml", "--sites", "3", "--records", "1200")
    search = ("--data", "public.jsonl", "--trials", "2", "--rounds", "3", "--epsilon", "3")
    shown = give_command(umbel_server.cli.command.app, tmp_path, *words, *search)
    assert re.search(r"^3 +distributed +0 +2 +\d.* proposed", shown, re.MULTILINE)
    assert re.search(r"^1 +.* best", shown, re.MULTILINE) or re.search(
        r"^0 +.*the draft as it is, best", shown, re.MULTILINE
    )
    plan = read_plan(tmp_path / "new.toml")
    assert isinstance(plan.privacy, DistributedPrivacy)
    assert isinstance(plan.server, ServerSgd)
    assert plan.training.expected_batch_size == 120
    written = tomllib.loads((tmp_path / "new.toml").read_text())
    assert written["server"]["head_learning_rate"] == plan.server.head_learning_rate
    assert "# Proposed for 3 sites" in (tmp_path / "new.toml").read_text()
    # Nothing is left of the search, and nothing is written over.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"draft.toml", "model", "new.toml", "public.jsonl"}
    with pytest.raises(StorageError):
        give_command(umbel_server.cli.command.app, tmp_path, *words)
