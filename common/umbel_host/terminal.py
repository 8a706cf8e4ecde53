"""What a command says to people, and how it ends: with a documented exit code."""

import re
import sys
from collections.abc import Callable, Collection, Iterable

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from umbel_common.canonical import Name
from umbel_common.errors import UmbelError
from umbel_common.trust.key_statements import OPERATOR

INTERRUPTED = 130


def exit_code(command: Callable[[], None], *, interrupted: str = "interrupted") -> int:
    """Runs a command and maps its end to the exit codes of docs/errors.md.

    Args:
        interrupted: what to say after Ctrl-C.
    """
    console = Console(stderr=True, highlight=False)
    try:
        command()
    except UmbelError as error:
        text = printable(error.diagnostics())
        console.print(f"error: {text}", markup=False, soft_wrap=True)
        return error.exit_code
    except SystemExit as end:
        # Typer has turned Ctrl-C into this code.
        if end.code == INTERRUPTED:
            console.print(interrupted, markup=False)
        return end.code if isinstance(end.code, int) else 1
    return 0


def print_lines(console: Console, lines: Iterable[tuple[str, str]]) -> None:
    """Pairs of a name and a value, the values below each other, each on one line."""
    pairs = list(lines)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        console.print(f"{name:<{width}}  {value}", soft_wrap=True, markup=False)


def table(*columns: str, folding: Collection[str] = (), right: Collection[str] = ()) -> Table:
    """A table without borders, whose cells stay on one line.

    Args:
        folding: columns whose long cells are broken where the table is too wide, so that the others
            stay whole: a fingerprint is read out, and must not be cut.
        right: columns of numbers.
    """
    borderless = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        borderless.add_column(
            column,
            no_wrap=column not in folding,
            overflow="fold",
            justify="right" if column in right else "left",
        )
    return borderless


def confirm(
    console: Console, question: str, *, unattended: UmbelError, declined: UmbelError
) -> None:
    """Goes ahead only after a person at a terminal has typed yes.

    Args:
        question: what is asked, ending with "Type yes: " or similar.
        unattended: the error where input or output is not a terminal.
        declined: the error after any other answer.

    Raises:
        UmbelError: one of the two.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise unattended
    try:
        answer = console.input(f"\n{question}")
    except EOFError:
        answer = ""
    if answer != "yes":
        raise declined


def printable(text: str) -> str:
    """`text` with control characters written out: an error may quote a file that another party
    sent, which must not move the reader's cursor or hide what stands there."""
    return re.sub(
        r"[^\n]",
        lambda found: found[0] if found[0].isprintable() else ascii(found[0])[1:-1],
        text,
    )


def name(value: str) -> str:
    """A name of a federation, job or party.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        return msgspec.convert(value, Name)
    except msgspec.ValidationError:
        raise typer.BadParameter("lower-case letters, digits and inner hyphens only") from None


def site_name(value: str) -> str:
    """A name of a site.

    Raises:
        typer.BadParameter: it is none.
    """
    if value == OPERATOR:
        raise typer.BadParameter(f"no site may be called {OPERATOR}")
    return name(value)
