"""`make gpu-check` without a GPU: what it writes and when it ends, and its parts in a tiny form."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import gpu

WORKER = """
import json, os, sys, time
path, parts = sys.argv[1], sys.argv[3:]
with os.fdopen(int(sys.argv[2]), "w", buffering=1) as messages:
    def tell(**message):
        messages.write(json.dumps(message) + "\\n")
    if path == "no device" or parts[0].startswith("gone="):
        tell(refused="there is none")
        sys.exit(2)
    tell(machine={"gpu": "none"})
    for part in parts:
        name = part.partition("=")[0]
        tell(begin=name)
        if name == "raises":
            tell(status="failed", error="ValueError: wrong")
            sys.exit(1)
        if name == "dies":
            os._exit(3)
        if name == "hangs":
            time.sleep(600)
        if name == "lacks":
            tell(status="not run: needs flwr")
            continue
        value = 2.0
        for _ in range(200 * (name == "looks")):
            value = len(json.load(open(path))["parts"])
            if value == 5:
                break
            time.sleep(0.05)
        target = 1.0 if name == "misses" else None
        holds = None if target is None else value <= target
        entry = {"value": value, "unit": "s", "target": target, "holds": holds}
        tell(figure=name, entry=entry)
        tell(status="done")
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    """A worker without PyTorch, whose parts end in every way."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [sys.executable, "-I", "-S", str(script), str(tmp_path / "gpu.json")]


def checked(
    path: Path, worker: list[str], *parts: str, **limits: float
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The exit code, how each part ended, and the figures."""
    code = gpu.check(path, "make gpu-check", worker, dict.fromkeys(parts, 0), **limits)
    written = json.loads(path.read_text())
    ends = {name: (end["status"], end.get("error")) for name, end in written["parts"].items()}
    return code, ends, written["figures"]


def test_every_part_is_written_when_it_ends_and_none_keeps_the_rest_from_running(
    tmp_path: Path, worker: list[str]
) -> None:
    path = tmp_path / "gpu.json"
    parts = ("good", "raises", "dies", "hangs", "lacks", "looks")
    code, ends, figures = checked(path, worker, *parts, part_limit=5.0)
    assert code == 1
    assert ends == {
        "good": ("done", None),
        "raises": ("failed", "ValueError: wrong"),
        "dies": ("failed", "the process ended: 3"),
        "hangs": ("failed", "it did not end within 5 s"),
        "lacks": ("not run: needs flwr", None),
        "looks": ("done", None),
    }
    # What was there while the last part ran.
    assert figures["looks"]["value"] == 5
    assert not list(tmp_path.glob(".*.partial"))


def test_the_exit_code_says_whether_a_bound_is_missed(tmp_path: Path, worker: list[str]) -> None:
    path = tmp_path / "gpu.json"
    assert checked(path, worker, "good")[0] == 0
    code, ends, figures = checked(path, worker, "good", "misses")
    assert (code, ends["misses"], figures["misses"]["holds"]) == (1, ("done", None), False)
    assert checked(path, worker, "good", "lacks")[0] == 0
    # Nothing was checked.
    assert checked(path, worker, "lacks")[0] == 1


def test_it_ends_within_its_limit_of_time(tmp_path: Path, worker: list[str]) -> None:
    began = time.monotonic()
    code, ends, _ = checked(tmp_path / "gpu.json", worker, "good", "hangs", "looks", limit=5.0)
    assert 5 <= time.monotonic() - began < 15
    assert code == 0
    assert ends["good"] == ("done", None)
    assert ends["hangs"] == ends["looks"] == (gpu.NO_TIME, None)


def test_without_a_device_it_says_so_and_writes_nothing(
    tmp_path: Path, worker: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.check(path, "", [*worker[:-1], "no device"], {"good": 0}) == gpu.NO_DEVICE
    assert not path.exists()
    assert capsys.readouterr().err == "gpu-check: there is none\n"
    assert gpu.main([str(path), "--device", "cpu"]) == gpu.NO_DEVICE
    assert not path.exists()
    # A device that disappears is another matter.
    code, ends, _ = checked(path, worker, "raises", "gone")
    assert (code, ends["gone"]) == (1, ("failed", "there is none"))
    with pytest.raises(RuntimeError, match=r"no GPU to check: PyTorch .*(finds no|without) CUDA"):
        gpu._machine("cuda:0")


def test_its_parts_run_on_a_pretended_device() -> None:
    parts = importlib.import_module("gpu_parts")
    assert list(parts.PARTS) == list(gpu.PARTS)
    figures: dict[str, Any] = {}
    for part in ("7b", "out_of_memory", "8k_tokens"):
        figures |= dict(parts.run(part, "pretend:0", tiny=True))
    assert figures["gpu_out_of_memory_records"]["value"] < 8
    assert figures["gpu_out_of_memory_difference"]["holds"]
    assert figures["gpu_records_7b"]["value"] == 2
    for name in ("gpu_dp_memory_ratio_7b", "gpu_dp_step_ratio_7b", "gpu_dp_8k_tokens_7b_peak_gb"):
        assert figures[name]["value"] > 0, name


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("device", "left_out"),
    [("cpu", {"out_of_memory"}), ("pretend:0", {"nf4", "federation"})],
)
def test_the_whole_check_in_its_tiny_form(tmp_path: Path, device: str, left_out: set[str]) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, str(path), "--tiny", "--device", device]
    assert subprocess.run(command, env=dict(os.environ), check=False).returncode == 0
    written = json.loads(path.read_text())
    assert {name for name, end in written["parts"].items() if end["status"] != "done"} == left_out
    assert all(end["status"] != "failed" for end in written["parts"].values())
    assert written["machine"]["torch"]
    assert written["figures"]["gpu_isolated"]["value"] == 1
