"""What a site's administrator states about a spend that the ledger does not know.

This module is part of the core of the privacy guarantee. Never charge less than was stated.

A statement names the last round of each job that this site was asked to train for. Every round up
to it is charged, also a round that the site took no part in: that costs too much and never too
little. The noise of a round is known, because all rounds of a job have the same noise: the ledger
has it, or the job's plan.

In distributed mode each attempt is charged, and the last round does not tell how many there were.
So a statement counts the attempts of such a job too, over all its rounds.
"""

from collections.abc import Mapping, Sequence

from umbel_client.ledger.contents import Contents
from umbel_client.ledger.rows import (
    EVALUATION,
    Reservation,
    Stated,
    StatedAttempts,
    StatedRound,
    StatedWithAttempts,
)
from umbel_client.privacy.accounting import DpEvent
from umbel_client.privacy.attempt_cost import AttemptCost, attempt_cost
from umbel_client.privacy.calibration import noise_for
from umbel_common.errors import BudgetError
from umbel_common.plans.plan import TrainingPlan


def stated_rounds(
    contents: Contents, reached: Mapping[str, int], plans: Sequence[TrainingPlan], public_size: int
) -> tuple[StatedRound, ...]:
    """The rounds of local mode that a statement adds to a ledger.

    Args:
        reached: the last round of each job that this site was asked for.
        plans: plans of jobs that have no round in the ledger.
        public_size: `data.public_size` of client.toml, from which the noise of a plan follows.

    Raises:
        BudgetError: a job is unknown here, and its plan was not given.
        CalibrationError, DataError, PolicyRefusal: the plan cannot have run here.
    """
    rounds: list[StatedRound] = []
    for job, last in reached.items():
        if _shares_noise(job, contents, plans) is not None:
            continue
        missing = _missing(job, last, contents)
        if missing:
            plan, event = _of_job(job, contents, plans, public_size)
            rounds += [StatedRound(job, plan, number, event) for number in missing]
        counted = _of_counts(job, contents, plans)
        if counted is not None:
            name, (plan, event) = job + EVALUATION, counted
            missing = _missing(name, last, contents)
            rounds += [StatedRound(name, plan, number, event) for number in missing]
    return tuple(rounds)


def stated_attempts(
    contents: Contents,
    reached: Mapping[str, int],
    counts: Mapping[str, int],
    plans: Sequence[TrainingPlan],
) -> tuple[StatedAttempts, ...]:
    """The attempts of distributed mode that a statement adds to a ledger.

    Args:
        reached: the last round of each job that this site was asked for.
        counts: number of attempts that it was asked for, over all rounds of each job.
        plans: plans of jobs that have no attempt in the ledger.

    Raises:
        BudgetError: the attempts of a job are not counted, or fewer than the ledger has, or the job
            is of local mode.
        CalibrationError: the plan cannot have run here.
    """
    for job in counts.keys() - reached.keys():
        raise BudgetError(
            "attempts are stated of a job whose last round is not",
            field=job,
            remedy="add --rounds with the last round that this site was asked for",
        )
    stated: list[StatedAttempts] = []
    for job, last in reached.items():
        found = _shares_noise(job, contents, plans)
        if found is None:
            if job in counts:
                raise BudgetError(
                    "attempts are stated of a job of local mode, where a round is charged once",
                    field=job,
                    remedy="leave its --attempts away",
                )
            continue
        plan, cost = found
        known = contents.jobs[job].count if job in contents.jobs else 0
        count = counts.get(job)
        if count is None or count < known:
            raise BudgetError(
                "the attempts of a job of distributed mode have to be counted",
                field=job,
                found="no --attempts" if count is None else count,
                accepted=f"{known} (as the ledger has) to {cost.most_attempts}",
                remedy="--attempts JOB=COUNT, over all its rounds, also those that were aborted;"
                f" where nobody knows the number, {cost.most_attempts}",
            )
        stated.append(StatedAttempts(job, plan, last, count - known, cost))
    return tuple(stated)


def _shares_noise(
    job: str, contents: Contents, plans: Sequence[TrainingPlan]
) -> tuple[bytes, AttemptCost] | None:
    """Plan and cost of a job of distributed mode; None: it is of another, or not known."""
    known = contents.jobs.get(job)
    if known is not None:
        return known.plan, known.cost
    for plan in plans:
        if plan.job == job and (cost := attempt_cost(plan)) is not None:
            return plan.digest(), cost
    return None


def _missing(name: str, last: int, contents: Contents) -> list[int]:
    return [number for number in range(1, last + 1) if (name, number) not in contents.rounds]


def _of_counts(
    job: str, contents: Contents, plans: Sequence[TrainingPlan]
) -> tuple[bytes, DpEvent | None] | None:
    """Plan and DP event of a job's evaluation counts in a round; None if it has no evaluation."""
    for entry in contents.rounds.values():
        if entry.job == job + EVALUATION:
            return entry.plan, entry.event
    for plan in plans:
        if plan.job == job and plan.evaluation is not None:
            return plan.digest(), DpEvent(plan.evaluation.noise_multiplier, 1.0, 1)
    return None


def _of_job(
    job: str, contents: Contents, plans: Sequence[TrainingPlan], public_size: int
) -> tuple[bytes, DpEvent | None]:
    known = [entry for entry in contents.rounds.values() if entry.job == job]
    if known:
        costliest = min(known, key=_noise)
        return costliest.plan, costliest.event
    found = [plan for plan in plans if plan.job == job]
    if not found:
        raise BudgetError(
            "the rounds of a job are stated, and nothing is known here about the job",
            field=job,
            accepted=tuple(sorted({entry.job for entry in contents.rounds.values()})) or None,
            remedy="add its plan, which the operator has: --plan FILE",
        )
    plan = found[0]
    noise = noise_for(plan, public_size)
    if noise.noise_multiplier is None:
        return plan.digest(), None
    event = DpEvent(noise.noise_multiplier, noise.sampling_rate, plan.training.local_steps)
    return plan.digest(), event


def _noise(entry: Reservation) -> float:
    return 0.0 if entry.event is None else entry.event.noise_multiplier


def statement_text(stated: Stated) -> str:
    """A statement in one line, for people."""
    last: dict[str, int] = {}
    for entry in stated.rounds:
        last[entry.job] = max(entry.round, last.get(entry.job, 0))
    parts = [f"{job} came to round {number}" for job, number in last.items()]
    if isinstance(stated, StatedWithAttempts):
        parts += [
            f"{one.job} came to round {one.round}, with {one.attempts} attempts more"
            for one in stated.attempts
        ]
    if stated.everything:
        what = "nobody knows what was spent: epsilon is infinite"
    else:
        what = ", ".join(parts) or "nothing was spent that was not known"
    return f"{what} ({stated.by}, {stated.at}: {stated.why})"
