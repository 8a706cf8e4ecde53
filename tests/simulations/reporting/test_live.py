"""What a developer can read in the live view, in two widths, and in a pipe."""

import io
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from umbel_simulations.reporting import events
from umbel_simulations.reporting.live import (
    LiveView,
    NullView,
    PlainView,
    View,
    view_for,
)
from umbel_simulations.reporting.results import Score
from umbel_simulations.reporting.run_state import RunState

SITES = {"hospital-a": 4973, "hospital-b": 4275, "hospital-c": 5309}
ROUNDS, STEPS = 3, 5


def stage(site: str, number: int, name: str, **parts: object) -> events.SiteStage:
    fields: dict[str, object] = {
        "seconds": 30.0 * number,
        "site": site,
        "round": number,
        "attempt": 1,
        "stage": name,
        "refusal": None,
        "sent_bytes": 80_000,
        "masked_bytes": 78_412 if name == "mask" else 0,
        "clear_bytes": 0,
        "received_bytes": 1000,
    }
    return events.SiteStage(**{**fields, **parts})  # type: ignore[arg-type]  # fields by name


def started() -> events.Started:
    return events.Started(
        seconds=0.0, name="quickstart", sites=SITES, rounds=ROUNDS, steps=ROUNDS * STEPS
    )


def released(number: int, **parts: object) -> events.RoundReleased:
    fields: dict[str, object] = {
        "seconds": 30.0 * number,
        "round": number,
        "attempt": 1,
        "survivors": list(SITES),
        "score": Score(accuracy=0.5 + number / 100, macro_f1=0.4 + number / 100),
        "epsilon": dict.fromkeys(SITES, 2.5 * number),
    }
    return events.RoundReleased(**{**fields, **parts})  # type: ignore[arg-type]  # fields by name


def one_round(number: int, silent: str | None = None) -> Iterator[events.AnyEvent]:
    """All sites train and answer; `silent` hears nothing from `mask` on."""
    for step in range(1, STEPS + 1):
        for site in SITES:
            seconds = 30.0 * (number - 1) + 5.0 * step
            yield events.SiteStep(seconds=seconds, site=site, round=number, step=step, steps=STEPS)
    for name in ("train", "share", "mask", "confirm", "unmask"):
        for site in SITES:
            if site != silent or name in ("train", "share"):
                yield stage(site, number, name)
    yield released(number)


def screen(width: int, *happened: events.AnyEvent, later: float = 0.0, height: int = 30) -> str:
    """What a terminal of this width shows, `later` seconds after the last event."""
    now = 100.0
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    view = LiveView(console, read_clock=lambda: now)
    for event in happened:
        view.on_event(event)
    now += later
    picture = Console(file=io.StringIO(), width=width, height=height, record=True)
    picture.print(view.render())
    return picture.export_text()


def printed(*happened: events.AnyEvent) -> list[str]:
    """The lines that are written to a pipe."""
    file = io.StringIO()
    with PlainView(Console(file=file, width=80)) as view:
        for event in happened:
            view.on_event(event)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_each_site_has_one_line_with_all_its_figures(width: int) -> None:
    text = screen(width, started(), *one_round(1), *one_round(2))
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if line.startswith("hospital-b"))
    for figure in ("4,275", "unmasked", "10/15", "5.00", "157 kB"):
        assert figure in row
    assert "…" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_header_tells_round_time_and_score(width: int) -> None:
    text = screen(width, started(), *one_round(1), *one_round(2), later=7.0)
    assert "quickstart" in text
    assert "round 2/3" in text
    assert "1:07 elapsed" in text
    assert "accuracy 52.0%, macro-F1 42.0%" in text
    assert "before: 51.0%" in text


def test_before_any_event_the_view_says_what_it_waits_for() -> None:
    assert "setting up" in screen(80)


def test_the_time_left_is_what_the_pace_so_far_promises() -> None:
    state = RunState()
    for event in (started(), *one_round(1)):
        state.apply(event)
    # From 5 s with 1 of 45 steps done to 30 s with 15 done; 30 are left.
    assert state.seconds_left() == pytest.approx(25 / 14 * 30)
    assert "about 0:48 of training left" in screen(80, started(), *one_round(1), later=5.0)


def test_a_run_resumed_in_the_middle_is_not_taken_for_a_fast_one() -> None:
    state = RunState()
    for event in (started(), *one_round(3)):
        state.apply(event)
    assert state.seconds_left() == pytest.approx(0.0)
    assert state.first_step is not None
    assert state.first_step[1] > 0.2


def test_no_time_left_is_promised_before_two_steps_are_seen() -> None:
    assert "left" not in screen(80, started())


def test_preparation_shows_how_far_it_is() -> None:
    event = events.Preparing(
        seconds=1.0, what="frozen layers", site="hospital-a", done=250, total=1000
    )
    assert "preparing 25%" in screen(80, started(), event)


def test_a_site_that_falls_silent_is_named_with_the_stage_it_missed() -> None:
    text = screen(80, started(), *one_round(1, silent="hospital-b"))
    assert "round 1: hospital-b fell silent before mask" in text
    assert text.count("fell silent") == 1


def test_a_site_that_is_back_in_the_next_round_is_not_named_again() -> None:
    text = screen(80, started(), *one_round(1, silent="hospital-b"), *one_round(2))
    assert text.count("fell silent") == 1


