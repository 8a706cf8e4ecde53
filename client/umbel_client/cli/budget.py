"""`umbel-client budget`: what this site's data set has cost so far. Only `carry` and `state-spend`
change anything.

The other commands read the ledger at one moment, also while a trainer is running, and need neither
model nor data.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import typer
from msgspec import UnsetType
from rich.console import Console
from rich.status import Status

from umbel_client.cli.options import CLIENT_TOML, Config, JsonWithInfinity
from umbel_client.cli.state_spend import state_spend
from umbel_client.ledger.contents import Contents
from umbel_client.ledger.file import read_ledger, require_head
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.spending import (
    FEW_ROUNDS,
    JobCost,
    ReleaseCost,
    Spending,
    Verified,
    release_costs,
    spending,
)
from umbel_client.privacy.accounting import largest_delta
from umbel_client.site.config import ClientConfig, load_config
from umbel_client.site.ipc import against_readers
from umbel_client.site.policy import Budget
from umbel_client.storage.site_state import read_site_state
from umbel_host.terminal import Screen, print_json, print_lines, say, table, working

budget = typer.Typer(
    help="The privacy spent on the data set: show, history, verify, carry, state-spend.",
    no_args_is_help=True,
)
budget.command()(state_spend)


def _digest(value: str | None) -> str | None:
    try:
        valid = value is None or len(bytes.fromhex(value)) == 32
    except ValueError:
        valid = False
    if not valid:
        raise typer.BadParameter("64 hexadecimal digits")
    return value


@budget.command()
def show(config: Config = CLIENT_TOML, as_json: JsonWithInfinity = False) -> None:
    """Show the epsilon that is spent, what is left, and each job's part."""
    settings = load_config(config)
    state = settings.state_folder
    if not state.ledger.exists() and not state.journal.exists():
        # With a journal there was a ledger, and it is missing.
        _print_nothing(settings, as_json)
        return
    contents, _ = read_site_state(state)
    with _computing():
        spent = spending(contents, _allowed(settings))
    if as_json:
        print_json(spent)
    else:
        print_spending(Screen(), str(settings.state_folder.ledger), spent)


@budget.command()
def history(
    config: Config = CLIENT_TOML,
    every_round: Annotated[
        bool,
        typer.Option(
            "--every-round",
            help=f"Compute the epsilon of each round, also in a history of more than {FEW_ROUNDS}"
            " rounds. Each takes up to a second.",
        ),
    ] = False,
    as_json: JsonWithInfinity = False,
) -> None:
    """Show every round that was charged, and the epsilon spent up to it."""
    settings = load_config(config)
    contents, _ = read_site_state(settings.state_folder)
    allowed = _allowed(settings)
    with _computing():
        releases = release_costs(contents, allowed.delta, every=every_round)
    if as_json:
        print_json(releases)
    else:
        print_history(Screen(), releases, allowed.delta)


@budget.command()
def verify(
    config: Config = CLIENT_TOML,
    head: Annotated[
        str | None,
        typer.Option(
            callback=_digest,
            help="A head that the ledger must contain, such as one in the operator's transcript: 64"
            " hexadecimal digits.",
        ),
    ] = None,
    as_json: JsonWithInfinity = False,
) -> None:
    """Check the chain of the ledger, and that it continues what this site signed last."""
    state = load_config(config).state_folder
    contents, published = read_site_state(state)
    if head is not None:
        require_head(state.ledger, contents, bytes.fromhex(head))
    verified = Verified(
        head=contents.head().hex(),
        rows=len(contents.heads),
        last_signed=None if published.ledger_head is None else published.ledger_head.hex(),
        given=None if head is None else head.lower(),
    )
    if as_json:
        print_json(verified)
        return
    console = Screen()
    print_lines(
        console,
        [
            ("ledger", str(state.ledger)),
            ("head", verified.head),
            ("rows", f"{verified.rows}, each follows the one before"),
            ("last signed", verified.last_signed or "nothing yet"),
            *([] if head is None else [("given", verified.given or "")]),
        ],
    )
    console.print("\nThe ledger is intact, and contains every head named here.")


@budget.command()
def carry(
    data_set: Annotated[
        str,
        typer.Option(
            callback=_digest, help="Digest of the changed data set, as the trainer prints it."
        ),
    ],
    config: Config = CLIENT_TOML,
) -> None:
    """Charge a changed data set with all that was spent on the one before."""
    settings = load_config(config)
    path = settings.state_folder.ledger
    former = read_ledger(path).data_set
    with Ledger.open(path, former, settings.data.unit_column) as ledger:
        ledger.continue_on(bytes.fromhex(data_set))
        print_lines(
            Screen(),
            [
                ("ledger", str(path)),
                ("was about", former.hex()),
                ("is about", data_set.lower()),
                ("releases", f"{len(ledger.history())}, which stay charged"),
                ("head", ledger.head().hex()),
            ],
        )


