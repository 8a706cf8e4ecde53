"""The two things that commands of both parties show people: a table, and a question."""

import io
import sys

import pytest
from rich.console import Console

from umbel_common.errors import UmbelError
from umbel_host.terminal import confirm, table

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


def test_only_a_folding_column_is_broken() -> None:
    lines = printed(70)
    assert len(lines) == 3
    assert FINGERPRINT in lines[1]
    assert lines[1].split()[0] + lines[2].split()[0] == LONG