def test_a_refusal_and_the_abort_that_follows_are_shown() -> None:
    refusal = stage("hospital-c", 1, "share", refusal="cohort-too-small")
    abort = events.AttemptAborted(seconds=9.0, round=1, attempt=1, check="too-few-sites")
    text = screen(80, started(), refusal, abort)
    assert "hospital-c refused share, cohort-too-small" in text
    assert "round 1, attempt 1: aborted, too-few-sites" in text


def test_a_refused_plan_is_shown_without_a_round() -> None:
    refusal = stage("hospital-c", 0, "offer", refusal="epsilon-over-policy")
    assert "! hospital-c refused offer, epsilon-over-policy" in screen(80, started(), refusal)


def test_a_refusing_site_is_not_called_silent_too() -> None:
    refusal = stage("hospital-b", 1, "mask", refusal="out-of-order")
    happened = [*one_round(1, silent="hospital-b")]
    text = screen(80, started(), *happened[:-1], refusal, happened[-1])
    assert "refused mask" in text
    assert "fell silent" not in text


def test_many_sites_leave_room_for_the_score() -> None:
    many = events.Started(
        seconds=0.0,
        name="many",
        sites={f"site-{n:03}": 100 for n in range(100)},
        rounds=ROUNDS,
        steps=15,
    )
    text = screen(80, many, height=24)
    assert "90 more sites" in text
    assert len(text.splitlines()) <= 24


def test_many_warnings_leave_room_for_the_sites() -> None:
    aborts = [
        events.AttemptAborted(seconds=9.0, round=1, attempt=number, check="late")
        for number in range(1, 10)
    ]
    text = screen(80, started(), *aborts)
    assert "4 earlier warnings" in text
    assert "attempt 9" in text
    assert "attempt 4:" not in text


def test_comparisons_show_their_progress() -> None:
    half = events.BaselineStep(seconds=98.0, name="pooled", done=2, total=6)
    alone = events.BaselineStep(seconds=99.0, name="hospital-a", done=1, total=6)
    text = screen(80, started(), *one_round(1), half, alone)
    assert "comparison pooled" in text
    assert "2/6" in text
    assert "comparison local-only, hospital-a" in text
    assert "comparisons done" not in text


def test_finished_comparisons_become_a_number() -> None:
    done = [
        events.BaselineStep(seconds=99.0, name=name, done=6, total=6) for name in (*SITES, "pooled")
    ]
    text = screen(80, started(), *one_round(1), *done)
    assert "comparisons done: 4" in text
    assert "comparison pooled" not in text


def test_without_differential_privacy_no_epsilon_is_shown() -> None:
    epsilon = dict.fromkeys(SITES)
    row = next(
        line
        for line in screen(80, started(), released(1, epsilon=epsilon)).splitlines()
        if line.startswith("hospital-a")
    )
    assert "–" in row


def test_a_pipe_gets_one_line_for_each_round() -> None:
    lines = printed(started(), *one_round(1), *one_round(2))
    assert len(lines) == 3
    assert lines[0].startswith("[0:00] quickstart: 3 rounds; records: hospital-a 4,973")
    assert lines[1] == (
        "[0:30] round 1/3  accuracy 51.0%  macro-F1 41.0%  3 of 3 sites  epsilon at most 2.50"
    )


def test_a_pipe_gets_warnings_and_finished_comparisons() -> None:
    lines = printed(
        started(),
        *one_round(1, silent="hospital-b"),
        events.BaselineStep(seconds=40.0, name="pooled", done=1, total=2),
        events.BaselineStep(seconds=41.0, name="pooled", done=2, total=2),
        events.BaselineStep(seconds=42.0, name="hospital-a", done=2, total=2),
    )
    assert "[0:30] warning: round 1: hospital-b fell silent before mask" in lines
    assert lines[3:] == [
        "[0:41] comparison pooled done",
        "[0:42] comparison local-only, hospital-a done",
    ]


def test_a_pipe_says_when_there_is_no_privacy() -> None:
    lines = printed(started(), released(1, epsilon=dict.fromkeys(SITES)))
    assert lines[-1].endswith("no differential privacy")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"force_terminal": True}, LiveView),
        ({"force_terminal": False}, PlainView),
        ({"force_terminal": True, "quiet": True}, NullView),
    ],
)
def test_the_view_fits_where_the_output_goes(options: dict[str, bool], kind: type[View]) -> None:
    console = Console(file=io.StringIO(), **options)  # type: ignore[arg-type]  # flags by name
    assert type(view_for(console)) is kind


def test_a_quiet_view_prints_nothing() -> None:
    file = io.StringIO()
    with NullView(Console(file=file)) as view:
        for event in (started(), *one_round(1)):
            view.on_event(event)
    assert file.getvalue() == ""


def test_the_last_picture_stays_on_the_terminal() -> None:
    file = io.StringIO()
    with LiveView(Console(file=file, width=100, height=30, force_terminal=True)) as view:
        for event in (started(), *one_round(1)):
            view.on_event(event)
    assert "accuracy" in file.getvalue()


def test_events_may_come_from_many_threads_while_the_picture_is_drawn() -> None:
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True)
    view = LiveView(console)
    view.on_event(started())

    def work(site: str) -> None:
        for _ in range(200):
            view.on_event(stage(site, 1, "mask", masked_bytes=1))
            view.render()

    threads = [threading.Thread(target=work, args=(site,)) for site in SITES for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    picture = Console(file=io.StringIO(), width=80, record=True)
    picture.print(view.render())
    assert picture.export_text().count("400 B") == len(SITES)
