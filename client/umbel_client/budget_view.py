"""What a ledger's rounds have cost, as values and as people read them."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from umbel_client.accounting import total_epsilon
from umbel_client.budget import Budget
from umbel_client.ledger_rows import Contents, Reservation, State
from umbel_client.state_spend_cli import statement_text
from umbel_common.canonical import Value
from umbel_host.console import print_lines


class JobCost(Value, frozen=True):
    """One job's part."""

    job: str
    rounds: int
    """That were charged."""
    epsilon: float
    """Of this job alone."""


class Spending(Value, frozen=True):
    """How a data set stands. An infinite epsilon: a round without differential privacy."""

    data_set: str
    """Its digest, 64 hexadecimal digits."""
    unit: str | None
    """The column that says whose a record is; None: each record is its own unit."""
    head: str
    """Of the ledger, 64 hexadecimal digits."""
    delta: float
    total: float
    """Epsilon that the policy allows."""
    spent: float
    """Epsilon of all jobs together: less than the sum of theirs, by composition."""
    left: float
    jobs: tuple[JobCost, ...]
    old_copy: bool
    """Whether the ledger is an old copy, and nobody stated yet what was spent since."""
    stated: tuple[str, ...]
    """What was stated about spends that the ledger did not know, each with who, when and why."""


class ReleaseCost(Value, frozen=True):
    """One charged round."""

    job: str
    round: int
    state: State
    plan: str
    """The plan's digest, 64 hexadecimal digits."""
    noise_multiplier: float | None
    sample_rate: float | None
    steps: int | None
    """None, all three, without differential privacy."""
    epsilon: float
    """Of everything on the data set up to this round."""


class Verified(Value, frozen=True):
    """A ledger that is intact and contains these heads, each of 64 hexadecimal digits."""

    head: str
    rows: int
    last_signed: str | None
    """That this site signed last; None before its first attempt."""
    given: str | None
    """That was asked about."""


def spending(contents: Contents, allowed: Budget) -> Spending:
    """How a data set stands against what the policy allows."""
    rounds = list(contents.rounds.values())
    spent = total_epsilon(contents.events(), allowed.delta)
    jobs: dict[str, list[Reservation]] = {}
    for entry in rounds:
        jobs.setdefault(entry.job, []).append(entry)
    return Spending(
        data_set=contents.data_set.hex(),
        unit=contents.unit,
        head=contents.head().hex(),
        delta=allowed.delta,
        total=allowed.epsilon,
        spent=spent,
        left=max(allowed.epsilon - spent, 0.0),
        jobs=tuple(JobCost(job, len(own), _cost(own, allowed.delta)) for job, own in jobs.items()),
        old_copy=contents.restored,
        stated=tuple(statement_text(stated) for stated in contents.statements),
    )


def release_costs(contents: Contents, delta: float) -> tuple[ReleaseCost, ...]:
    """Every charged round, in the order in which they were charged."""
    rounds = list(contents.rounds.values())
    return tuple(
        ReleaseCost(
            job=entry.job,
            round=entry.round,
            state=entry.state,
            plan=entry.plan.hex(),
            noise_multiplier=None if entry.event is None else entry.event.noise_multiplier,
            sample_rate=None if entry.event is None else entry.event.sample_rate,
            steps=None if entry.event is None else entry.event.steps,
            epsilon=_cost(rounds[:number], delta),
        )
        for number, entry in enumerate(rounds, start=1)
    )


def print_spending(console: Console, ledger: Path, spent: Spending) -> None:
    """The figures, then each job's part."""
    print_lines(
        console,
        [
            ("ledger", str(ledger)),
            ("data set", spent.data_set),
            ("unit", "record" if spent.unit is None else f"column {spent.unit}"),
            ("head", spent.head),
            ("spent", f"epsilon {_number(spent.spent)} at delta {spent.delta:g}"),
            ("left", f"epsilon {_number(spent.left)} of {_number(spent.total)}"),
            *(("stated", text) for text in spent.stated),
            *([("old copy", "state what was spent since")] if spent.old_copy else []),
        ],
    )
    if spent.jobs:
        console.print()
        rows = [(job.job, str(job.rounds), _number(job.epsilon)) for job in spent.jobs]
        _print_table(console, ("job", "rounds", "epsilon alone"), rows)


def print_history(console: Console, releases: Sequence[ReleaseCost], delta: float) -> None:
    """One line for each round."""
    if not releases:
        console.print("No round was charged yet.")
        return
    rows = [
        (
            release.job,
            str(release.round),
            release.state.value,
            *(
                ("none", "", "")
                if release.noise_multiplier is None
                else (
                    f"{release.noise_multiplier:.4g}",
                    f"{release.sample_rate:.4g}",
                    str(release.steps),
                )
            ),
            _number(release.epsilon),
        )
        for release in releases
    ]
    _print_table(console, ("job", "round", "state", "noise", "rate", "steps", "epsilon"), rows)
    console.print(f"\nEpsilon is of everything up to that round, at delta {delta:g}.")


def _cost(rounds: Iterable[Reservation], delta: float) -> float:
    return total_epsilon([entry.event for entry in rounds], delta)


def _number(epsilon: float) -> str:
    return "infinite" if epsilon == math.inf else f"{epsilon:.4g}"


def _print_table(
    console: Console, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]
) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        left = name in ("job", "state")
        table.add_column(
            name, no_wrap=name != "job", overflow="fold", justify="left" if left else "right"
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)
