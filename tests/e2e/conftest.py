"""Whole runs, as their user starts them: the console script in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import warm_python

Simulate = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def simulate() -> Simulate:
    """Runs `umbel-simulate` with these arguments and returns what it printed and its exit code."""
    script = Path(sys.executable).with_name("umbel-simulate")

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        return warm_python.run(script, *arguments, env={**os.environ, "COLUMNS": "120"})

    return run


@pytest.fixture(scope="session")
def smoke_run(simulate: Simulate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run of the scenario `smoke`."""
    runs = tmp_path_factory.mktemp("runs")
    result = simulate("run", "smoke", "--runs", runs, "--name", "smoke")
    assert result.returncode == 0, result.stderr
    return runs / "smoke"


TINY_SCENARIO = """\
name = "tiny"
description = "seconds, for tests"
seed = 3
baselines = []

[model]
path = "{model}"
name = "tiny"

[data]
source = "files"
train = "{folder}/train.jsonl"
test = "{folder}/test.jsonl"

[sites]
count = 3
partition = "iid"

[task]
task = "classification"
max_tokens = 16

[lora]
rank = 2
alpha = 4
target_modules = ["query", "value"]
method = "both"

[training]
rounds = 2
local_steps = 1
expected_batch_size = 80
adapter_learning_rate = 1e-2
head_learning_rate = 1e-1

[privacy]
mode = "local"
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0

[aggregation]
threshold = 3
"""


class TinyScenario:
    """A scenario file over generated data that a test may spoil, and runs of it.

    Each batch has all 80 records of a site: the accountant answers that at once.
    """

    def __init__(self, folder: Path, model: Path, simulate: Simulate) -> None:
        self.folder = folder
        self.simulate = simulate
        self.path = folder / "tiny.toml"
        self.path.write_text(TINY_SCENARIO.format(model=model, folder=folder))
        self.write_data("train", 240, seed=1)
        self.write_data("test", 40, seed=2)

    def write_data(self, name: str, size: int, seed: int) -> None:
        """Label a has low words, label b has high ones."""
        random = np.random.default_rng(seed)
        rows = []
        for number in range(size):
            low = number % 2 == 0
            words = random.integers(0, 17, 6) if low else random.integers(18, 35, 6)
            text = " ".join(f"w{word}" for word in words)
            rows.append(json.dumps({"text": text, "label": "a" if low else "b", "ward": "x"}))
        (self.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")

    def change(self, old: str, new: str) -> None:
        """Replaces a text that is in the scenario file."""
        text = self.path.read_text()
        assert old in text
        self.path.write_text(text.replace(old, new))

    def run(self, *options: object) -> "subprocess.CompletedProcess[str]":
        """Runs the scenario under the name `run`."""
        return self.simulate(
            "run", self.path, "--runs", self.folder / "runs", "--name", "run", *options
        )

    @property
    def run_folder(self) -> Path:
        """Where `run` writes."""
        return self.folder / "runs" / "run"


@pytest.fixture
def tiny(tmp_path: Path, tiny_model: Path, simulate: Simulate) -> TinyScenario:
    """A scenario that runs in seconds."""
    return TinyScenario(tmp_path, tiny_model, simulate)
