"""What the developer sees during a run: a table that is updated, or one line for each round."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from umbel_simulations.reporting import events
from umbel_simulations.reporting.measures import measure_of
from umbel_simulations.reporting.results import Score
from umbel_simulations.reporting.run_state import RunState
from umbel_simulations.reporting.units import clock, size

WARNINGS_SHOWN = 5
SCORES_SHOWN = 4
BARS_SHOWN = 4
LINES_AROUND_THE_SITES = 14


class View:
    """Shows the events of one run. Any thread may call `on_event`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._state = RunState()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Has nothing to close."""

    def on_event(self, event: events.AnyEvent) -> None:
        """Updates the state by an event."""
        with self._lock:
            self._state.apply(event)


class NullView(View):
    """Shows nothing."""


class PlainView(View):
    """Prints one line for each round and each warning: for log files and pipes."""

    def on_event(self, event: events.AnyEvent) -> None:
        """Updates the state by an event, and prints what is new."""
        with self._lock:
            before = len(self._state.warnings)
            self._state.apply(event)
            for warning in self._state.warnings[before:]:
                self._print(f"warning: {warning}")
            match event:
                case events.Started():
                    records = ", ".join(f"{site} {n:,}" for site, n in event.sites.items())
                    self._print(f"{event.name}: {event.rounds} rounds; records: {records}")
                case events.RoundReleased():
                    self._print(f"round {event.round}/{self._state.rounds}  {_outcome(event)}")
                case events.BaselineStep(name=name, done=done, total=total) if done == total:
                    self._print(f"{self._state.comparison(name)} done")
                case _:
                    pass

    def _print(self, line: str) -> None:
        text = f"[{clock(self._state.seconds)}] {line}"
        self._console.print(text, soft_wrap=True)


class LiveView(View):
    """Redraws a table in place: for terminals."""

    def __init__(self, console: Console, read_clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self._read_clock = read_clock
        self._heard = read_clock()
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops updating, and leaves the last picture on the screen."""
        self._live.stop()
        self._console.print()

    def on_event(self, event: events.AnyEvent) -> None:
        """Updates the state by an event; the picture follows within a quarter of a second."""
        with self._lock:
            self._state.apply(event)
            self._heard = self._read_clock()

    def render(self) -> RenderableType:
        """The whole picture, from the state so far."""
        with self._lock:
            state = self._state
            if not state.sites:
                return Text("setting up the federation …", style="dim")
            since = self._read_clock() - self._heard
            parts = [_header(state, since), self._table(state), _scores(state)]
            parts += _bars(state)
            hidden = len(state.warnings) - WARNINGS_SHOWN
            if hidden > 0:
                parts.append(Text(f"{hidden} earlier warnings", style="yellow"))
            parts += [
                Text(f"! {warning}", style="yellow", overflow="fold")
                for warning in state.warnings[-WARNINGS_SHOWN:]
            ]
            return Group(*parts)

    def _table(self, state: RunState) -> Table:
        shown = max(3, self._console.height - LINES_AROUND_THE_SITES)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("site", no_wrap=True, overflow="ellipsis", max_width=20)
        table.add_column("records", justify="right", no_wrap=True)
        table.add_column("stage", no_wrap=True, min_width=14)
        table.add_column("steps", no_wrap=True, width=14 if self._console.width < 100 else 32)
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("epsilon", justify="right", no_wrap=True)
        table.add_column("masked", justify="right", no_wrap=True)
        for name, site in list(state.sites.items())[:shown]:
            table.add_row(
                name,
                f"{site.records:,}",
                Text(site.doing, style=_style(site.doing)),
                ProgressBar(total=max(state.steps, 1), completed=site.steps),
                f"{site.steps}/{state.steps}",
                "–" if site.epsilon is None else f"{site.epsilon:.2f}",
                size(site.masked_bytes),
            )
        if len(state.sites) > shown:
            table.add_row(f"{len(state.sites) - shown} more sites", style="dim")
        return table


def view_for(console: Console) -> View:
    """The view that suits the console: quiet, a terminal, or a file."""
    if console.quiet:
        return NullView(console)
    return LiveView(console) if console.is_terminal else PlainView(console)


def _header(state: RunState, since: float) -> RenderableType:
    left = state.seconds_left()
    line = Text.assemble(
        (state.name, "bold"),
        f"   round {state.round}/{state.rounds}",
        (f"   {clock(state.seconds + since)} elapsed", "dim"),
    )
    if left is not None and len(state.scores) < state.rounds and state.progress < 1:
        line.append(f", about {clock(max(0.0, left - since))} of training left", "dim")
    return Group(line, Text())


def _scores(state: RunState) -> RenderableType:
    if not state.scores:
        return Text("\nnothing released yet", style="dim")
    number, score = state.scores[-1]
    measure = measure_of(score)
    line = Text.assemble(
        f"\nafter round {number}: {measure.name} ",
        (_value(score), "bold green"),
        f", {_other(score)}",
    )
    earlier = "  ".join(_value(score) for _, score in state.scores[-SCORES_SHOWN:-1])
    if earlier:
        line.append(f"   before: {earlier}", "dim")
    return line


def _bars(state: RunState) -> list[RenderableType]:
    """A bar for each comparison in progress; the finished ones are only counted."""
    running = {name: bar for name, bar in state.baselines.items() if bar[0] < bar[1]}
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=44)
    grid.add_column(width=24)
    for name, (done, total) in list(running.items())[:BARS_SHOWN]:
        grid.add_row(
            state.comparison(name), ProgressBar(total=total, completed=done), f"{done}/{total}"
        )
    finished = len(state.baselines) - len(running)
    return [Text(f"comparisons done: {finished}"), grid] if finished else [grid]


def _outcome(event: events.RoundReleased) -> str:
    spent = [epsilon for epsilon in event.epsilon.values() if epsilon is not None]
    shared = [epsilon for epsilon in event.shared.values() if epsilon is not None]
    epsilon = f"epsilon at most {max(spent):.2f}" if spent else "no differential privacy"
    if shared:
        epsilon = f"epsilon at most {max(shared):.2f} for readers of the sums, {max(spent):.2f} for"
        epsilon += " everybody"
    return (
        f"{measure_of(event.score).name} {_value(event.score)}  {_other(event.score)}"
        f"  {len(event.survivors)} of {len(event.epsilon)} sites  {epsilon}"
    )


def _value(score: Score) -> str:
    measure = measure_of(score)
    return f"{measure.show(score)}{measure.unit.strip()}"


def _other(score: Score) -> str:
    measure = measure_of(score)
    name, _, unit = measure.other_name.partition(" %")
    return f"{name} {measure.show_other(score)}{'%' if measure.unit else unit}"


def _style(doing: str) -> str:
    return {"training": "cyan", "silent": "yellow", "refused": "red"}.get(
        doing.partition(" ")[0], ""
    )
