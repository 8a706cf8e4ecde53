"""How a command talks to people.

The law: nothing reaches a terminal but through `Screen`, `say` or `json_text`. Names and texts of
other parties are among what commands print, also on the screen on which a person approves a plan.
"""

import shlex
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated

import msgspec
import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.status import Status
from rich.table import Column, Table
from rich.text import Text

from umbel_common.canonical import Name
from umbel_common.errors import UmbelError
from umbel_common.printable import one_line, printable, printable_json
from umbel_common.trust.key_statements import OPERATOR

_PATIENCE = 2.0
"""Seconds of work without a bar."""
_NO_LIMIT = 1 << 20
"""Width where nobody's screen has an edge: in a pipe or a file, a line is as long as it needs."""


class Screen(Console):
    """A console on which a text is its characters and nothing else: no markup, no codes for emoji,
    and what is not printable is written out."""

    def __init__(
        self,
        *,
        file: IO[str] | None = None,
        stderr: bool = False,
        quiet: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__(
            file=file,
            stderr=stderr,
            quiet=quiet,
            width=width,
            markup=False,
            emoji=False,
            highlight=False,
        )
        if width is None and not _is_terminal(self.file):
            self.width = _NO_LIMIT

    def render_str(self, text: str, **options: object) -> Text:
        """A text in the way that rich lays it out, in a cell too."""
        plain = {**options, "markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text), **plain)  # type: ignore[arg-type]  # by name

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Everything on its way to the terminal, and so also a `Text` that somebody made. A table
        that is too wide for it is folded, never cut off."""
        if isinstance(renderable, Table):
            _fold(renderable, (options or self.options).max_width)
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def command_line(name: str, text: str) -> typer.Typer:
    """The app of a console script, with what people expect of one: `-h`, `--version`, completion.

    Args:
        text: what its help says first.
    """
    app = typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # Click suggests a command that is spelled alike, and once is enough.
        suggest_commands=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(asked: bool) -> None:
        if asked:
            say(f"{name} {version('umbel')}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=show_version, is_eager=True, help="Show the version and exit."
            ),
        ] = False,
    ) -> None:
        pass

    return app


def say(text: str, *, err: bool = False) -> None:
    """Prints a line.

    Args:
        err: whether to standard error.
    """
    typer.echo(printable(text), err=err)


def json_text(value: object, indent: int = 2) -> str:
    """A value as JSON for programs, which people read too; below 0, `indent` makes one line."""
    return printable_json(msgspec.json.format(msgspec.json.encode(value), indent=indent).decode())


def print_json(value: object) -> None:
    """Prints a value for programs, indented: the one form of every `--json` (docs/errors.md)."""
    say(json_text(value))


def local_time(seconds: float) -> str:
    """A moment (seconds since 1970) for people, in this machine's time zone."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def json_time(seconds: float | None) -> str | None:
    """A moment (seconds since 1970) as documents for programs have it: UTC, ISO 8601."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def duration(seconds: float) -> str:
    """A length of time for people, in its two largest units."""
    whole = max(round(seconds), 0)
    for size, unit, smaller, its in _UNITS:
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {its}" if rest else "")
    return f"{whole} s"


_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
"""Seconds and name of each unit, and of the next smaller one."""


def working(text: str) -> Status:
    """Shows a person at a terminal, while a block runs, that something takes its time."""
    return Screen(stderr=True).status(text)


class Bar:
    """What a person at a terminal sees of work that takes long: its stage, and how far it is."""

    def __init__(self) -> None:
        """Shows nothing yet."""
        console = Screen(stderr=True)
        self._shown = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # What is printed meanwhile stays above it, but a file gets it as ever.
            redirect_stdout=_is_terminal(sys.stdout),
        )
        self._task: TaskID | None = None

    def stage(self, name: str, done: int = 0, whole: int | None = None) -> None:
        """Says how far the work is.

        Args:
            name: the stage's.
            done: what is done of it.
            whole: how much it is; None: nobody knows.
        """
        if not self._shown:
            return
        if self._task is None:
            self._task = self._progress.add_task(name)
        self._progress.update(self._task, description=name, completed=done, total=whole)

    def follow(self, name: str) -> Callable[[int, int], None]:
        """A function for work that tells how much of a stage is done, and how much it is."""
        return lambda done, whole: self.stage(name, done, whole)

    def show(self) -> None:
        """Shows it from now on, if there is a terminal."""
        if self._shown:
            self._progress.start()

    def close(self) -> None:
        """Takes it off the screen."""
        if self._progress.live.is_started:
            self._progress.stop()


@contextmanager
def bar() -> Iterator[Bar]:
    """Shows how far the work of a block is, if it takes long and a terminal is there. Nothing is
    left of it when the block ends."""
    made = Bar()
    timer = threading.Timer(_PATIENCE, made.show)
    timer.daemon = True
    timer.start()
    try:
        yield made
    finally:
        timer.cancel()
        timer.join()
        made.close()


def enter_folder(folder: Path) -> str:
    """A line that says where the next commands are given; empty if it is where this one was."""
    there = "" if folder.resolve() == Path.cwd() else shlex.join(["cd", str(folder)])
    return there and f"\nGive all other commands in this folder: {there}"


def print_lines(console: Console, lines: Iterable[tuple[str, str]], *, fold: bool = False) -> None:
    """Prints pairs of a name and a value, one on a line, with the values in one column.

    Args:
        fold: whether a value that is too long for a terminal continues in the column of the values,
            where no part of it looks like another pair. It is for texts that another party chose;
            a path or a digest is copied more easily from one line.
    """
    pairs = list(lines)
    width = max(len(name) for name, _ in pairs)
    room = max(console.width - width - 2, 1)
    for name, value in pairs:
        shown = one_line(value)
        if fold and console.is_terminal:
            shown = f"\n{' ' * (width + 2)}".join(_cut(shown, room))
        console.print(f"{name:<{width}}  {shown}", soft_wrap=True)


def _cut(text: str, room: int) -> list[str]:
    """`text` in parts that take no more than `room` columns each."""
    parts = [""]
    for character in text:
        if cell_len(parts[-1] + character) > room:
            parts.append("")
        parts[-1] += character
    return parts


def _is_terminal(file: IO[str]) -> bool:
    isatty = getattr(file, "isatty", None)
    return isatty is not None and isatty()


def _fold(rows: Table, width: int) -> None:
    """Lets every column of a table fold, if those that should stay whole do not fit."""
    whole = [column for column in rows.columns if column.no_wrap]
    if sum(_width(column) for column in whole) + 3 * len(rows.columns) > width:
        for column in whole:
            column.no_wrap, column.overflow = False, "fold"


def _width(column: Column) -> int:
    cells = (column.header, *column.cells)
    return max((cell_len(line) for cell in cells for line in str(cell).splitlines()), default=0)


def table(*columns: str, folding: Collection[str] = (), right: Collection[str] = ()) -> Table:
    """A table without borders, whose cells stay on one line where they fit.

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


def name(value: str) -> str:
    """`value`, if it is a name for a federation, job or party.

    Raises:
        typer.BadParameter: it is not.
    """
    try:
        return msgspec.convert(value, Name)
    except msgspec.ValidationError:
        raise typer.BadParameter("lower-case letters, digits and inner hyphens only") from None


def site_name(value: str) -> str:
    """`value`, if it is a name for a site.

    Raises:
        typer.BadParameter: it is not.
    """
    if value == OPERATOR:
        raise typer.BadParameter(f"no site may be called {OPERATOR}")
    return name(value)
