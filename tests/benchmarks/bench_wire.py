"""What the protocol adds on the wire: `python tests/benchmarks/bench_wire.py` prints JSON.

Counted is every byte of every sealed message that sites receive and send in one attempt of a real
job, without the adapter itself in the train request, which every federated scheme sends down. It is
compared with the bare masked vectors. Not counted: offer and finish (once a job), Flower's envelope
and TLS.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench_masking import entry
from toy_federation import PARAMETERS, Federation, Quiet

from umbel_server.jobs.job import Job
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

SITES = 10


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    return {
        "wire_overhead_ratio_1m_10_sites": entry(overhead(32), "bytes per byte", 1.02),
        "wire_overhead_ratio_1m_10_sites_ring_16": entry(overhead(16), "bytes per byte", None),
    }


def overhead(ring_bits: int) -> float:
    """Bytes on the wire over bytes of the masked vectors."""
    federation = Federation(SITES, ring_bits)
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
    adapters = 4 * PARAMETERS * SITES
    vectors = ring_bits // 8 * (PARAMETERS + 1) * SITES
    return (link.total - adapters) / vectors


class CountingLink:
    """Sites in this process; adds up the bytes of an attempt, both ways."""

    def __init__(self, federation: Federation) -> None:
        self._sites = federation.sites()
        self.total = 0

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """See `umbel_server.jobs.job.Link`."""
        for site, sealed in requests:
            reply = self._sites[site].handle(sealed)
            if step.attempt:
                self.total += len(sealed) + len(reply)
            yield site, reply


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
