"""What the rounds of a ledger have cost, as values."""

from msgspec import UNSET, UnsetType

from umbel_client.ledger.contents import Contents, events_of
from umbel_client.ledger.rows import (
    Attempt,
    Charge,
    Reservation,
    RoundState,
    StatedAttempts,
)
from umbel_client.ledger.statement import statement_text
from umbel_client.privacy.accounting import total_epsilon
from umbel_client.site.policy import Budget
from umbel_common.canonical import Value


class JobCost(Value, frozen=True):
    """One job's part."""

    job: str
    rounds: int
    """Number of charged rounds: in distributed mode, of rounds with an attempt."""
    epsilon: float
    """Epsilon of this job alone, against everybody."""
    attempts: int | None = None
    """Number of charged attempts in distributed mode; None in local mode."""
    shared_epsilon: float | None = None
    """As `epsilon`, against readers of the sums; None where no job is of distributed mode."""


class SharedSpending(Value, frozen=True):
    """What a data set has cost against readers of the sums."""

    total: float | None
    """Epsilon that the policy allows; None: it names none."""
    spent: float
    left: float | None
    honest: int
    """Number of sites in each sum, this one included, whose noise those readers must not know."""


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
    """Epsilon that the policy allows, against everybody."""
    spent: float
    """Epsilon of all jobs together, against everybody; by composition it is less than the sum of
    theirs."""
    left: float
    jobs: tuple[JobCost, ...]
    old_copy: bool
    """Whether the ledger is an old copy, and nobody has stated yet what was spent since."""
    stated: tuple[str, ...]
    """Each statement about a spend that the ledger did not know, with who, when and why."""
    shared: SharedSpending | None
    """The second total; None: nothing was charged in distributed mode, and the two are one."""


class ReleaseCost(Value, frozen=True):
    """One charged round of local mode, one attempt of distributed mode, or stated attempts."""

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
    """Epsilon of everything on the data set up to this round, against everybody; unset where it is
    not computed."""
    attempt: int | UnsetType = UNSET
    """Number of the attempt; unset in local mode, and where attempts were stated."""
    attempts: int | UnsetType = UNSET
    """Number of attempts that were stated; otherwise unset."""
    shared_noise_multiplier: float | UnsetType = UNSET
    """The noise multiplier of a sum for its readers; unset in local mode."""
    shared_epsilon: float | UnsetType = UNSET
    """As `epsilon`, against readers of the sums; unset where no job is of distributed mode."""


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
    spent = total_epsilon(contents.events(), allowed.delta)
    jobs: dict[str, list[Charge]] = {}
    for charge in contents.charges():
        jobs.setdefault(charge.job, []).append(charge)
    return Spending(
        data_set=contents.data_set.hex() or None,
        unit=contents.unit,
        head=contents.head().hex() if contents.heads else None,
        delta=allowed.delta,
        total=allowed.epsilon,
        spent=spent,
        left=max(allowed.epsilon - spent, 0.0),
        jobs=tuple(_job_cost(job, own, contents, allowed) for job, own in jobs.items()),
        old_copy=contents.old_copy,
        stated=tuple(statement_text(stated) for stated in contents.statements),
        shared=_shared(contents, allowed),
    )


def _shared(contents: Contents, allowed: Budget) -> SharedSpending | None:
    if contents.honest is None:
        return None
    spent = total_epsilon(contents.events(shared=True), allowed.delta)
    left = None if allowed.shared is None else max(allowed.shared - spent, 0.0)
    return SharedSpending(allowed.shared, spent, left, contents.honest)


def _job_cost(job: str, own: list[Charge], contents: Contents, allowed: Budget) -> JobCost:
    attempts = contents.jobs.get(job)
    return JobCost(
        job,
        len({charge.round for charge in own}),
        _cost(own, allowed.delta),
        None if attempts is None else attempts.count,
        None if contents.honest is None else _cost(own, allowed.delta, shared=True),
    )


def charged_text(contents: Contents) -> str:
    """How much was charged, for people."""
    rounds = f"{len(contents.rounds)} rounds"
    count = sum(job.count for job in contents.jobs.values())
    return f"{rounds} and {count} attempts charged" if contents.jobs else f"{rounds} charged"


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
    charges = contents.charges()
    last = {charge.job: number for number, charge in enumerate(charges, start=1)}
    every = every or len(charges) <= FEW_ROUNDS
    return tuple(
        _release_cost(
            charge,
            charges[:number] if every or last[charge.job] == number else None,
            delta,
            shared=contents.honest is not None,
        )
        for number, charge in enumerate(charges, start=1)
    )


def _release_cost(
    charge: Charge, up_to: list[Charge] | None, delta: float, *, shared: bool
) -> ReleaseCost:
    """One line of the history.

    Args:
        up_to: everything up to this charge; None: no epsilon is computed.
        shared: whether there is a second total.
    """
    event = charge.event if isinstance(charge, Reservation) else charge.cost.everybody
    attempt: int | UnsetType = UNSET
    attempts: int | UnsetType = UNSET
    shared_noise: float | UnsetType = UNSET
    if isinstance(charge, Attempt):
        attempt = charge.attempt
    if isinstance(charge, StatedAttempts):
        attempts = charge.attempts
    if not isinstance(charge, Reservation):
        shared_noise = charge.cost.shared.noise_multiplier
    return ReleaseCost(
        job=charge.job,
        round=charge.round,
        state=RoundState.LOST if isinstance(charge, StatedAttempts) else charge.state,
        plan=charge.plan.hex(),
        noise_multiplier=None if event is None else event.noise_multiplier,
        sample_rate=None if event is None else event.sample_rate,
        steps=None if event is None else event.steps,
        epsilon=UNSET if up_to is None else _cost(up_to, delta),
        attempt=attempt,
        attempts=attempts,
        shared_noise_multiplier=shared_noise,
        shared_epsilon=UNSET if up_to is None or not shared else _cost(up_to, delta, shared=True),
    )


def _cost(charges: list[Charge], delta: float, *, shared: bool = False) -> float:
    return total_epsilon(events_of(charges, shared=shared), delta)
