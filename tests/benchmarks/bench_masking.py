"""What secure aggregation costs a site: `python tests/benchmarks/bench_masking.py` prints JSON.

One thread, in processor time (not on the clock), so that other work on the machine counts as little
as it can. The measurements take turns, so that what is left of its disturbance meets all of them,
and each figure is the median over the turns.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from umbel_common.secagg.encoding import Encoding, encode
from umbel_common.secagg.masking import add_masks
from umbel_common.secagg.primitives import CHUNK_BYTES, Keystream

PARAMETERS = 8_400_000
PEERS = 10
TURNS = 15
MILLIONS = PARAMETERS / 1e6


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    encoding = Encoding(clip_range=1.0, step=1e-6, ring_bits=32, max_weight=1, sites=PEERS + 1)
    delta = np.random.default_rng(1).normal(0, 0.01, PARAMETERS).astype(np.float32)
    vector = np.zeros(PARAMETERS, dtype="<u4")
    keys = [os.urandom(32) for _ in range(PEERS + 1)]
    buffer = memoryview(bytearray(CHUNK_BYTES))

    def expand() -> None:
        keystream = Keystream(keys[0])
        for _ in range(4 * PARAMETERS // CHUNK_BYTES):
            keystream.fill(buffer)

    def mask() -> None:
        add_masks(vector, added=keys[: PEERS // 2], subtracted=keys[PEERS // 2 : PEERS])

    def prepare() -> None:
        masked = encode(delta, 1, encoding, os.urandom)
        # The self-mask and one mask a peer.
        add_masks(masked, added=keys[: PEERS // 2 + 1], subtracted=keys[PEERS // 2 + 1 :])

    aes, masking, client = medians([expand, mask, prepare])
    return {
        "masking_ms_per_mparam_peer": entry(1e3 * masking / MILLIONS / PEERS, "ms of CPU", 0.8),
        "aes_ctr_ms_per_mparam": entry(1e3 * aes / MILLIONS, "ms of CPU", None),
        "client_prepare_8m4_10_peers_s": entry(client, "s of CPU", 0.15),
    }


def medians(actions: list[Callable[[], None]]) -> list[float]:
    """Median processor seconds of each action, after one turn that warms up."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(1 + TURNS):
        for action, times in zip(actions, seconds, strict=True):
            start = time.process_time()
            action()
            times.append(time.process_time() - start)
    return [statistics.median(times[1:]) for times in seconds]


def entry(value: float, unit: str, target: float | None) -> dict[str, Any]:
    """A figure; it holds if it is at most its target."""
    holds = None if target is None else value <= target
    return {"value": round(value, 4), "unit": unit, "target": target, "holds": holds}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
