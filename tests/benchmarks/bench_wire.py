"""What travels in a round: `python tests/benchmarks/bench_wire.py` prints JSON.

Counted is every byte of every sealed message that sites receive and send in an attempt of a real
job. Not counted: offer and finish (once a job), Flower's envelope and TLS.

`wire_overhead_ratio_*` is what the protocol adds: these bytes, without the adapter in the train
request, which every federated scheme sends down, over those of the bare masked vectors.
`round_bytes_*` are the bytes themselves, a round and site, of the rounds after the first: each
starts from the release before, whose difference comes in its place where it is smaller.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench_masking import entry
from toy_federation import PARAMETERS, Federation, Quiet

from umbel_common.plans.plan import Method
from umbel_server.jobs.job import Job
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

SITES = 10
ROUNDS = 3
METHODS: tuple[Method, ...] = ("alternate", "both")
"""The method of a draft that names none, and the one whose rounds train the whole adapter."""


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    figures = {
        "wire_overhead_ratio_1m_10_sites": entry(overhead(32), "bytes per byte", 1.02),
        "wire_overhead_ratio_1m_10_sites_ring_16": entry(overhead(16), "bytes per byte", None),
    }
    for ring_bits in (16, 32):
        for method in METHODS:
            received, sent = round_bytes(ring_bits, method)
            name = f"round_bytes_{ring_bits}_bits"
            figures[f"{name}_{method}_received"] = entry(received, "bytes", None)
            figures[f"{name}_{method}_sent"] = entry(sent, "bytes", None)
    return figures


def overhead(ring_bits: int) -> float:
    """Bytes on the wire over bytes of the masked vectors."""
    link = counted(Federation(SITES, ring_bits))
    adapters = 4 * PARAMETERS * SITES
    vectors = ring_bits // 8 * (PARAMETERS + 1) * SITES
    return (link.received[1] + link.sent[1] - adapters) / vectors


def round_bytes(ring_bits: int, method: Method) -> tuple[float, float]:
    """Bytes that a site receives and sends in a round after the first; the mean of sites and
    rounds."""
    link = counted(Federation(SITES, ring_bits, method=method, rounds=ROUNDS))
    later = range(2, ROUNDS + 1)
    sites_and_rounds = SITES * len(later)
    received = sum(link.received[number] for number in later) / sites_and_rounds
    sent = sum(link.sent[number] for number in later) / sites_and_rounds
    return received, sent


def counted(federation: Federation) -> "CountingLink":
    """The link of a federation's whole job."""
    link = CountingLink(federation)
    with tempfile.TemporaryDirectory() as folder:
        store = Journal(Path(folder) / "journal.sqlite")
        job = Job(
            federation.plan,
            federation.roster,
            federation.operator,
            journal=store,
            registry=Registry(Path(folder) / "registry"),
            link=link,
            observer=Quiet(),
            limits=Limits(attempts=1),
        )
        job.run()
        store.close()
    return link


class CountingLink:
    """Sites in this process; adds up the bytes of each round's attempt."""

    def __init__(self, federation: Federation) -> None:
        self._sites = federation.sites()
        self.received: Counter[int] = Counter()
        """Round -> bytes of all requests."""
        self.sent: Counter[int] = Counter()
        """Round -> bytes of all replies."""

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """See `umbel_server.jobs.job.Link`."""
        for site, sealed in requests:
            reply = self._sites[site].handle(sealed)
            if step.attempt:
                self.received[step.round] += len(sealed)
                self.sent[step.round] += len(reply)
            yield site, reply


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
