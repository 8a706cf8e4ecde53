"""How long a secure round takes beyond its training: `python tests/benchmarks/bench_round.py`.

Three sites on this machine, each a relay and a trainer, the process with the port, and this process
in place of the job's. The model is tiny, so nearly all of a round is carrying: five stages, each
there and back through TLS and Flower. Wall clock from the first train request to the last revealed
share, the median over the rounds but the first; training, a few milliseconds, is in it.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_masking import entry
from e2e.daemons import Clinics
from support.homes import live_in, own_homes
from support.small_models import save_bert

from umbel_server.messaging.carrier import CarrierLink
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits
from umbel_server.storage.job_queue import JobState

ROUNDS = 6
TARGET_SECONDS = 3.0


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
    own_homes()
    with tempfile.TemporaryDirectory() as folder:
        live_in(folder)
        model = save_bert(
            Path(folder) / "model",
            [f"w{number}" for number in range(35)],
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
        )
        clinics = Clinics(Path(folder) / "clinics", model)
        try:
            return rounds(clinics)
        finally:
            clinics.close()


def rounds(clinics: Clinics) -> dict[str, dict[str, Any]]:
    """One job of several rounds."""
    text = clinics.draft.read_text()
    clinics.draft.write_text(text.replace("rounds = 3", f"rounds = {ROUNDS}"))
    clinics.port_process.start()
    for site in clinics.sites.values():
        site.trainer.start()
        site.relay.start()
        site.status()
    times: dict[int, list[float]] = {}

    def link(stopped: Callable[[], bool]) -> Timed:
        path = clinics.operator_folder / "state" / "carrier.sock"
        return Timed(CarrierLink(path, stopped), times)

    limits = Limits(offer_seconds=60, train_seconds=60, stage_seconds=60)
    job = clinics.run(clinics.rounds(link, limits))
    assert job.state is JobState.FINISHED, job.detail
    spans = [times[number][-1] - times[number][0] for number in range(2, ROUNDS)]
    seconds = statistics.median(spans)
    return {"secure_round_3_sites_s": entry(seconds, "s", TARGET_SECONDS)}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
