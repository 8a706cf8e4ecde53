"""A site's trainer that does not train: `python prepared_site.py client.toml`.

Everything of a trainer's process but model and data: its sockets, policy, journal, ledger, the
adapter's checks, quantisation, masks and seal. A round's delta is random numbers.
"""

import sys
from pathlib import Path

import numpy as np

import umbel_client.trainer.handler
from umbel_client.ledger.ledger import Ledger
from umbel_client.privacy.accounting import DpEvent
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.site.config import ClientConfig
from umbel_client.storage.deltas import DeltaCache
from umbel_client.storage.journal import Published
from umbel_client.trainer.job import SiteJob
from umbel_client.trainer.observer import Observer
from umbel_client.trainer.service import run
from umbel_common.adapters.vector import Vector, size_of
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import TrainingPlan
from umbel_common.trust.identity import Roster
from umbel_host.processes.log import configure
from umbel_host.terminal import exit_code

SPREAD = np.float32(1e-3)


class PreparedJob(SiteJob):
    """A job whose deltas are there at once."""

    def __init__(
        self,
        config: ClientConfig,
        plan: TrainingPlan,
        roster: Roster,
        *,
        published: Published,
        observer: Observer,
        entropy: Entropy,
    ) -> None:
        self.plan = plan
        self.noise = SiteNoise(1.0, None)
        self._config = config
        self._observer = observer
        self._entropy = entropy
        self._weight = 1
        state = Path(config.state)
        self._ledger = Ledger.open(state / "ledger.sqlite", bytes(32))
        self._ledger.keep_pace(published.answers)
        self._deltas = DeltaCache(state / "deltas" / plan.job)

    def _compute(
        self, number: int, adapter_digest: bytes, adapter: Vector, event: DpEvent | None
    ) -> bytes:
        size = size_of(self.plan.trained_tensors(number))
        delta = np.random.default_rng(number).standard_normal(size, dtype=np.float32)
        delta *= SPREAD
        return self._deltas.save(number, adapter_digest, delta, {})


if __name__ == "__main__":
    umbel_client.trainer.handler.SiteJob = PreparedJob
    configure()
    sys.exit(exit_code(lambda: run(Path(sys.argv[1]), "a benchmark")))
