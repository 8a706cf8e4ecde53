"""Bad input gives one clear error and its exit code, and leaves nothing half-written."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umbel_simulations.cli.command import run_command


def last_lines(tiny: Any, name: str, row: dict[str, object]) -> None:
    path = tiny.folder / f"{name}.jsonl"
    path.write_text(path.read_text() + json.dumps(row) + "\n")


CASES: dict[str, tuple[Callable[[Any], None], int, list[str]]] = {
    "an unknown field": (
        lambda tiny: tiny.change("local_steps = 1", "local_stepps = 1"),
        10,
        ["tiny.toml", "training.local_stepps", "local_steps"],
    ),
    "a wrong type": (
        lambda tiny: tiny.change("rounds = 2", 'rounds = "two"'),
        10,
        ["tiny.toml", "training.rounds", "two"],
    ),
    "no TOML": (lambda tiny: tiny.path.write_text("name = "), 10, ["tiny.toml"]),
    "a missing data file": (
        lambda tiny: (tiny.folder / "train.jsonl").unlink(),
        11,
        ["train.jsonl"],
    ),
    "a row that is no JSON": (
        lambda tiny: (tiny.folder / "train.jsonl").write_text("{broken\n"),
        11,
        ["train.jsonl", "row 1"],
    ),
    "an empty text": (
        lambda tiny: last_lines(tiny, "train", {"text": " ", "label": "a"}),
        11,
        ["train.jsonl", "row 241"],
    ),
    "a test label that training never saw": (
        lambda tiny: last_lines(tiny, "test", {"text": "w1", "label": "new"}),
        11,
        ["test.jsonl", "row 41", "new", "a, b"],
    ),
    "a site without records": (
        lambda tiny: tiny.change('partition = "iid"', 'partition = "column"\ncolumn = "ward"'),
        11,
        ["hospital-", "records"],
    ),
    "a site with fewer records than the expected batch": (
        lambda tiny: tiny.change("expected_batch_size = 80", "expected_batch_size = 100"),
        11,
        ["hospital-a", "80 records", "at least 100"],
    ),
    "a model folder that is not there": (
        lambda tiny: tiny.path.write_text(
            re.sub(r'path = ".*"', 'path = "nowhere"', tiny.path.read_text())
        ),
        12,
        ["nowhere"],
    ),
    "a target module that the model lacks": (
        lambda tiny: tiny.change('["query", "value"]', '["q_proj"]'),
        12,
        ["q_proj", "query"],
    ),
    "a sum that could wrap": (
        lambda tiny: tiny.change("threshold = 3", "threshold = 3\nstep = 1e-9"),
        13,
        ["aggregation.step", "wrap"],
    ),
    "a delta too large for the records": (
        lambda tiny: tiny.change("delta = 1e-4", "delta = 0.1"),
        30,
        ["privacy.delta", "80 records"],
    ),
    "an epsilon that cannot be reached": (
        lambda tiny: tiny.change("epsilon = 8.0", "epsilon = 1e-9"),
        32,
        ["privacy.epsilon", "1e-09"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_error_and_leaves_nothing(
    tiny: Any, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console script's own function, in this process: each new one takes seconds to start."""
    spoil, code, words = CASES[case]
    spoil(tiny)
    command = ["umbel-simulate", "run", tiny.path, "--runs", tiny.folder / "runs", "--name", "run"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    ended = run_command()
    said = capsys.readouterr().err
    assert ended == code, said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not tiny.run_folder.exists()


def test_a_scenario_that_does_not_exist_names_those_that_do(simulate: Any) -> None:
    result = simulate("run", "nothing-like-this")
    assert result.returncode == 10
    assert "quickstart" in result.stderr


def test_a_wrong_option_is_a_usage_error(simulate: Any) -> None:
    assert simulate("run", "--no-such-option").returncode == 2
    assert simulate("run", "smoke", "--sites", "1").returncode == 2


def test_a_folder_that_is_no_run_is_not_written_into(tiny: Any) -> None:
    tiny.run_folder.mkdir(parents=True)
    (tiny.run_folder / "thesis.txt").write_text("precious")
    assert tiny.run().returncode == 51
    assert [path.name for path in tiny.run_folder.iterdir()] == ["thesis.txt"]


def test_verify_of_something_else_is_a_verification_error(simulate: Any, tmp_path: Path) -> None:
    result = simulate("verify", tmp_path / "nothing")
    assert result.returncode == 52
    assert "there is no such run" in result.stderr
