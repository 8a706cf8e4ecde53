"""The law of an attempt at one site in distributed mode, and the job that keeps it.

The law of an attempt is its order:

0. Test: on made-up records, the adapter that the round starts from keeps records separate
   (`SiteJob.check`). An attempt that fails here is not charged.
1. Reserve: the ledger takes the attempt, on disk, or refuses (`DistributedJob.reserve`). It takes
   each attempt once.
2. Prepare and compute: only then does anything look at the records (`SiteJob.prepare`), draw a
   batch or compute on it (`DistributedJob.noisy_sum`).
3. Store: the noisy sum is written to the site's disk (`DistributedJob.store`).
4. Record: the ledger takes the digest of what is stored, or that the attempt failed if anything at
   all went wrong in steps 2 and 3 (`DistributedJob.record`).
   Check: the recorded sum is there and was computed at this header's adapter (`other-adapter`).
   Guards step 5.
5. Only then may anything that is derived from the records leave (`DistributedJob.ring_vector`).

A round of local mode has one delta, which any number of attempts may send. Here each attempt has a
batch and noise of its own. The noise of one site is a share: over one batch, the sums of two
attempts have twice the signal, and their noise does not double with it.

This module is part of the core of the privacy guarantee. Never add or change here:

- Another order, or a step that is skipped.
- A batch, a sum or noise that is kept for another attempt, or an attempt that is computed again. An
  attempt that a crash ended stays charged and sends nothing.
- A look at the records before the attempt is reserved, or a refusal that depends on them.
- A failure after which the round is tried again: whether it fails would be one more answer about
  the batch, and no noise covers it.
- Anything else that leaves: a gradient, a norm, a count without noise, the time of a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from umbel_client.ledger.rows import AttemptKey
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_client.storage.noisy_sums import NoisySums
from umbel_client.trainer.job import SiteJob
from umbel_common.adapters.site_counts import counts_in_steps
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import digest
from umbel_common.errors import LedgerError, LocalProtocolError, require
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.encoding import RingVector, encode_integers, encoding_of


def failed_digest(key: AttemptKey) -> bytes:
    """What stands in the ledger for the sum of an attempt that failed, 32 bytes."""
    return digest("failed attempt", str(key).encode())


# No generated repr: it would write records and noise into whatever log a job is printed to.
@dataclass(kw_only=True, repr=False, eq=False)
class DistributedJob(SiteJob):
    """A job whose sites share their noise: the law of its attempts."""

    _cost: AttemptCost
    _sums: NoisySums
    _spoiled: set[AttemptKey] = field(default_factory=set)
    """Attempts that failed in this process."""

    def settle(self) -> None:
        """Records the failures that could not be recorded when they happened.

        A job that is closed forgets them, and would draw for their rounds when it is next opened.

        Raises:
            LedgerError, StorageError: they still cannot be recorded.
        """
        for key in sorted(self._spoiled):
            self.record(key, failed_digest(key))

    def compute(self, header: RoundHeader, adapter: Vector) -> None:
        """Makes sure that the attempt's noisy sum exists: steps 0 to 4 of the law.

        A sum that is recorded is not computed again.

        Args:
            header: of the attempt.
            adapter: the global adapter that the header names, float32[plan.lora.size].

        Raises:
            BudgetError: a budget of the data set does not allow the attempt, or the plan's most
                attempts are used up; before any gradient.
            LedgerError: an attempt of the round failed, or the sum is damaged.
            StorageError: the ledger or the cache of frozen layers cannot be written.
            RemoteProtocolError: `other-adapter` if the attempt was computed at another adapter;
                `attempt-lost` if a crash ended its computation, or its sum is gone.
            Exception: the computation failed, or its sum could not be stored, for whatever reason.
                The ledger records that: the round is not tried again.
        """
        key = AttemptKey(header.job, header.round, header.attempt)
        self.settle()
        self._require_none_failed(key)
        if self._recorded(key) is None:
            # The server may ask for another attempt, with this site.
            require(
                self._ledger.attempt(key) is None,
                "attempt-lost",
                f"{key} was reserved, and its sum was lost before it was recorded",
            )
            # 0
            self.check(key.round, adapter)
            # 1
            self.reserve(key)
            self._compute_reserved(key, header.adapter, adapter)
        # The check that guards step 5.
        computed_at, _ = self._stored(key)
        require(
            computed_at == header.adapter,
            "other-adapter",
            f"{key} was computed at another global adapter",
        )

    def _compute_reserved(self, key: AttemptKey, adapter_digest: bytes, adapter: Vector) -> None:
        # 2. A preparation waits for a multiple of its own, as in local mode.
        if self._prepared is None:
            with self._answer_time.kept(), self._final(key):
                self.prepare()
        with self._answer_time.kept():
            with self._final(key):
                values = self.noisy_sum(key.round, adapter)
                # 3
                stored = self.store(key, adapter_digest, values)
            # 4
            self.record(key, stored)

    def reserve(self, key: AttemptKey) -> None:
        """Step 1: the ledger takes what the attempt costs, on disk, before any gradient.

        Raises:
            BudgetError: a budget does not allow it, or the plan's most attempts are used up.
            LedgerError: it was reserved before, or the ledger is an old copy.
            StorageError: the ledger cannot be written.
        """
        self._ledger.reserve_attempt(key, self.plan.digest(), self._cost, self._budget)
        self._observer.charged(key.round, self._spent(), again=False, shared=self._shared_spent())

    def noisy_sum(self, round_number: int, adapter: Vector) -> npt.NDArray[np.int64]:
        """Step 2, after `prepare`: draws the attempt's batch and noise, and sums.

        Args:
            adapter: the global adapter, float32[plan.lora.size].

        Returns:
            The noisy sum with the noisy counts behind it, int64[n], in steps of the grid.

        Raises:
            PlanError, ModelError: see `LocalTrainer.noisy_sum`.
        """
        prepared = self._prepared
        assert prepared is not None  # `compute` prepares first
        counts = self.counts(prepared, adapter)
        values = prepared.trainer.noisy_sum(round_number, adapter)
        self._observer.step(round_number, 1, 1, self.plan.training.expected_batch_size)
        if counts is None:
            return values
        return np.concatenate([values, counts_in_steps(counts, self.plan)])

    def store(self, key: AttemptKey, adapter_digest: bytes, values: npt.NDArray[np.int64]) -> bytes:
        """Step 3: writes the noisy sum, and returns the digest that the ledger is to record.

        Args:
            adapter_digest: of the adapter that it was computed at, 32 bytes.
            values: what `noisy_sum` returned.

        Raises:
            StorageError: the disk does not take it.
        """
        return self._sums.save(key.round, key.attempt, adapter_digest, values)

    def record(self, key: AttemptKey, stored: bytes) -> None:
        """Step 4: the ledger takes the digest; what it names is final.

        Args:
            stored: what `store` returned, or `failed_digest`.

        Raises:
            LedgerError: another digest was recorded for the attempt.
            StorageError: the ledger cannot be written.
        """
        self._ledger.record_vector(key, stored)
        self._spoiled.discard(key)

    def ring_vector(self, header: RoundHeader) -> RingVector:
        """Step 5: returns the recorded noisy sum in the ring.

        Raises:
            LocalProtocolError: the attempt has no recorded sum (`not-computed`).
            RemoteProtocolError: `attempt-lost` if its sum is gone.
            LedgerError: its computation failed, or its sum is not what was recorded.
        """
        _, values = self._stored(AttemptKey(header.job, header.round, header.attempt))
        return encode_integers(values, encoding_of(self.plan, len(header.cohort)))

    def record_sent(self, header: RoundHeader) -> None:
        """Records that the attempt's masked sum is about to leave."""
        self._ledger.record_vector_sent(AttemptKey(header.job, header.round, header.attempt))

    @contextmanager
    def _final(self, key: AttemptKey) -> Iterator[None]:
        """Whatever fails inside is the outcome of the attempt, and recorded (step 4)."""
        try:
            yield
        except Exception:
            # Kept here too, because the ledger may be what cannot be written.
            self._spoiled.add(key)
            self.record(key, failed_digest(key))
            raise

    def _stored(self, key: AttemptKey) -> tuple[bytes, npt.NDArray[np.int64]]:
        recorded = self._recorded(key)
        if recorded is None:
            raise LocalProtocolError("not-computed", f"{key} has no sum to send")
        return self._sums.load(key.round, key.attempt, recorded)

    def _recorded(self, key: AttemptKey) -> bytes | None:
        known = self._ledger.attempt(key)
        return None if known is None else known.vector

    def _require_none_failed(self, key: AttemptKey) -> None:
        """Refuses another draw for a round in which one failed."""
        for number in range(1, key.attempt + 1):
            earlier = key._replace(attempt=number)
            if self._recorded(earlier) == failed_digest(earlier):
                raise LedgerError(
                    f"{earlier} failed, and its round is not tried again",
                    file=self._config.state,
                    remedy="this site sits the round out; its log says why the attempt failed",
                )
