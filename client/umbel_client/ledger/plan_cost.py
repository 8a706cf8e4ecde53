"""What a whole plan would cost a data set, on top of what was spent: from public figures only.

This module is part of the core of the privacy guarantee. Never add a figure of the records, and
never leave out a round that another job was charged.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.rows import EVALUATION, Contents, Reservation
from umbel_client.privacy.accounting import DpEvent, largest_delta, total_epsilon
from umbel_client.privacy.calibration import SiteNoise, evaluation_event, noise_for
from umbel_client.site.config import ClientConfig
from umbel_client.site.policy import Budget
from umbel_common.errors import BudgetError
from umbel_common.plans.plan import TrainingPlan


@dataclass(frozen=True)
class PlanCost:
    """A plan's epsilon beside what its data set has spent; all at the budget's delta."""

    former: tuple[DpEvent | None, ...]
    """What other jobs were charged. None is a release without differential privacy."""
    own: tuple[DpEvent | None, ...]
    """All rounds of the plan, with their evaluation."""
    budget: Budget

    def spent(self) -> float:
        """Epsilon of all other jobs."""
        return total_epsilon(self.former, self.budget.delta)

    def alone(self) -> float:
        """Epsilon of the whole plan, by itself."""
        return total_epsilon(self.own, self.budget.delta)

    def after(self) -> float:
        """Epsilon of everything, once the plan has ended; less than the sum of the two."""
        return total_epsilon((*self.former, *self.own), self.budget.delta)


def budget_of(config: ClientConfig, plan: TrainingPlan) -> Budget:
    """The budget of a site's data set under a plan."""
    budget = config.policy.budget(plan)
    # The bound on one plan's delta holds for the budget too: with probability delta anything may be
    # revealed, of any record.
    return Budget(budget.epsilon, min(budget.delta, largest_delta(config.data.public_size)))


def plan_cost(
    plan: TrainingPlan,
    noise: SiteNoise,
    history: Iterable[Reservation],
    budget: Budget,
    *,
    unknown: bool = False,
) -> PlanCost:
    """The cost of a plan on a data set.

    Args:
        noise: with which this site would train.
        history: every round that its ledger holds.
        unknown: whether it was stated that nobody knows what was spent.
    """
    names = (plan.job, plan.job + EVALUATION)
    former = [entry.event for entry in history if entry.job not in names]
    own = [noise.event(plan.training.steps)]
    if plan.evaluation is not None:
        own.append(evaluation_event(plan, rounds=plan.training.rounds))
    return PlanCost((*former, *([None] if unknown else [])), tuple(own), budget)


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
        contents.rounds.values(),
        budget_of(config, plan),
        unknown=contents.unknown,
    )


def require_payable(cost: PlanCost, plan: TrainingPlan, config: ClientConfig) -> None:
    """Refuses, before the first round, what the ledger would refuse in some later round.

    Raises:
        BudgetError: the whole plan would exceed the data set's budget.
    """
    if cost.budget.epsilon == math.inf:
        return
    after = cost.after()
    if after > cost.budget.epsilon:
        raise BudgetError(
            "the privacy budget of this data set does not allow the whole plan",
            file=config.data.path,
            field="policy.total_epsilon",
            found=f"{after:.4g} with the plan {plan.job}",
            accepted=f"at most {cost.budget.epsilon:g} at delta {cost.budget.delta:g}",
            remedy="agree on a plan with a smaller epsilon; what is spent does not come back",
        )