def _print_nothing(settings: ClientConfig, as_json: bool) -> None:
    if as_json:
        print_json(spending(Contents(), _allowed(settings)))
    else:
        total = _number(settings.policy.total_epsilon)
        say(
            f"Nothing was spent yet, of epsilon {total}: the first plan makes a ledger.\n"
            "If this site had one, bring back the latest copy."
        )


def _allowed(settings: ClientConfig) -> Budget:
    """The budget that the ledger holds every plan with differential privacy to."""
    policy = settings.policy
    delta = min(policy.max_delta, largest_delta(settings.data.public_size))
    return Budget(policy.total_epsilon, delta, policy.total_shared_epsilon)


def _computing() -> Status:
    """The accountant needs some seconds: it imports torch."""
    return working("computing epsilon")


def print_spending(console: Console, ledger: str, spent: Spending) -> None:
    """Prints the figures, then each job's part."""
    print_lines(
        console,
        [
            ("ledger", ledger),
            ("data set", spent.data_set or "none"),
            ("unit", "record" if spent.unit is None else f"column {spent.unit}"),
            ("head", spent.head or "none"),
            *_totals(spent),
            *(("stated", text) for text in spent.stated),
            *([("old copy", "state what was spent since")] if spent.old_copy else []),
        ],
    )
    if spent.jobs:
        console.print()
        # A second total, where there is one, has its column beside the first.
        shared = () if spent.shared is None else ("attempts", "for readers")
        columns = ("rounds", *shared[:1], "epsilon alone", *shared[1:])
        jobs = table("job", *columns, folding=("job",), right=columns)
        for job in spent.jobs:
            jobs.add_row(job.job, *_job_row(job))
        console.print(jobs)


def _totals(spent: Spending) -> list[tuple[str, str]]:
    shared = spent.shared
    if shared is None:
        return [
            ("spent", f"epsilon {_number(spent.spent)} at delta {spent.delta:g}"),
            ("left", f"epsilon {_number(spent.left)} of {_number(spent.total)}"),
        ]
    left = "nothing: policy.total_shared_epsilon is not there"
    if shared.total is not None and shared.left is not None:
        left = f"epsilon {_number(shared.left)} of {_number(shared.total)}"
    return [
        ("spent", f"epsilon {_number(spent.spent)} at delta {spent.delta:g}, against everybody"),
        ("left", f"epsilon {_number(spent.left)} of {_number(spent.total)}, against everybody"),
        (
            "spent",
            f"epsilon {_number(shared.spent)} at delta {spent.delta:g},"
            f" {against_readers(shared.honest)}",
        ),
        ("left", f"{left}, against readers of the sums"),
    ]


def _job_row(job: JobCost) -> list[str]:
    if job.shared_epsilon is None:
        return [str(job.rounds), _number(job.epsilon)]
    attempts = "" if job.attempts is None else str(job.attempts)
    return [str(job.rounds), attempts, _number(job.epsilon), _number(job.shared_epsilon)]


def print_history(console: Console, releases: Sequence[ReleaseCost], delta: float) -> None:
    """Prints one line for each round."""
    if not releases:
        console.print("No round was charged yet.")
        return
    two = any(not isinstance(one.shared_noise_multiplier, UnsetType) for one in releases)
    shared = ("for readers",) if two else ()
    numbers = ("round", "noise", "sampling rate", "steps", "epsilon", *shared)
    rounds = table("job", "round", "state", *numbers[1:], folding=("job",), right=numbers)
    for release in releases:
        row = [
            release.job,
            _round(release),
            release.state.value,
            *_noise(release),
            _epsilon(release.epsilon),
        ]
        rounds.add_row(*row, *([_epsilon(release.shared_epsilon)] if two else []))
    console.print(rounds)
    console.print(f"\nEach epsilon covers everything up to its round, at delta {delta:g}.")
    if two:
        console.print(
            "In distributed mode, the attempt is behind a dot, and the noise is this site's own."
        )


def _round(release: ReleaseCost) -> str:
    if not isinstance(release.attempts, UnsetType):
        return f"to {release.round}, {release.attempts} attempts"
    if not isinstance(release.attempt, UnsetType):
        return f"{release.round}.{release.attempt}"
    return str(release.round)


def _epsilon(value: float | UnsetType) -> str:
    return "" if isinstance(value, UnsetType) else _number(value)


def _noise(release: ReleaseCost) -> tuple[str, str, str]:
    if release.noise_multiplier is None:
        return "none", "", ""
    return f"{release.noise_multiplier:.4g}", f"{release.sample_rate:.4g}", str(release.steps)


def _number(epsilon: float) -> str:
    return "infinite" if epsilon == math.inf else f"{epsilon:.4g}"
