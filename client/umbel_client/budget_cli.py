"""`umbel-client budget`: what this site's data set has cost so far. Only `carry` and `state-spend`
change anything.

The others read the ledger at one moment, also while a client is training, and need neither model
nor data.
"""

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.status import Status

from umbel_client.accounting import largest_delta
from umbel_client.budget import Budget
from umbel_client.budget_view import (
    Verified,
    print_history,
    print_spending,
    release_costs,
    spending,
)
from umbel_client.config import ClientConfig, load_config
from umbel_client.ledger import Ledger
from umbel_client.ledger_file import read_ledger, require_head, require_journal
from umbel_client.ledger_rows import Contents
from umbel_client.session import Published, read_published
from umbel_client.state_spend_cli import state_spend
from umbel_host.console import print_lines

budget = typer.Typer(
    help="What the data set has cost: show, history, verify, carry, state-spend.",
    no_args_is_help=True,
)
budget.command()(state_spend)

Config = Annotated[Path, typer.Option(help="This site's client.toml.")]
CLIENT_TOML = Path("client.toml")
Json = Annotated[bool, typer.Option("--json", help="One JSON document; null means infinite.")]


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
        ledger.carry(bytes.fromhex(data_set))
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
