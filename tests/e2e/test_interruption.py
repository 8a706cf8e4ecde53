"""Runs that are killed or interrupted, and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.waiting import HANGING

from umbel_client.data.records import load_records
from umbel_client.ledger.ledger import Ledger
from umbel_client.site.config import load_config
from umbel_common.canonical import decode_canonical
from umbel_common.plans.plan import TrainingPlan
from umbel_common.trust.identity import Signed

Simulate = Callable[..., Any]


def start(runs: Path) -> "subprocess.Popen[str]":
    script = Path(sys.executable).with_name("umbel-simulate")
    return subprocess.Popen(
        [script, "run", "smoke", "--runs", runs, "--name", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )


def wait_for(path: Path, text: str, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + HANGING
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("stop", "moment"),
    [
        pytest.param(
            signal.SIGKILL, "round-released", id="killed after a release", marks=pytest.mark.soak
        ),
        pytest.param(
            signal.SIGINT, '"stage":"mask"', id="interrupted in mid-round", marks=pytest.mark.soak
        ),
    ],
)
def test_a_run_that_was_stopped_resumes_and_charges_no_round_twice(
    simulate: Simulate, tmp_path: Path, stop: signal.Signals, moment: str
) -> None:
    process = start(tmp_path)
    folder = tmp_path / "run"
    wait_for(folder / "metrics.jsonl", moment, process)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=HANGING)
    if stop is signal.SIGINT:
        assert process.returncode == 130
        assert "the same command resumes" in stderr
        assert "Traceback" not in stderr
    assert not (folder / "summary.json").exists()

    result = simulate("run", "smoke", "--runs", tmp_path, "--name", "run")
    assert result.returncode == 0, result.stderr
    assert simulate("verify", folder).returncode == 0
    plan = decode_canonical(
        decode_canonical((folder / "plan.msgpack").read_bytes(), Signed).statement, TrainingPlan
    )
    for site in json.loads((folder / "summary.json").read_text())["sites"]:
        config = load_config(folder / "sites" / site["name"] / "client.toml")
        records = load_records(Path(config.data.path), plan.task)
        with Ledger.open(Path(config.state) / "ledger.sqlite", records.digest()) as ledger:
            assert [entry.round for entry in ledger.history()] == [1, 2]
            assert ledger.spent(1e-5) <= 8.0
