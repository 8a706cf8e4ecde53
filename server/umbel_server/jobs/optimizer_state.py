"""The state of the server's optimizer between the rounds of a job.

It is kept in no file: it follows from the plan and the sums of the rounds that were released, which
the journal names and the registry has. So no crash, held-back round or restored backup can leave a
state beside a release that it does not belong to.
"""

import numpy as np

from umbel_common.adapters import fedsvd
from umbel_common.adapters.server_step import ServerState
from umbel_common.adapters.vector import Vector
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.server_optimizer import Average
from umbel_common.plans.statements import RELEASE_VERSIONS, Release, Release2
from umbel_common.secagg import sums
from umbel_common.trust.identity import Identity, Signed, open_signed
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry


class OptimizerState:
    """The state of one job's optimizer, in memory while the job runs."""

    def __init__(
        self, plan: TrainingPlan, operator: Identity, journal: Journal, registry: Registry
    ) -> None:
        self._plan = plan
        self._operator = operator
        self._journal = journal
        self._registry = registry
        self._known: tuple[int, ServerState] | None = None

    def take(self, round_number: int) -> ServerState:
        """The state after a round, which the caller may change: it is forgotten here.

        Args:
            round_number: the round of the latest release.

        Raises:
            StorageError: a sum that it follows from is missing or damaged.
        """
        known, self._known = self._known, None
        if known is not None and known[0] == round_number:
            return known[1]
        return self._computed(round_number)

    def keep(self, round_number: int, state: ServerState) -> None:
        """Remembers the state after a round that was released."""
        self._known = round_number, state

    def _computed(self, last: int) -> ServerState:
        state = ServerState()
        if isinstance(self._plan.server, Average):
            return state
        plan = self._plan
        held_back = {one.round for one in self._journal.evaluations(plan.job) if one.held_back}
        # The steps of an optimizer do not depend on the adapter that they move.
        scratch = np.zeros(plan.lora.size, dtype=np.float32)
        before, *later = [self._open(signed) for signed in self._journal.releases(plan.job)]
        for number, release in enumerate(later[:last], start=1):
            if number in held_back:
                continue
            assert isinstance(release, Release2)  # an optimizer is of a plan of version 2
            total = self._registry.load_sum(plan, release.sum)
            sums.move(plan, number, total, scratch, state)
            if plan.lora.method == "fedsvd":
                fedsvd.carry_state(plan, self._load(before), self._load(release), state)
            before = release
        return state

    def _open(self, signed: Signed) -> Release:
        return open_signed(signed, RELEASE_VERSIONS, self._operator.public_key)

    def _load(self, release: Release) -> Vector:
        return self._registry.load(self._plan, release.adapter)
