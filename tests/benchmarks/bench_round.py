"""How long secure rounds take beyond their training: `python tests/benchmarks/bench_round.py`.

Three sites on this machine, and then ten, each a relay and a trainer, the process with the port,
and this process in place of the job's. The model is tiny, so nearly all of a round is carrying: its
sites prepared it, so it has four stages, each there and back through TLS and Flower. Wall clock
from the first train request to the last revealed share, the median over the rounds but the first;
the test of the adapter and the training, a tenth of a second of CPU at each site, are in it. And a
hundred rounds of three sites, with what is between them; and rounds of three sites while two other
processes use both cores.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_masking import entry
from tiny_clinics import run, start, tiny_clinics

from umbel_server.messaging.carrier import CarrierLink
from umbel_server.messaging.link import Step

HUNDRED = 100
ROUNDS = {3: HUNDRED + 2, 10: 6}
BUSY_ROUNDS = 12
TARGETS = {3: 1.0, 10: 3.0}


class Timed:
    """A link that remembers when each round began and ended."""

    def __init__(self, link: CarrierLink, times: dict[int, list[float]]) -> None:
        self._link = link
        self._times = times

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """See `Link`."""
        self._times.setdefault(step.round, []).append(time.monotonic())
        for answer in self._link.exchange(step, requests, seconds):
            if step.stage in ("train", "unmask"):
                self._times[step.round].append(time.monotonic())
            yield answer


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}."""
    figures = {}
    for sites, rounds in ROUNDS.items():
        times = _measured(sites, rounds)
        counted = range(2, rounds)
        seconds = statistics.median(times[number][-1] - times[number][0] for number in counted)
        figures[f"secure_round_{sites}_sites_s"] = entry(seconds, "s", TARGETS[sites])
        if len(counted) == HUNDRED:
            hundred = times[rounds][0] - times[2][0]
            figures["secure_100_rounds_s"] = entry(hundred, "s", 100.0)
    with busy_loops(2):
        times = _measured(3, BUSY_ROUNDS)
    seconds = statistics.median(
        times[number][-1] - times[number][0] for number in range(2, BUSY_ROUNDS)
    )
    figures["secure_round_3_sites_beside_two_loops_s"] = entry(seconds, "s", None)
    return figures


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Processes that take what they get of the processor."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _measured(sites: int, rounds: int) -> dict[int, list[float]]:
    """Round -> when a stage began, or a reply to its first or last stage came."""
    times: dict[int, list[float]] = {}
    with tiny_clinics(sites, rounds) as clinics:
        start(clinics, rounds)
        run(clinics, lambda link: Timed(link, times))
    return times


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
