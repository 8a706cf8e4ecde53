"""What a charge must pass before its row is written: the job's own past, and two totals.

This module is part of the core of the privacy guarantee. Never compare one total only: each limit
of a policy holds for everything that was ever charged. Never admit an attempt a second time, or one
past the plan's most.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from umbel_client.ledger.contents import Contents
from umbel_client.ledger.rows import AttemptKey, StatedAttempts
from umbel_client.privacy.accounting import DpEvent, total_epsilon
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_client.site.policy import Budget
from umbel_common.errors import BudgetError, LedgerError

_OTHER_NAME = "run another plan under another job name"
_ASK_AGAIN = "nothing: it stays charged, and the server may ask for another attempt"


def require_round(
    path: Path, contents: Contents, job: str, event: DpEvent | None, budget: Budget
) -> None:
    """Admits a round of local mode, whose event is the same in both totals.

    Args:
        path: the ledger's file, for errors.

    Raises:
        BudgetError: one of the two budgets does not allow it.
        LedgerError: the job was charged in distributed mode.
    """
    if job in contents.jobs:
        raise LedgerError(
            f"job {job} was charged in distributed mode", file=path, remedy=_OTHER_NAME
        )
    _require_totals(path, contents, [event], [event], budget)


def require_attempt(
    path: Path,
    contents: Contents,
    key: AttemptKey,
    plan: bytes,
    cost: AttemptCost,
    budget: Budget,
) -> None:
    """Admits an attempt of distributed mode, once.

    Args:
        path: the ledger's file, for errors.
        plan: digest of the plan, 32 bytes.
        cost: what each attempt of the plan costs.

    Raises:
        BudgetError: one of the two budgets does not allow it, or the plan's most attempts are used
            up.
        LedgerError: it was reserved before, its round is closed, or its job has another plan, cost
            or mode.
    """
    known = contents.attempts.get(key)
    if known is not None:
        raise LedgerError(
            f"{key} was reserved before, and is not computed again",
            file=path,
            field="state",
            found=known.state.value,
            remedy=_ASK_AGAIN,
        )
    _require_same_job(path, contents, key.job, plan, cost)
    job = contents.jobs.get(key.job)
    if job is not None and key.round <= job.closed:
        raise LedgerError(
            f"round {key.round} of job {key.job} was closed when its spend was stated",
            file=path,
            remedy="this site sits the round out, and takes part in later ones",
        )
    count = 0 if job is None else job.count
    if count >= cost.most_attempts:
        raise BudgetError(
            f"{key} is past the most attempts of its plan",
            file=path,
            field="privacy.most_attempts",
            found=f"{count} attempts were charged",
            accepted=f"at most {cost.most_attempts}",
            remedy="the job ends here: its epsilon was computed for this number",
        )
    if budget.shared is None:
        raise BudgetError(
            "this site's policy has no budget for sums whose noise sites share",
            file=path,
            field="policy.total_shared_epsilon",
            remedy="agree on a plan of local mode, or write this field (docs/privacy.md)",
        )
    _require_totals(path, contents, cost.for_everybody(1), cost.for_readers(1), budget)


def require_stated_attempts(path: Path, contents: Contents, stated: StatedAttempts) -> None:
    """Admits attempts that somebody states.

    Args:
        path: the ledger's file, for errors.

    Raises:
        LedgerError: the job has another plan, cost or mode, or they are more than it may have.
    """
    _require_same_job(path, contents, stated.job, stated.plan, stated.cost)
    job = contents.jobs.get(stated.job)
    total = stated.attempts + (0 if job is None else job.count)
    if total > stated.cost.most_attempts:
        raise LedgerError(
            f"more attempts are stated than job {stated.job} may have",
            file=path,
            found=total,
            accepted=f"at most {stated.cost.most_attempts}",
            remedy="where nobody knows the number, state the plan's most attempts",
        )


def _require_same_job(
    path: Path, contents: Contents, job: str, plan: bytes, cost: AttemptCost
) -> None:
    known = contents.jobs.get(job)
    if known is None:
        if any(charged == job for charged, _ in contents.rounds):
            raise LedgerError(f"job {job} was charged in local mode", file=path, remedy=_OTHER_NAME)
        return
    if (known.plan, known.cost) != (plan, cost):
        same_plan = known.plan == plan
        raise LedgerError(
            f"job {job} was charged for another plan or cost",
            file=path,
            field="cost" if same_plan else "plan",
            found=cost if same_plan else plan.hex(),
            accepted=known.cost if same_plan else known.plan.hex(),
            remedy=_OTHER_NAME,
        )


def _require_totals(
    path: Path,
    contents: Contents,
    everybody: Sequence[DpEvent | None],
    shared: Sequence[DpEvent | None],
    budget: Budget,
) -> None:
    """Refuses what one of the two totals does not allow.

    Args:
        everybody: what is to be charged, against everybody.
        shared: the same, against readers of the sums.
    """
    limit = math.inf if budget.shared is None else budget.shared
    for whom, of_readers, added, most in (
        ("", False, everybody, budget.epsilon),
        (" against readers of the sums", True, shared, limit),
    ):
        if most == math.inf:
            continue
        former = contents.events(shared=of_readers)
        after = total_epsilon([*former, *added], budget.delta)
        if not after <= most:
            raise BudgetError(
                f"the privacy budget of this data set{whom} does not allow another round",
                file=path,
                field=f"epsilon{whom}",
                found=f"{total_epsilon(former, budget.delta):.4g} spent, {after:.4g} with this"
                " round",
                accepted=f"at most {most:g} at delta {budget.delta:g}",
                remedy="what is spent does not come back: stop, or let the people who answer for"
                " the data raise the total in the site's policy",
            )
