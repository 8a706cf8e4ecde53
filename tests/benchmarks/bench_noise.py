"""What noise costs a step on a GPU: `python tests/benchmarks/bench_noise.py` prints JSON.

40 million numbers are trained, as rank 16 has in all linear layers of a model with 7 billion. In
place of a GPU that computes gradients, a step sleeps for one second. The share is what the whole
step takes longer than one that adds no noise, by the wall clock: the medians of some steps of each
kind, one after the other in one process.

On a GPU the host only has the noise copied and added, and does not wait for it: the sum is on a
pretended device, which does its work after the step is timed. On a CPU the host adds it, too.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_masking import entry

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import pretended

from umbel_client.dpsgd.private_step import PrivateOptimizer
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.privacy.noise import NoiseSource

SIZE = 40_000_000
STEPS = 7
GPU_SECONDS = 1.0
EXPECTED_BATCH_SIZE = 64.0


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    torch.set_num_threads(1)
    began = time.process_time()
    NoiseSource(os.urandom).normal(SIZE)
    drawing = time.process_time() - began
    with pretended.late():
        on_device = share(pretended.DEVICES[0])
    return {
        "noise_share_of_step_40m": entry(on_device, "of a step of 1 s", 0.03),
        "noise_share_of_step_40m_cpu": entry(share("cpu"), "of a step of 1 s", None),
        "noise_cpu_s_40m": entry(drawing, "s of CPU", None),
    }


def share(device: str) -> float:
    """The share of a step that noise takes, if the sum is on this device."""
    parameter = torch.nn.Parameter(torch.zeros(SIZE, device=device))
    descent = torch.optim.SGD([parameter], lr=1e-3, foreach=False)
    with StepNoise(os.urandom, [parameter], steps=STEPS) as noise:
        private = PrivateOptimizer(
            descent,
            noise,
            noise_multiplier=1.0,
            clip_norm=1.0,
            expected_batch_size=EXPECTED_BATCH_SIZE,
        )
        total = torch.zeros(SIZE, device=device)

        def plain() -> None:
            """What is left of a step without the noise."""
            assert parameter.grad is not None
            parameter.grad.copy_(total).div_(EXPECTED_BATCH_SIZE)
            descent.step()
            total.zero_()

        # The next step's noise is drawn within each noisy step, and not within a plain one.
        noisy = statistics.median([_seconds(private.step) for _ in range(STEPS)])
        return 1 - statistics.median([_seconds(plain) for _ in range(STEPS)]) / noisy


def _seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    time.sleep(GPU_SECONDS)
    step()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
