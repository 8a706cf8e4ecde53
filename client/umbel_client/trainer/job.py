"""One job at one site: model, data, ledger, and the delta of each round.

The order is the law: reserve in the ledger, train, store the delta, record its digest in the
ledger, and only then may anything derived from it leave.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from umbel_client.data.hold_out import hold_out
from umbel_client.data.records import LmRecords, Records, columns_of, load_records
from umbel_client.dpsgd.batch_size import find_physical_batch_size
from umbel_client.evaluation.counts import noisy_counts
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import EVALUATION, LOST
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.precision import chosen_precision
from umbel_client.privacy.accounting import DpEvent, epsilon, largest_delta
from umbel_client.privacy.calibration import SiteNoise, evaluation_event, noise_for
from umbel_client.privacy.noise import NoiseSource
from umbel_client.site.config import ClientConfig
from umbel_client.site.policy import Budget
from umbel_client.storage.deltas import DeltaCache, OptimizerState
from umbel_client.storage.journal import Published
from umbel_client.tasks.physical_batches import BatchLimit
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.trainer.observer import Observer
from umbel_client.training.round import train_round
from umbel_client.training.self_test import self_test
from umbel_common.adapters.site_counts import SiteCounts, with_counts
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import Entropy, digest
from umbel_common.errors import (
    BudgetError,
    LedgerError,
    LocalProtocolError,
    ModelError,
    require,
)
from umbel_common.plans.plan import LocalPrivacy, TrainingPlan
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.encoding import RingVector, encode, encoding_of
from umbel_common.trust.identity import Roster

FAILED = digest("failed round", b"")
"""Stands in the ledger for the delta of a round whose training failed."""


@dataclass(frozen=True)
class SiteStatus:
    """What a site's own people may know of a job."""

    noise: SiteNoise
    epsilon: float | None
    """Spent on the data set by now, all jobs together; None without differential privacy."""


