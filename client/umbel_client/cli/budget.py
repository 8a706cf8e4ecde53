"""`umbel-client budget`: what this site's data set has cost so far. Only `carry` and `state-spend`
change anything.

The others read the ledger at one moment, also while a client is training, and need neither model
nor data.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from umbel_client.cli.options import CLIENT_TOML, Config, Json
from umbel_client.cli.state_spend import state_spend
from umbel_client.ledger.file import read_ledger, require_head, require_journal
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import Contents
from umbel_client.ledger.spending import ReleaseCost, Spending, Verified, release_costs, spending
from umbel_client.privacy.accounting import largest_delta
from umbel_client.site.config import ClientConfig, load_config
from umbel_client.site.policy import Budget
from umbel_client.storage.journal import Published, read_published
from umbel_host.terminal import print_lines

budget = typer.Typer(
    help="What the data set has cost: show, history, verify, carry, state-spend.",
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
def show(config: Config = CLIENT_TOML, as_json: Json = False) -> None:
    """Show the epsilon that is spent, what is left, and each job's part."""
    settings = load_config(config)
    path = _ledger(settings)
    contents, _ = _read(path)
    with _computing():
        spent = spending(contents, _allowed(settings))
    if as_json:
        _print_json(spent)
    else:
        print_spending(Console(highlight=False), path, spent)


@budget.command()
def history(config: Config = CLIENT_TOML, as_json: Json = False) -> None:
    """Show every round that was charged, and epsilon after it."""
    settings = load_config(config)
    contents, _ = _read(_ledger(settings))
    allowed = _allowed(settings)
    with _computing():
        releases = release_costs(contents, allowed.delta)
    if as_json:
        _print_json(releases)
    else:
        print_history(Console(highlight=False), releases, allowed.delta)


@budget.command()
def verify(
    config: Config = CLIENT_TOML,
    head: Annotated[
        str | None,
        typer.Option(callback=_digest, help="A head of this ledger that was published."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the chain of the ledger, and that it continues what this site signed last."""
    path = _ledger(load_config(config))
    contents, published = _read(path)
    if head is not None:
        require_head(path, contents, bytes.fromhex(head))
    verified = Verified(
        head=contents.head().hex(),
        rows=len(contents.heads),
        last_signed=None if published.ledger_head is None else published.ledger_head.hex(),
        given=None if head is None else head.lower(),
    )
    if as_json:
        _print_json(verified)
        return
    console = Console(highlight=False)
    print_lines(
        console,
        [
            ("ledger", str(path)),
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
            callback=_digest, help="Digest of the changed data set, as the client names it."
        ),
    ],
    config: Config = CLIENT_TOML,
) -> None:
    """Charge a changed data set with all that was spent on the one before."""
    settings = load_config(config)
    path = _ledger(settings)
    former = read_ledger(path).data_set
    with Ledger.open(path, former, settings.data.unit_column) as ledger:
        ledger.continue_on(bytes.fromhex(data_set))
        print_lines(
            Console(highlight=False),
            [
                ("ledger", str(path)),
                ("was about", former.hex()),
                ("is about", data_set.lower()),
                ("releases", f"{len(ledger.history())}, which stay charged"),
                ("head", ledger.head().hex()),
            ],
        )


def _ledger(settings: ClientConfig) -> Path:
    return Path(settings.state) / "ledger.sqlite"


def _read(path: Path) -> tuple[Contents, Published]:
    """A ledger and what the session journal beside it knows of it, if they do not contradict."""
    journal = path.with_name("session.sqlite")
    # A client may answer in between: the two are of one moment if the journal stands still.
    while True:
        published = read_published(journal)
        contents = read_ledger(path)
        if read_published(journal) == published:
            break
    if published.ledger_head is not None:
        require_head(path, contents, published.ledger_head)
    require_journal(path, contents, published.answers)
    return contents, published


def _allowed(settings: ClientConfig) -> Budget:
    """What the ledger holds every plan with differential privacy to."""
    policy = settings.policy
    return Budget(
        policy.total_epsilon, min(policy.max_delta, largest_delta(settings.data.public_size))
    )


def _computing() -> Status:
    """Says why it takes seconds, to a person at a terminal: the accountant brings torch with it."""
    return Console(stderr=True).status("computing epsilon")


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


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
