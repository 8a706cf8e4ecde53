"""Whole runs, as their user starts them: the console script in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Simulate = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def simulate() -> Simulate:
    """Runs `umbel-simulate` with these arguments and returns what it printed and its exit code."""
    script = Path(sys.executable).with_name("umbel-simulate")

    def run(*arguments: object, timeout: float = 280) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [script, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "COLUMNS": "120"},
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def smoke_run(simulate: Simulate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run of the scenario `smoke`."""
    runs = tmp_path_factory.mktemp("runs")
    result = simulate("run", "smoke", "--runs", runs, "--name", "smoke")
    assert result.returncode == 0, result.stderr
    return runs / "smoke"
