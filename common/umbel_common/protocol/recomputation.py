"""The adapters of a job, made again from the sums of its rounds.

The law: the functions are those by which the server makes a release
(`umbel_common.secagg.sums`), so a release follows from its sum, or is found.
"""

from collections.abc import Callable
from typing import TypeAlias

from umbel_common.adapters import fedsvd
from umbel_common.adapters.server_step import ServerState
from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.vector import Vector, adapter_digest
from umbel_common.errors import VerificationError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import Release, Release2
from umbel_common.secagg import sums as secagg_sums
from umbel_common.secagg.encoding import RingVector, sum_digest

Sums: TypeAlias = Callable[[bytes], RingVector | None]
"""Returns the sum of a digest; None: it is not known."""
Adapters: TypeAlias = Callable[[bytes], Vector | None]
"""Returns the released adapter of a digest, float32[plan.lora.size]; None: it is not known."""


def require_that(condition: bool, what: str) -> None:
    """Checks one thing that a transcript says.

    Raises:
        VerificationError: it does not hold; `what` says why.
    """
    if not condition:
        raise VerificationError(what)


class Recomputation:
    """The adapters of a job, made again from the sums round by round."""

    def __init__(
        self,
        plan: TrainingPlan,
        start: Vector | None,
        sums: Sums | None,
        adapters: Adapters | None,
    ) -> None:
        self.not_recomputed: list[int] = []
        self._plan = plan
        self._sums = sums
        self._adapters = adapters
        self._state = ServerState()
        # None from the first round on that is not recomputed: the next ones start from it.
        self._vector = start
        self._products: fedsvd.SummedProducts | None = None

    def verify(
        self, release: Release, cohort: int, counts: SiteCounts | None, *, held_back: bool
    ) -> None:
        """Requires that a release follows from its sum.

        Args:
            cohort: number of sites of the attempt.
            counts: the summed counts of the sites, if the plan asks for them.
            held_back: whether the release gate held the adapter of the round back.

        Raises:
            RemoteProtocolError, VerificationError: it does not.
        """
        total = self._total(release)
        if total is None:
            self.not_recomputed.append(release.round)
            # A round that was held back changed nothing that the next ones start from.
            self._vector = self._vector if held_back else None
            return
        plan, survivors = self._plan, len(release.survivors)
        weight = secagg_sums.read_sum(plan, release.round, total, cohort=cohort)
        require_that(weight == release.total_weight, "its weight is not the one in its sum")
        if counts is not None:
            found = secagg_sums.counts_in(plan, total, cohort=cohort, survivors=survivors)
            require_that(counts == found, "its counts are not those in its sum")
        if held_back or self._vector is None:
            return
        if plan.lora.method == "fedsvd":
            self._follow(release, total, self._vector)
            return
        secagg_sums.move(plan, release.round, total, self._vector, self._state)
        require_that(
            adapter_digest(plan.digest(), self._vector) == release.adapter,
            "its adapter does not follow from its sum",
        )

    def _total(self, release: Release) -> RingVector | None:
        if self._sums is None or self._vector is None or not isinstance(release, Release2):
            return None
        total = self._sums(release.sum)
        require_that(
            total is None or sum_digest(total) == release.sum, "its sum is not the one it names"
        )
        return total

    def _follow(self, release: Release, total: RingVector, before: Vector) -> None:
        """Compares a released adapter of the method fedsvd, and starts the next round from it."""
        plan = self._plan
        released = None if self._adapters is None else self._adapters(release.adapter)
        if released is None:
            self.not_recomputed.append(release.round)
            self._vector = None
            return
        require_that(
            adapter_digest(plan.digest(), released) == release.adapter,
            "its adapter is not the one it names",
        )
        moved = before.copy()
        secagg_sums.move(plan, release.round, total, moved, self._state)
        fedsvd.require_refactorised(plan, moved, released)
        if self._products is None:
            self._products = fedsvd.SummedProducts(plan, before)
        self._products.require_near(before, moved, released)
        fedsvd.carry_state(plan, before, released, self._state)
        self._vector = released.copy()
