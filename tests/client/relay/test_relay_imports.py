"""The extra `relay` is enough for the process with the network, and for a site's enrolment."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "peft", "opacus", "datasets", "safetensors")


def blocked(*modules: str) -> "subprocess.CompletedProcess[str]":
    """Imports modules where only the extra `relay` is installed: each of HEAVY fails."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in HEAVY)]
    lines += [f"import {module}" for module in modules]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", ["umbel_client.relay.__main__", "umbel_client.cli.__main__"])
def test_a_relay_needs_nothing_that_trains(module: str) -> None:
    done = blocked(module)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    ["umbel_client.cli.doctor", "umbel_client.trainer.service", "umbel_simulations.runs.verify"],
)
def test_what_looks_at_files_starts_without_what_trains(module: str) -> None:
    """PyTorch and Transformers take seconds to load."""
    source = f"import {module}, sys; sys.exit(bool({{*{HEAVY!r}}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


def test_a_trainer_needs_it() -> None:
    assert "torch" in blocked("umbel_client.trainer.handler").stderr


def test_the_extra_names_nothing_of_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert not [line for line in extras["relay"] if line.startswith(HEAVY)]
    assert "umbel[relay]" in extras["client"]
