"""A job that is open at one site: what both modes share. `opening.py` opens it.

`local_job.py` and `distributed_job.py` have the laws of a round and of an attempt: the order in
which something is charged, computed, stored and sent.

This module is part of the core of the privacy guarantee. Never add or change here:

- A look at the records outside `SiteJob.prepare`, or a refusal that depends on them.
- A test of an adapter on records that are not made up.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from umbel_client.data.hold_out import hold_out
from umbel_client.data.records import LmRecords, Misfit, Records
from umbel_client.evaluation.counts import noisy_counts
from umbel_client.ledger.ledger import Ledger
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.privacy.noise import NoiseSource
from umbel_client.site.config import ClientConfig
from umbel_client.site.ipc import SharedEpsilon
from umbel_client.site.policy import Budget
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.trainer.observer import Observer
from umbel_client.training.answer_time import AnswerTime
from umbel_client.training.bit_test import check_round
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import Entropy
from umbel_common.errors import DataError
from umbel_common.plans.plan import DifferentialPrivacy, TrainingPlan
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.encoding import RingVector

_logger = logging.getLogger("umbel.trainer")
_SHOWN = 10


@dataclass(frozen=True)
class SiteStatus:
    """What a site's own people may know of a job."""

    noise: SiteNoise
    epsilon: float | None
    """Spent on the data set by now, all jobs together, against everybody; None without differential
    privacy."""
    shared: SharedEpsilon | None = None
    """The second total; None: nothing was charged in distributed mode."""


@dataclass(frozen=True, repr=False, eq=False)
class Prepared:
    """A job's records, as training and scoring need them."""

    trainer: LocalTrainer
    held_out: PreparedData | None
    """None: the plan has no evaluation at the sites."""


# No generated repr: it would write records and noise into whatever log a job is printed to.
@dataclass(kw_only=True, repr=False, eq=False)
class SiteJob(ABC):
    """A job that is open: what `opening.open_job` loaded, and what every mode does with it."""

    plan: TrainingPlan
    noise: SiteNoise
    _config: ClientConfig
    _records: Records | LmRecords
    _model: AdaptedModel
    _limit: BatchLimit
    _budget: Budget
    _ledger: Ledger
    _observer: Observer
    _entropy: Entropy
    _answer_time: AnswerTime
    own_start: Vector | None = None
    """The start that this site computed for a head at its labels' names, float32[plan.lora.size];
    None: the plan has another start."""
    _prepared: Prepared | None = None
    """None before the first round of this process: nothing looks at the records before one is
    reserved."""

    def close(self) -> None:
        """Releases the ledger."""
        self._ledger.close()

    @abstractmethod
    def settle(self) -> None:
        """Records the failures that could not be recorded when they happened.

        Raises:
            LedgerError, StorageError: they still cannot be recorded.
        """

    @abstractmethod
    def compute(self, header: RoundHeader, adapter: Vector) -> None:
        """Makes sure that what the site sends in an attempt exists, on disk and in the ledger.

        Args:
            header: of the attempt.
            adapter: the global adapter that the header names, float32[plan.lora.size].
        """

    @abstractmethod
    def ring_vector(self, header: RoundHeader) -> RingVector:
        """What the site sends in an attempt, before it is masked."""

    @abstractmethod
    def record_sent(self, header: RoundHeader) -> None:
        """Records that it is about to leave."""

    def status(self) -> SiteStatus:
        """Returns what the site's own people may know."""
        return SiteStatus(self.noise, self._spent(), self._shared_spent())

    def ledger_head(self) -> bytes:
        """Returns what the site's next signed statement says about its ledger, 32 bytes."""
        return self._ledger.head()

    def knows(self, head: bytes, signed_for: RoundHeader) -> bool:
        """Whether the ledger knows of a head that this site signed for an attempt."""
        return self._ledger.knows(head, signed_for.job, signed_for.round)

    def mark_as_old_copy(self, head: bytes) -> None:
        """Marks the ledger as an old copy: it does not know a head that this site signed.

        Nothing is charged until somebody states what was spent.
        """
        self._ledger.mark_as_old_copy(head)

    def check(self, number: int, adapter: Vector) -> None:
        """Step 0: tests the adapter that a round starts from, on made-up records.

        Nothing is promised, and nothing tested, where the plan has no privacy.

        Args:
            adapter: the global adapter, float32[plan.lora.size].

        Raises:
            ModelError: under this adapter the results of records are not separate.
        """
        if isinstance(self.plan.privacy, DifferentialPrivacy):
            self._model.set_vector(adapter)
            self._model.select(number)
            check_round(self._model, self._limit, entropy=self._entropy)

    def prepare(self) -> None:
        """Step 2, once in a process: holds records out, and prepares those that fit the plan.

        A record that does not fit is left out, for what it is itself. Only the site's log tells.

        Raises:
            ModelError: the tokenizer of the base model cannot be used.
            StorageError: the cache of frozen layers cannot be written.
        """
        if self._prepared is not None:
            return
        misfits: list[DataError] = []
        records: Records | LmRecords = self._records
        held_out = None
        if self.plan.evaluation is not None:
            records, chosen = hold_out(records, self._config.data.evaluation_share)
            held_out = self._prepare(chosen, misfits.append)
        data = self._prepare(records, misfits.append)
        _tell(misfits, len(self._records))
        trainer = LocalTrainer(self._model, data, self.noise, self._entropy, self._limit)
        self._prepared = Prepared(trainer, held_out)

    def _prepare(self, records: Records | LmRecords, on_misfit: Misfit) -> PreparedData:
        return prepare(
            self._model,
            Path(self._config.model.path),
            records,
            self._limit,
            cache=self._config.state_folder.cache,
            on_progress=lambda done, total: self._observer.preparing("frozen layers", done, total),
            on_misfit=on_misfit,
        )

    def record_answers(self, answers: int) -> None:
        """Records that an answer, which the journal has just recorded or gives again, will leave.

        Args:
            answers: the number of answers that the journal ever recorded.
        """
        self._ledger.keep_pace(answers)

    def counts(self, prepared: Prepared, adapter: Vector) -> SiteCounts | None:
        """How the adapter that the round starts from does on the held-out records."""
        if self.plan.evaluation is None or prepared.held_out is None:
            return None
        self._model.set_vector(adapter)
        noise = NoiseSource(self._entropy)
        return noisy_counts(
            self._model, prepared.held_out, self.plan.evaluation, noise, self._limit
        )

    def _spent(self) -> float | None:
        privacy = self.plan.privacy
        if not isinstance(privacy, DifferentialPrivacy):
            return None
        return self._ledger.spent(privacy.delta)

    def _shared_spent(self) -> SharedEpsilon | None:
        privacy, honest = self.plan.privacy, self._ledger.honest
        if not isinstance(privacy, DifferentialPrivacy) or honest is None:
            return None
        return SharedEpsilon(self._ledger.shared_spent(privacy.delta), honest)


def _tell(misfits: list[DataError], records: int) -> None:
    """Tells the site's log which records are left out, and why; never what they say."""
    if not misfits:
        return
    reasons: dict[str, list[str]] = {}
    for misfit in misfits:
        row, _, reason = (misfit.message.removeprefix("row ")).partition(" ")
        reasons.setdefault(reason, []).append(row)
    for reason, rows in reasons.items():
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        _logger.warning(
            "%d of %d records are left out, because each of them %s: row%s %s%s"
            " (umbel-client data check)",
            len(rows),
            records,
            reason,
            "s" if len(rows) > 1 else "",
            ", ".join(rows[:_SHOWN]),
            more,
        )
