"""What a whole plan would cost a data set, on top of what was spent: from public figures only.

There are two totals: against everybody, and against readers of the sums (`attempt_cost`). They
differ where a job is of distributed mode.

This module is part of the core of the privacy guarantee. Never add a figure of the records, and
never leave out a round or an attempt that another job was charged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from umbel_client.ledger.contents import Contents, events_of
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.rows import EVALUATION, Charge, Reservation
from umbel_client.privacy.accounting import DpEvent, largest_delta, total_epsilon
from umbel_client.privacy.attempt_cost import attempt_cost
from umbel_client.privacy.calibration import SiteNoise, evaluation_event, noise_for
from umbel_client.site.config import ClientConfig
from umbel_client.site.policy import Budget
from umbel_common.errors import BudgetError
from umbel_common.plans.plan import TrainingPlan


@dataclass(frozen=True)
class Total:
    """A plan's epsilon beside what its data set has spent, against one kind of observer."""

    former: tuple[DpEvent | None, ...]
    """What other jobs were charged. None is a release without differential privacy."""
    own: tuple[DpEvent | None, ...]
    """The whole plan, with its evaluation."""
    delta: float

    def spent(self) -> float:
        """Epsilon of all other jobs."""
        return total_epsilon(self.former, self.delta)

    def alone(self) -> float:
        """Epsilon of the whole plan, by itself."""
        return total_epsilon(self.own, self.delta)

    def after(self) -> float:
        """Epsilon of everything, once the plan has ended; less than the sum of the two."""
        return total_epsilon((*self.former, *self.own), self.delta)


@dataclass(frozen=True)
class PlanCost:
    """A plan's cost beside what its data set has spent; all at the budget's delta."""

    everybody: Total
    shared: Total
    """Against readers of the sums."""
    honest: int | None
    """Number of sites in each sum, this one included, whose noise those readers must not know for
    `shared` to hold. None: neither the plan nor another job is of distributed mode, and the two
    totals are one."""
    budget: Budget


def budget_of(config: ClientConfig, plan: TrainingPlan) -> Budget:
    """The budget of a site's data set under a plan."""
    budget = config.policy.budget(plan)
    # The bound on one plan's delta holds for the budget too: with probability delta anything may be
    # revealed, of any record.
    delta = min(budget.delta, largest_delta(config.data.public_size))
    return Budget(budget.epsilon, delta, budget.shared)


def plan_cost(
    plan: TrainingPlan,
    noise: SiteNoise,
    charges: Sequence[Charge],
    budget: Budget,
    *,
    unknown: bool = False,
) -> PlanCost:
    """The cost of a plan on a data set.

    Args:
        noise: with which this site would train; a plan of distributed mode has its own.
        charges: everything that its ledger holds.
        unknown: whether it was stated that nobody knows what was spent.

    Raises:
        CalibrationError: see `attempt_cost`.
    """
    names = (plan.job, plan.job + EVALUATION)
    former = [charge for charge in charges if charge.job not in names]
    lost = (None,) if unknown else ()
    cost = attempt_cost(plan)
    own: tuple[DpEvent | None, ...]
    own_shared: tuple[DpEvent | None, ...]
    if cost is None:
        own = (noise.event(plan.training.steps),)
        if plan.evaluation is not None:
            own += (evaluation_event(plan, rounds=plan.training.rounds),)
        own_shared = own
    else:
        own = cost.for_everybody(cost.most_attempts)
        own_shared = cost.for_readers(cost.most_attempts)
    honest = [charge.cost.honest for charge in former if not isinstance(charge, Reservation)]
    if cost is not None:
        honest.append(cost.honest)
    return PlanCost(
        Total((*events_of(former, shared=False), *lost), own, budget.delta),
        Total((*events_of(former, shared=True), *lost), own_shared, budget.delta),
        max(honest, default=None),
        budget,
    )


def cost_here(config: ClientConfig, plan: TrainingPlan) -> PlanCost:
    """The cost of a plan on this site's data set, whose ledger need not exist yet.

    Raises:
        CalibrationError, PolicyRefusal, DataError: see `noise_for`.
        LedgerError, StorageError: the ledger cannot be read.
    """
    path = config.state_folder.ledger
    contents = read_ledger(path) if path.exists() else Contents()
    return plan_cost(
        plan,
        noise_for(plan, config.data.public_size),
        contents.charges(),
        budget_of(config, plan),
        unknown=contents.unknown,
    )


def require_payable(cost: PlanCost, plan: TrainingPlan, config: ClientConfig) -> None:
    """Refuses, before the first round, what the ledger would refuse in some later round.

    Raises:
        BudgetError: the whole plan would exceed one of the data set's two budgets.
    """
    totals = (
        ("", "total_epsilon", cost.everybody, cost.budget.epsilon),
        (" against readers of the sums", "total_shared_epsilon", cost.shared, cost.budget.shared),
    )
    for whom, field, total, most in totals:
        if most is None or most == math.inf:
            continue
        after = total.after()
        if not after <= most:
            raise BudgetError(
                f"the privacy budget of this data set{whom} does not allow the whole plan",
                file=config.data.path,
                field=f"policy.{field}",
                found=f"{after:.4g} with the plan {plan.job}",
                accepted=f"at most {most:g} at delta {cost.budget.delta:g}",
                remedy="agree on a plan with a smaller epsilon; what is spent does not come back",
            )
