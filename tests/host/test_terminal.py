"""The two things that commands of both parties show people: a table, and a question."""

import io
import sys
from collections import Counter

import pytest
from rich.console import Console

from umbel_common.errors import UmbelError
from umbel_host.terminal import Screen, bar, confirm, duration, json_time, table

UNATTENDED, DECLINED = UmbelError("nobody is there"), UmbelError("it was declined")
LONG = "a-site-with-a-name-of-its-own"
FINGERPRINT = "0123-4567-89ab-cdef-0123-4567-89ab-cdef"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ask(monkeypatch: pytest.MonkeyPatch, stdin: io.StringIO, stdout: io.StringIO) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stdout", stdout)
    confirm(Console(file=stdout), "Type yes to approve: ", unattended=UNATTENDED, declined=DECLINED)


def test_yes_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    ask(monkeypatch, Terminal("yes\n"), shown)
    assert shown.getvalue() == "\nType yes to approve: "


@pytest.mark.parametrize("answer", ["", "no\n", "y\n", "Yes\n", "yes please\n"])
def test_anything_but_yes_declines(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    with pytest.raises(UmbelError, match="it was declined"):
        ask(monkeypatch, Terminal(answer), Terminal())


@pytest.mark.parametrize(
    "streams", [(io.StringIO("yes\n"), Terminal()), (Terminal("yes\n"), io.StringIO())]
)
def test_only_a_terminal_is_asked(
    monkeypatch: pytest.MonkeyPatch, streams: tuple[io.StringIO, io.StringIO]
) -> None:
    with pytest.raises(UmbelError, match="nobody is there"):
        ask(monkeypatch, *streams)


def printed(width: int) -> list[str]:
    shown = io.StringIO()
    rows = table("site", "fingerprint", "weight", folding=("site",), right=("weight",))
    rows.add_row(LONG, FINGERPRINT, "3")
    Console(file=shown, width=width).print(rows)
    return [line.rstrip() for line in shown.getvalue().splitlines()]


def test_a_table_has_no_borders_and_numbers_on_the_right() -> None:
    assert printed(120) == [
        f"{'site':<29}  {'fingerprint':<39}  weight",
        f"{LONG}  {FINGERPRINT}       3",
    ]


WIDE = ("j" * 64, "sentence-transformers/all-MiniLM-L6-v2", "7" * 64)


def wide(file: io.StringIO, **options: int) -> str:
    rows = table("job", "model", "adapter", folding=("model",))
    rows.add_row(*WIDE)
    Screen(file=file, **options).print(rows)
    return file.getvalue()


@pytest.mark.parametrize("columns", ["", "20", "80"])
def test_in_a_pipe_no_cell_of_a_table_is_cut_or_broken(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, row = wide(io.StringIO()).splitlines()
    assert row.split() == list(WIDE)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_on_a_terminal_a_table_that_is_too_wide_folds_and_keeps_each_character(width: int) -> None:
    shown = wide(io.StringIO(), width=width)
    assert max(map(len, shown.splitlines())) <= width
    letters = Counter(shown.replace("job", "").replace("model", "").replace("adapter", ""))
    for character in "j7M":
        assert letters[character] == sum(cell.count(character) for cell in WIDE)


def test_times_are_short_for_people_and_exact_for_programs() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 80, 3600, 3700, 86400, 90000)] == [
        *("0 s", "59 s", "1 min", "1 min 20 s", "1 h", "1 h 1 min", "1 d", "1 d 1 h")
    ]
    assert json_time(0.0) == "1970-01-01T00:00:00Z"
    assert json_time(None) is None


def test_only_a_folding_column_is_broken() -> None:
    lines = printed(70)
    assert len(lines) == 3
    assert FINGERPRINT in lines[1]
    assert lines[1].split()[0] + lines[2].split()[0] == LONG


@pytest.mark.parametrize(
    ("file", "long", "wanted"),
    [
        (Terminal(), True, ["reading", "counting", "70%", "round 1"]),
        (Terminal(), False, ["round 1\n"]),
        (io.StringIO(), True, ["round 1\n"]),
    ],
)
def test_only_long_work_at_a_terminal_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, file: io.StringIO, long: bool, wanted: list[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setenv("TERM", "xterm")
    with bar() as shown:
        shown.stage("reading")
        if long:
            shown.show()
        shown.follow("counting")(7, 10)
        Screen(stderr=True).print("round 1")
    said = file.getvalue()
    assert not [part for part in wanted if part not in said]
    assert len(wanted) > 1 or said == wanted[0]
