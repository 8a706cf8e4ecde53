"""What an attempt of distributed mode costs: from the plan alone, against two kinds of observers.

Each attempt draws a new batch and new noise, so each is a DP event of its own. What an observer
knows of the noise decides which event:

- *Everybody* may know the noise of all other sites: the server and every peer together. Against
  them only this site's own share counts (h = 1).
- *Readers of the sums* know the sums and nothing of the noise of `honest` sites in each of them.
  Against them the shares of those sites count together (h = honest).

This module is part of the core of the privacy guarantee. Never add or change here:

- A figure that does not stand in the plan, such as a size that somebody states.
- A number of coordinates below that of the largest round, or of attempts below the plan's.
- A cost of the sums without that of the counts that travel in them. Each site's counts have all
  their noise, so they cost the same whoever looks.
"""

from typing import Annotated, NamedTuple

import msgspec

from umbel_client.privacy.accounting import DpEvent, total_epsilon
from umbel_client.privacy.discrete_gaussian import FEWEST_BITS
from umbel_client.privacy.shared_noise import shares_of
from umbel_client.site.policy import Policy
from umbel_common.canonical import Value
from umbel_common.errors import CalibrationError, PolicyRefusal
from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan


class Epsilons(NamedTuple):
    """Two upper bounds on one and the same release."""

    everybody: float
    shared: float
    """Against readers of the sums."""


class AttemptCost(Value, frozen=True):
    """What each attempt of a job costs. Rows of ledgers hold it: no field of it ever changes."""

    everybody: DpEvent
    """The step, against who knows all noise but this site's own."""
    shared: DpEvent
    """The same step, against who reads the sums only."""
    honest: Annotated[int, msgspec.Meta(ge=1)]
    """Number of sites in each sum, this one included, whose noise those readers do not know."""
    counts: DpEvent | None
    """The counts of held-out records, against anybody; None: the plan has no evaluation."""
    most_attempts: Annotated[int, msgspec.Meta(ge=1)]
    """Largest number of attempts of the whole job."""

    def for_everybody(self, attempts: int) -> tuple[DpEvent, ...]:
        """The DP events of some attempts against everybody."""
        return self._events(self.everybody, attempts)

    def for_readers(self, attempts: int) -> tuple[DpEvent, ...]:
        """The DP events of some attempts against readers of the sums."""
        return self._events(self.shared, attempts)

    def epsilons(self, delta: float) -> Epsilons:
        """Epsilon of the job's most attempts, by themselves."""
        return Epsilons(
            total_epsilon(self.for_everybody(self.most_attempts), delta),
            total_epsilon(self.for_readers(self.most_attempts), delta),
        )

    def _events(self, step: DpEvent, attempts: int) -> tuple[DpEvent, ...]:
        if attempts == 0:
            return ()
        return tuple(
            msgspec.structs.replace(event, steps=event.steps * attempts)
            for event in (step, self.counts)
            if event is not None
        )


def attempt_cost(plan: TrainingPlan) -> AttemptCost | None:
    """What each attempt under a plan costs; None: the plan is not of distributed mode.

    Raises:
        CalibrationError: the plan's noise is too small to be compared with a Gaussian.
    """
    privacy = plan.privacy
    if not isinstance(privacy, DistributedPrivacy):
        return None
    if privacy.noise_bits < FEWEST_BITS:
        raise CalibrationError(
            "the noise of a site has too few steps of the grid",
            field="privacy.noise_bits",
            found=privacy.noise_bits,
            accepted=f"at least {FEWEST_BITS}",
            remedy="agree on a plan with a finer aggregation.step and more noise_bits",
        )
    shares = shares_of(plan)
    return AttemptCost(
        everybody=shares.event(1, privacy.sampling_rate),
        shared=shares.event(privacy.honest, privacy.sampling_rate),
        honest=privacy.honest,
        counts=None
        if plan.evaluation is None
        else DpEvent(plan.evaluation.noise_multiplier, 1.0, 1),
        most_attempts=privacy.most_attempts,
    )


def judge_cost(policy: Policy, plan: TrainingPlan) -> None:
    """Refuses a plan of distributed mode that costs more than it claims, or than a site allows.

    The claim, `privacy.epsilon`, is against readers of the sums. `judge_plan` compares it with the
    policy; here it is computed again.

    Raises:
        CalibrationError: see `attempt_cost`.
        PolicyRefusal: `claim-exceeded` or `epsilon-too-large`.
    """
    privacy, cost = plan.privacy, attempt_cost(plan)
    if cost is None or not isinstance(privacy, DistributedPrivacy):
        return
    found = cost.epsilons(privacy.delta)
    if not found.shared <= privacy.epsilon:
        raise PolicyRefusal(
            "claim-exceeded",
            "a plan costs more against readers of the sums than it claims",
            field="privacy.epsilon",
            found=f"{found.shared:.4g} in {cost.most_attempts} attempts",
            accepted=f"at most the plan's claim, {privacy.epsilon:g}",
            remedy="agree on a plan with more noise, or with fewer attempts",
        )
    if not found.everybody <= policy.max_epsilon:
        raise PolicyRefusal(
            "epsilon-too-large",
            "this site's policy refuses: epsilon too large against everybody",
            field="policy.max_epsilon",
            found=f"{found.everybody:.4g}, if all other sites tell their noise",
            accepted=f"at most {policy.max_epsilon:g}",
            remedy="agree on another plan, or change this site's policy",
        )
