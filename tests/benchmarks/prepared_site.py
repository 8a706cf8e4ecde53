"""A site's trainer that does not train: `python prepared_site.py client.toml`.

Everything of a trainer's process but model and data: its sockets, policy, journal, ledger, the
adapter's checks, quantisation, masks and seal. A round's delta is random numbers.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

import umbel_client.trainer.handler
from umbel_client.data.site_data import SiteData
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import Register
from umbel_client.privacy.accounting import DpEvent
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.site.config import ClientConfig
from umbel_client.storage.deltas import DeltaCache, OptimizerState
from umbel_client.storage.journal import Published
from umbel_client.trainer.local_job import LocalJob
from umbel_client.trainer.observer import Observer
from umbel_client.trainer.service import run
from umbel_client.training.answer_time import WHEN_DONE
from umbel_common.adapters.vector import Vector, size_of
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import TrainingPlan
from umbel_common.trust.identity import Roster
from umbel_host.entry import exit_code
from umbel_host.processes.log import configure

SPREAD = np.float32(1e-3)


class PreparedJob(LocalJob):
    """A job whose deltas are there at once."""

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def train(
        self, number: int, adapter: Vector, event: DpEvent | None
    ) -> tuple[Vector, OptimizerState]:
        size = size_of(self.plan.trained_tensors(number))
        delta = np.random.default_rng(number).standard_normal(size, dtype=np.float32)
        delta *= SPREAD
        return delta, {}


def open_prepared_job(
    config: ClientConfig,
    plan: TrainingPlan,
    roster: Roster,
    data: SiteData,
    *,
    register: Register,
    published: Published,
    observer: Observer,
    entropy: Entropy,
) -> PreparedJob:
    """As `open_job`, without data and model."""
    state = Path(config.state)
    ledger = Ledger.open(state / "ledger.sqlite", bytes(32))
    ledger.keep_pace(published.answers)
    nothing: Any = None
    return PreparedJob(
        plan=plan,
        noise=SiteNoise(1.0, None),
        _config=config,
        _records=nothing,
        _model=nothing,
        _limit=nothing,
        _weight=1,
        _budget=config.policy.budget(plan),
        _ledger=ledger,
        _deltas=DeltaCache(state / "deltas" / plan.job),
        _observer=observer,
        _entropy=entropy,
        _answer_time=WHEN_DONE,
    )


if __name__ == "__main__":
    umbel_client.trainer.handler.open_job = open_prepared_job
    configure()
    sys.exit(exit_code(lambda: run(Path(sys.argv[1]), "a benchmark")))