class SiteJob:
    """Everything of a plan that needs the site's data."""

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
        """Loads data and model, calibrates the noise, and opens the data set's ledger.

        Args:
            published: from the session journal; the ledger must know of it.

        Raises:
            DataError, ModelError: what is on the site's disk does not fit the plan, or the model
                fails the self-test of a private step.
            CalibrationError, PolicyRefusal: the plan's privacy cannot be had with this data set.
            BudgetError: the whole plan would go past the data set's budget.
            LedgerError: the ledger is corrupt, in use, or rolled back, or the journal is; or it is
                an old copy, and what was spent since was not stated.
        """
        self.plan = plan
        self._config = config
        self._observer = observer
        self._entropy = entropy
        # Before the data is touched: what a server can make this site refuse here depends on
        # public figures only.
        self.noise = noise_for(plan, config.data.public_size)
        records = load_records(Path(config.data.path), plan.task, **columns_of(config.data))
        self._weight = _weight(plan, roster, config.site, len(records))
        state = Path(config.state)
        self._ledger = Ledger.open(state / "ledger.sqlite", records.digest(), records.unit_column)
        try:
            if published.ledger_head is not None:
                self._ledger.verify(published.ledger_head)
            self._ledger.require_stated()
            self._ledger.keep_pace(published.answers)
            self._check_budget()
            self._model = AdaptedModel.load(
                Path(config.model.path),
                plan,
                precision=chosen_precision(config.model.precision),
                checkpointing=config.model.gradient_checkpointing,
                quantisation=config.model.quantisation,
            )
            self_test(self._model, self.noise.noise_multiplier, entropy=entropy)
            self._held_out = None
            if plan.evaluation is not None:
                records, held_out = hold_out(records, config.data.evaluation_share)
                self._held_out = self._prepare(held_out)
            self._data = self._prepare(records)
            self._batch_limit = BatchLimit(self._physical_batch_size())
            self._deltas = DeltaCache(state / "deltas" / plan.job)
        except BaseException:
            self._ledger.close()
            raise

    def close(self) -> None:
        """Releases the ledger."""
        self._ledger.close()

    def status(self) -> SiteStatus:
        """For the site's own status."""
        return SiteStatus(self.noise, self._spent())

    def ledger_head(self) -> bytes:
        """What the site's next signed statement says about its ledger."""
        return self._ledger.head()

    def knows(self, head: bytes, signed_for: RoundHeader) -> bool:
        """Whether the ledger knows of a head that this site signed for an attempt."""
        return self._ledger.knows(head, signed_for.job, signed_for.round)

    def mark_as_old_copy(self, head: bytes) -> None:
        """The ledger is an old copy, by a head that this site signed: nothing is charged until
        somebody states what was spent."""
        self._ledger.mark_as_old_copy(head)

    def train(self, header: RoundHeader, adapter: Vector) -> None:
        """Makes sure that the round's delta exists: from the cache, or by training now.

        Raises:
            BudgetError: before any gradient.
            RemoteProtocolError: `other-adapter` if the round was computed from another adapter:
                one round has one delta.
        """
        number = header.round
        reserved = self._ledger.state(self.plan.job, number)
        # A round that was reserved keeps its noise, even if a new version would calibrate another.
        event = self._event(self.plan.training.local_steps) if reserved is None else reserved.event
        evaluation = evaluation_event(self.plan, rounds=1)
        if evaluation is not None:
            name = self.plan.job + EVALUATION
            self._ledger.reserve(name, self.plan.digest(), number, evaluation, self._budget)
        self._ledger.reserve(self.plan.job, self.plan.digest(), number, event, self._budget)
        self._observer.charged(number, self._spent())
        if self._recorded_digest(number) is None:
            # Whatever a killed computation left is replaced, never released.
            try:
                computed = self._compute(number, header.adapter, adapter, event)
            except ModelError:
                # The outcome of this draw of noise, too: another draw would be another release.
                self._ledger.record_delta(self.plan.job, number, FAILED)
                raise
            self._ledger.record_delta(self.plan.job, number, computed)
        started_from, _, _ = self._stored(number, with_state=False)
        require(
            started_from == header.adapter,
            "other-adapter",
            f"round {number} was computed from another global adapter",
        )

    def ring_vector(self, header: RoundHeader) -> RingVector:
        """The round's delta, clipped, rounded and weighted, as elements of the ring.

        Rounding again for another attempt is post-processing of the same noisy delta.
        """
        _, delta, _ = self._stored(header.round, with_state=False)
        encoding = encoding_of(self.plan.aggregation, len(header.cohort))
        return encode(delta, self._weight, encoding, self._entropy)

    def record_sent(self, round_number: int) -> None:
        """The round's masked delta is about to leave."""
        self._ledger.record_sent(self.plan.job, round_number)

    def record_answers(self, answers: int) -> None:
        """An answer that the session journal has just recorded, or gives again, is about to leave.

        Args:
            answers: that the journal ever recorded.
        """
        self._ledger.keep_pace(answers)

    def _stored(self, number: int, *, with_state: bool) -> tuple[bytes, Vector, OptimizerState]:
        recorded = self._recorded_digest(number)
        if recorded is None:
            raise LocalProtocolError("not-computed", f"round {number} has no delta to send")
        if recorded == FAILED:
            raise LedgerError(
                f"training failed in round {number} and is not repeated",
                file=self._config.state,
                remedy="this site sits the round out; its log says why training failed",
            )
        if recorded == LOST:
            raise LedgerError(
                f"round {number} was charged in a state of this site that is gone",
                file=self._config.state,
                remedy="this site sits the round out, and takes part in later ones",
            )
        return self._deltas.load(number, recorded, with_state=with_state)

    def _recorded_digest(self, number: int) -> bytes | None:
        recorded = self._ledger.state(self.plan.job, number)
        return None if recorded is None else recorded.delta_digest

    def _compute(
        self, number: int, adapter_digest: bytes, adapter: Vector, event: DpEvent | None
    ) -> bytes:
        # Drawn once and kept with the delta: fresh noise for each attempt would average out.
        counts = self._counts(adapter)
        result = train_round(
            self._model,
            self._data,
            self.plan,
            number,
            adapter,
            self.noise.sampling_rate if event is None else event.sample_rate,
            None if event is None else event.noise_multiplier,
            self._optimizer_state(number),
            entropy=self._entropy,
            physical_batch_size=self._batch_limit,
            on_step=lambda step, steps: self._observer.step(number, step, steps),
        )
        vector = with_counts(result.delta, counts, self.plan)
        return self._deltas.save(number, adapter_digest, vector, result.state)

    def _prepare(self, records: Records | LmRecords) -> PreparedData:
        return prepare(
            self._model,
            Path(self._config.model.path),
            records,
            cache=Path(self._config.state) / "cache",
            progress=lambda done, total: self._observer.preparing("frozen layers", done, total),
        )

    def _counts(self, adapter: Vector) -> SiteCounts | None:
        """How the adapter that the round starts from does on the held-out records."""
        if self.plan.evaluation is None or self._held_out is None:
            return None
        self._model.set_vector(adapter)
        noise = NoiseSource(self._entropy)
        return noisy_counts(self._model, self._held_out, self.plan.evaluation, noise)

    def _physical_batch_size(self) -> int:
        if self._config.physical_batch_size != "auto":
            return self._config.physical_batch_size
        units = self._data.units is not None
        return find_physical_batch_size(
            self._model,
            self._data.prefix,
            records_per_unit=self._config.data.max_records_per_unit if units else 1,
        )

    def _optimizer_state(self, number: int) -> OptimizerState | None:
        """Of the last round that this site computed: it may have slept through some."""
        for former in range(number - 1, 0, -1):
            # Only of a round whose delta the ledger knows: what a killed computation left must not
            # flow into a later release.
            if self._recorded_digest(former) not in (None, FAILED, LOST):
                return self._stored(former, with_state=True)[2]
        return None

    def _check_budget(self) -> None:
        """Refuses with the offer what the ledger would refuse in some later round."""
        if self._budget.epsilon == math.inf:
            return
        own = (self.plan.job, self.plan.job + EVALUATION)
        former = [entry.event for entry in self._ledger.history() if entry.job not in own]
        unknown = [None] if self._ledger.unknown else []
        events = [*former, *unknown, self._event(self.plan.training.steps)]
        if self.plan.evaluation is not None:
            events.append(evaluation_event(self.plan, rounds=self.plan.training.rounds))
        private = [event for event in events if event is not None]
        cost = epsilon(private, self._budget.delta) if len(private) == len(events) else math.inf
        if cost > self._budget.epsilon:
            raise BudgetError(
                "the privacy budget of this data set does not allow the whole plan",
                file=self._config.data.path,
                field="policy.total_epsilon",
                found=f"{cost:.4g} with the plan {self.plan.job}",
                accepted=f"at most {self._budget.epsilon:g} at delta {self._budget.delta:g}",
                remedy="agree on a plan with a smaller epsilon; what is spent does not come back",
            )

    def _spent(self) -> float | None:
        privacy = self.plan.privacy
        return self._ledger.spent(privacy.delta) if isinstance(privacy, LocalPrivacy) else None

    def _event(self, steps: int) -> DpEvent | None:
        if self.noise.noise_multiplier is None:
            return None
        return DpEvent(self.noise.noise_multiplier, self.noise.sampling_rate, steps)

    @property
    def _budget(self) -> Budget:
        budget = self._config.policy.budget(self.plan)
        # As for one plan: with probability delta anything may be revealed, of any record.
        largest = largest_delta(self._config.data.public_size)
        return Budget(budget.epsilon, min(budget.delta, largest))


def _weight(plan: TrainingPlan, roster: Roster, site: str, records: int) -> int:
    """The site's weight in the mean; a data set above the plan's largest weight counts as that."""
    match plan.aggregation.weights:
        case "equal":
            return 1
        case "size-class":
            return roster.member(site).weight
        case "examples":
            return min(records, plan.aggregation.max_weight)
