"""What the rounds of a ledger have cost, as values."""

from collections.abc import Iterable

from msgspec import UNSET, UnsetType

from umbel_client.ledger.rows import Contents, Reservation, RoundState
from umbel_client.ledger.statement import statement_text
from umbel_client.privacy.accounting import total_epsilon
from umbel_client.site.policy import Budget
from umbel_common.canonical import Value


class JobCost(Value, frozen=True):
    """One job's part."""

    job: str
    rounds: int
    """Number of charged rounds."""
    epsilon: float
    """Epsilon of this job alone."""


class Spending(Value, frozen=True):
    """What a data set has cost. Epsilon is infinite after a round without differential privacy."""

    data_set: str | None
    """Its digest, 64 hexadecimal digits; None before the first plan, which makes the ledger."""
    unit: str | None
    """The column that says whose a record is; None: each record is its own unit."""
    head: str | None
    """Head of the ledger, 64 hexadecimal digits; None before the first plan."""
    delta: float
    total: float
    """Epsilon that the policy allows."""
    spent: float
    """Epsilon of all jobs together; by composition it is less than the sum of theirs."""
    left: float
    jobs: tuple[JobCost, ...]
    old_copy: bool
    """Whether the ledger is an old copy, and nobody has stated yet what was spent since."""
    stated: tuple[str, ...]
    """Each statement about a spend that the ledger did not know, with who, when and why."""


class ReleaseCost(Value, frozen=True):
    """One charged round."""

    job: str
    round: int
    state: RoundState
    plan: str
    """The plan's digest, 64 hexadecimal digits."""
    noise_multiplier: float | None
    sample_rate: float | None
    steps: int | None
    """Steps of the whole round. Noise multiplier, sampling rate and steps are None without
    differential privacy."""
    epsilon: float | UnsetType = UNSET
    """Epsilon of everything on the data set up to this round; unset where it is not computed."""


class Verified(Value, frozen=True):
    """A ledger that is intact and contains these heads, 64 hexadecimal digits each."""

    head: str
    rows: int
    last_signed: str | None
    """Ledger head that this site signed last; None before its first attempt."""
    given: str | None
    """The head given with --head."""


def spending(contents: Contents, allowed: Budget) -> Spending:
    """What a data set has cost, against what the policy allows."""
    rounds = list(contents.rounds.values())
    spent = total_epsilon(contents.events(), allowed.delta)
    jobs: dict[str, list[Reservation]] = {}
    for entry in rounds:
        jobs.setdefault(entry.job, []).append(entry)
    return Spending(
        data_set=contents.data_set.hex() or None,
        unit=contents.unit,
        head=contents.head().hex() if contents.heads else None,
        delta=allowed.delta,
        total=allowed.epsilon,
        spent=spent,
        left=max(allowed.epsilon - spent, 0.0),
        jobs=tuple(JobCost(job, len(own), _cost(own, allowed.delta)) for job, own in jobs.items()),
        old_copy=contents.old_copy,
        stated=tuple(statement_text(stated) for stated in contents.statements),
    )


FEW_ROUNDS = 30
"""Longest history in which each round has an epsilon: one takes up to a second."""


def release_costs(
    contents: Contents, delta: float, *, every: bool = False
) -> tuple[ReleaseCost, ...]:
    """Every charged round, in the order in which they were charged.

    Args:
        every: whether each round has an epsilon; otherwise, in a history of more than `FEW_ROUNDS`,
            only the last round of each job.
    """
    rounds = list(contents.rounds.values())
    last = {entry.job: number for number, entry in enumerate(rounds, start=1)}
    every = every or len(rounds) <= FEW_ROUNDS
    return tuple(
        ReleaseCost(
            job=entry.job,
            round=entry.round,
            state=entry.state,
            plan=entry.plan.hex(),
            noise_multiplier=None if entry.event is None else entry.event.noise_multiplier,
            sample_rate=None if entry.event is None else entry.event.sample_rate,
            steps=None if entry.event is None else entry.event.steps,
            epsilon=_cost(rounds[:number], delta) if every or last[entry.job] == number else UNSET,
        )
        for number, entry in enumerate(rounds, start=1)
    )


def _cost(rounds: Iterable[Reservation], delta: float) -> float:
    return total_epsilon([entry.event for entry in rounds], delta)
