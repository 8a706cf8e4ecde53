"""What a long record costs a private step: `python tests/benchmarks/bench_long_context.py` prints
JSON.

One record of 8,192 tokens on a small random Llama on the CPU, with and without gradient
checkpointing. Each figure is from a fresh process, which takes one step. Seconds: processor time of
the step, one thread. Memory: by how far the peak of the resident set (VmHWM) rises above what the
process had with the model built (VmRSS).
"""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_masking import entry
from gpu_models import Device, PrivateSteps, Shape, adapted, random_base

LLAMA = Shape(
    "llama",
    layers=4,
    width=128,
    inner=352,
    heads=2,
    key_value_heads=1,
    vocabulary=1000,
    tokens=8192,
)


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; there is no target."""
    figures = {}
    for name, given in (("dp_step_8k_tokens", "0"), ("dp_step_8k_tokens_checkpointing", "1")):
        # What is freed goes back to the system at once: the resident set is what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
        command = [sys.executable, __file__, given]
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
        figures[f"{name}_s"] = entry(seconds, "s of CPU", None)
        figures[f"{name}_mb"] = entry(peak / 1e6, "MB", None)
    return figures


def one_step(*, checkpointing: bool) -> tuple[float, int]:
    """What a process of `measure` does: seconds of a step, and bytes at the peak."""
    torch.set_num_threads(1)
    device = Device("cpu")
    base = random_base(LLAMA, device, torch.float32)
    model = adapted(LLAMA, base, precision="float32", checkpointing=checkpointing)
    with ExitStack() as stack:
        kind = PrivateSteps(model, device, stack)
        kind.enter()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        began = time.process_time()
        kind.step(1)
        kind.leave()
        return time.process_time() - began, _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one_step(checkpointing=sys.argv[1] == "1")))
    else:
        print(json.dumps(measure(), indent=2))
