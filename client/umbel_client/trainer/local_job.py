"""The law of a round at one site, and the job that keeps it; in distributed mode another law holds
(`distributed_job.py`). `opening.py` opens the job.

The law of a round is its order:

0. Test: on made-up records, the adapter that the round starts from keeps records separate
   (`LocalJob.check`). A round that fails here is not charged.
1. Reserve: the ledger takes the round's DP events, on disk, or refuses (`LocalJob.reserve`).
2. Prepare and train: only then does anything look at the records (`LocalJob.prepare`) or compute on
   them (`LocalJob.train`).
3. Store: the delta and the optimizer state are written to the site's disk (`LocalJob.store`).
4. Record: the ledger takes the digest of what is stored, or FAILED if anything at all went wrong
   in steps 2 and 3 (`LocalJob.record`).
   Check: the recorded delta is there and started from this header's adapter (`other-adapter`).
   Guards step 5.
5. Only then may anything that is derived from the records leave (`LocalJob.ring_vector`).

This module is part of the core of the privacy guarantee. Never add or change here:

- Another order, or a step that is skipped. A site that dies between two steps charges the round
  once at most and releases one delta at most; this holds in this order only.
- A second computation of a recorded round. A round has one delta; another draw of noise would be
  another release, which nobody has paid for.
- A look at the records before the round is reserved, or a refusal that depends on them.
- A failure that leaves the round open for another draw: whether it fails would be one more answer
  about the batch, and no noise covers it.
- Anything else that leaves: a loss, a norm, a count without noise, the time of a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from umbel_client.ledger.rows import EVALUATION, LOST
from umbel_client.privacy.accounting import DpEvent
from umbel_client.privacy.calibration import SiteNoise, evaluation_event
from umbel_client.storage.deltas import DeltaCache, OptimizerState
from umbel_client.trainer.job import SiteJob
from umbel_common.adapters.site_counts import with_counts
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import digest
from umbel_common.errors import (
    LedgerError,
    LocalProtocolError,
    StorageError,
    UmbelError,
    require,
)
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.encoding import RingVector, encode, encoding_of

FAILED = digest("failed round", b"")
"""Stands in the ledger for the delta of a round whose training failed."""


# No generated repr: it would write records and noise into whatever log a job is printed to.
@dataclass(kw_only=True, repr=False, eq=False)
class LocalJob(SiteJob):
    """A job whose sites protect their records by their own noise alone: the law of its rounds."""

    _weight: int
    _deltas: DeltaCache
    _spoiled: set[int] = field(default_factory=set)
    """Rounds that failed in this process."""

    def settle(self) -> None:
        """Records the failures that could not be recorded when they happened.

        A job that is closed forgets them, and would draw these rounds again when it is next opened.

        Raises:
            LedgerError, StorageError: they still cannot be recorded.
        """
        for number in sorted(self._spoiled):
            if self._recorded_digest(number) is None:
                self.record(number, FAILED)

    def compute(self, header: RoundHeader, adapter: Vector) -> None:
        """Makes sure that the round's delta exists: steps 0 to 4 of the law.

        A delta that is recorded is not computed again.

        Args:
            header: of the attempt.
            adapter: the global adapter that the header names, float32[plan.lora.size].

        Raises:
            BudgetError: the data set's budget does not allow the round; before any gradient.
            LedgerError: the round is reserved for another plan or noise, its training failed
                before, or its delta is lost or damaged.
            StorageError: the ledger or the cache of frozen layers cannot be written.
            RemoteProtocolError: `other-adapter` if the round was computed from another adapter:
                one round has one delta.
            Exception: training failed, or its delta could not be stored, for whatever reason. The
                ledger records that: the round is not repeated.
        """
        number = header.round
        self.settle()
        if self._recorded_digest(number) is None:
            # 0
            self.check(number, adapter)
        # 1
        event = self.reserve(number)
        if self._recorded_digest(number) is None:
            self._compute_reserved(number, header.adapter, adapter, event)
        # The check that guards step 5.
        started_from, _, _ = self._stored(number, with_state=False)
        require(
            started_from == header.adapter,
            "other-adapter",
            f"round {number} was computed from another global adapter",
        )

    def _compute_reserved(
        self, number: int, adapter_digest: bytes, adapter: Vector, event: DpEvent | None
    ) -> None:
        # 2. What a full disk stops here has drawn nothing yet, and a disk does not depend on the
        # batch: the round may be prepared again. It waits for a multiple of its own: added to a
        # preparation that ends shortly before one, a long record in the batch would show.
        if self._prepared is None:
            with self._answer_time.kept(), self._final(number, but=StorageError):
                self.prepare()
        with self._answer_time.kept():
            # What a killed computation left on disk is replaced, never released.
            with self._final(number):
                vector, state = self.train(number, adapter, event)
                # 3
                stored = self.store(number, adapter_digest, vector, state)
            # 4
            self.record(number, stored)

    @contextmanager
    def _final(self, number: int, but: type[UmbelError] | tuple[()] = ()) -> Iterator[None]:
        """Whatever fails inside is the outcome of the round, and recorded (step 4): another draw of
        noise would be another release, and each failure an answer about who is in the batch.

        Args:
            but: a kind of failure that leaves the round as it is.
        """
        try:
            yield
        except but:
            raise
        except Exception:
            # Kept here too, because the ledger may be what cannot be written.
            self._spoiled.add(number)
            self.record(number, FAILED)
            raise

    def reserve(self, number: int) -> DpEvent | None:
        """Step 1: the ledger takes what the round costs, on disk, before any gradient.

        The counts are charged first; if the round is then refused, their charge stays.

        Returns:
            The DP event of the round's training; None without differential privacy. A round that
            was reserved keeps its noise, even if a new version would calibrate another.

        Raises:
            BudgetError: the data set's budget does not allow it.
            LedgerError: the round is reserved for another plan or noise, or the ledger is an old
                copy.
            StorageError: the ledger cannot be written.
        """
        reserved = self._ledger.state(self.plan.job, number)
        steps = self.plan.training.local_steps
        event = self.noise.event(steps) if reserved is None else reserved.event
        evaluation = evaluation_event(self.plan, rounds=1)
        if evaluation is not None:
            name = self.plan.job + EVALUATION
            self._ledger.reserve(name, self.plan.digest(), number, evaluation, self._budget)
        self._ledger.reserve(self.plan.job, self.plan.digest(), number, event, self._budget)
        self._observer.charged(
            number, self._spent(), again=reserved is not None, shared=self._shared_spent()
        )
        return event

    def train(
        self, number: int, adapter: Vector, event: DpEvent | None
    ) -> tuple[Vector, OptimizerState]:
        """Step 2, after `prepare`: trains the round with the noise that was reserved.

        Args:
            adapter: the global adapter, float32[plan.lora.size].
            event: what `reserve` returned.

        Returns:
            The delta with the noisy counts behind it, float32[n], and the optimizer state.

        Raises:
            PlanError, ModelError: see `LocalTrainer.round`.
            LedgerError: the optimizer state of a former round is damaged.
        """
        prepared = self._prepared
        assert prepared is not None  # `compute` prepares first
        # The counts are drawn once and kept with the delta: fresh noise for each attempt would
        # average out.
        counts = self.counts(prepared, adapter)
        # What was reserved decides, also where it is a round without privacy: a plan with privacy
        # then stops at step 0 of the round.
        if event is None:
            noise = SiteNoise(self.noise.sampling_rate, None)
        else:
            noise = SiteNoise(event.sample_rate, event.noise_multiplier)
        records = self.plan.training.expected_batch_size
        result = replace(prepared.trainer, noise=noise).round(
            number,
            adapter,
            self._optimizer_state(number),
            on_step=lambda step, steps: self._observer.step(number, step, steps, records),
        )
        return with_counts(result.delta, counts, self.plan), result.state

    def store(
        self, number: int, adapter_digest: bytes, vector: Vector, state: OptimizerState
    ) -> bytes:
        """Step 3: writes the delta, and returns the digest that the ledger is to record.

        Args:
            adapter_digest: of the adapter that the round started from, 32 bytes.
            vector: what `train` returned.

        Raises:
            StorageError: the disk does not take it.
        """
        return self._deltas.save(number, adapter_digest, vector, state)

    def record(self, number: int, digest: bytes) -> None:
        """Step 4: the ledger takes the digest; what it names is final.

        Args:
            digest: what `store` returned, or `FAILED`.

        Raises:
            LedgerError: another digest was recorded for the round.
            StorageError: the ledger cannot be written.
        """
        self._ledger.record_delta(self.plan.job, number, digest)

    def ring_vector(self, header: RoundHeader) -> RingVector:
        """Step 5: returns the recorded delta, clipped, rounded and weighted, in the ring.

        Rounding again for another attempt is post-processing of the same noisy delta.

        Raises:
            LocalProtocolError: the round has no recorded delta (`not-computed`), or the delta
                cannot be encoded (`delta-values`, `delta-type`, `weight`, `entropy`).
            LedgerError: its training failed, or its delta is lost or not what was recorded.
        """
        _, delta, _ = self._stored(header.round, with_state=False)
        encoding = encoding_of(self.plan, len(header.cohort))
        return encode(delta, self._weight, encoding, self._entropy)

    def record_sent(self, header: RoundHeader) -> None:
        """Records that the round's masked delta is about to leave."""
        self._ledger.record_sent(self.plan.job, header.round)

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

    def _optimizer_state(self, number: int) -> OptimizerState | None:
        """The state after the last round that this site computed; it may have missed some."""
        for former in range(number - 1, 0, -1):
            # Only of a round whose delta the ledger knows: what a killed computation left must not
            # flow into a later release.
            if self._recorded_digest(former) not in (None, FAILED, LOST):
                return self._stored(former, with_state=True)[2]
        return None
