"""Another party's text on everything that people read: it moves no cursor and forges no line.

Each attack is run a second time without the fix, where it must reach its goal.
"""

import ast
import io
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.text import Text

from umbel_common import printable as texts
from umbel_common.adapters.peft_folder import text_files
from umbel_common.errors import ConfigError
from umbel_common.plans.plan import BaseModel, TrainingPlan
from umbel_common.plans.plan_file import plan_from_json, plan_lines, plan_to_json
from umbel_host.entry import TRACEBACK, exit_code
from umbel_host.processes.log import _Lines
from umbel_host.terminal import Screen, json_text, print_lines, say, table

ROOT = Path(__file__).parents[2]
MARKS = ["\x1b", "\x9b", "\x85", "\u2028", "\u202e", "\u200b"]
EVIL = "minilm" + "".join(f"{mark}[2K" for mark in MARKS) + "[bold red]x[/] :warning:"

Replace = Callable[[object, object], None]


def screen() -> tuple[io.StringIO, Screen]:
    file = io.StringIO()
    return file, Screen(file=file, width=300)


def lines() -> str:
    file, console = screen()
    print_lines(console, [("base model", EVIL)])
    return file.getvalue()


def a_table() -> str:
    file, console = screen()
    rows = table("site", EVIL, folding=("site",))
    rows.title = EVIL
    rows.add_row(EVIL, Text(EVIL))
    console.print(rows)
    return file.getvalue()


def printed() -> str:
    file, console = screen()
    console.print(EVIL, soft_wrap=True)
    console.print(Text(EVIL), Panel(EVIL))
    return file.getvalue()


def logged() -> str:
    record = logging.LogRecord("umbel.relay", logging.INFO, "", 0, "it says %s", (EVIL,), None)
    return _Lines("%(message)s").format(record)


def an_error() -> str:
    return ConfigError(EVIL, file=EVIL, found=(EVIL, EVIL), accepted=EVIL).diagnostics()


FACES: dict[str, Callable[[], str]] = {
    "lines": lines,
    "table": a_table,
    "printed": printed,
    "log": logged,
    "error": an_error,
    "json": lambda: json_text([EVIL]),
}


@pytest.mark.parametrize("face", FACES.values(), ids=FACES.keys())
def test_a_text_is_its_characters(
    face: Callable[[], str], monkeypatch: pytest.MonkeyPatch, replace_everywhere: Replace
) -> None:
    shown = face()
    assert not [mark for mark in MARKS if mark in shown]
    assert "[bold red]x[/] :warning:" in shown
    replace_everywhere(texts.printable, lambda text: text)
    replace_everywhere(texts.one_line, lambda text: text)
    replace_everywhere(texts.printable_json, lambda text: text)
    assert [mark for mark in MARKS if mark in face()]


def test_a_line_that_is_said_or_that_ends_a_command(
    capfd: pytest.CaptureFixture[str],
    replace_everywhere: Replace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TRACEBACK, "1")

    def fails() -> None:
        raise RuntimeError(EVIL)

    def shown() -> str:
        say(EVIL)
        assert exit_code(fails) == 1
        return "".join(capfd.readouterr())

    assert not [mark for mark in MARKS if mark in shown()]
    replace_everywhere(texts.printable, lambda text: text)
    assert [mark for mark in MARKS if mark in shown()] == MARKS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_long_name_forges_no_line_of_a_plan(
    make_plan: Callable[..., TrainingPlan], width: int
) -> None:
    """The terminal would break the line where the name's author wants it to."""
    name = "minilm".ljust(width - len("base model  ")) + "privacy     epsilon 0.1 at delta 1e-06"
    shown = Terminal()
    plan = make_plan(model=BaseModel(name=name, digest=bytes(32)))
    print_lines(Screen(file=shown, width=width), plan_lines(plan), fold=True)
    rows = shown.getvalue().splitlines()
    assert max(map(len, rows)) <= width
    assert len([row for row in rows if row.startswith("privacy")]) == 1
    # Without the fix, the terminal breaks the one long line there.
    whole = f"base model  {name}"
    assert whole[width:].startswith("privacy     epsilon 0.1")


def test_a_released_folder_says_only_what_we_say(make_plan: Callable[..., TrainingPlan]) -> None:
    name = f"tiny\nlicense: mit\n---\n# {EVIL}"
    files = text_files(make_plan(model=BaseModel(name=name, digest=bytes(32))))
    card = files["README.md"].splitlines()
    assert card[:4] == ["---", "library_name: peft", card[2], "---"]
    assert card[2].startswith('base_model: "tiny\\nlicense')
    for text in files.values():
        assert not [mark for mark in MARKS if mark in text]


def test_a_plan_file_reads_back_as_it_was(make_plan: Callable[..., TrainingPlan]) -> None:
    plan = make_plan(model=BaseModel(name=EVIL, digest=bytes(32)))
    text = plan_to_json(plan)
    assert not [mark for mark in MARKS if mark in text]
    assert plan_from_json(text, "plan.json")[0] == plan


PIPES = {f"client/umbel_client/{door}.py" for door in ("calibrating", "drafting", "evaluating")}
"""Doors whose standard output another process of ours reads."""


def test_nobody_prints_past_the_terminal() -> None:
    found = set()
    for path in (*ROOT.glob("c*/umbel_*/**/*.py"), *ROOT.glob("s*/umbel_*/**/*.py")):
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "typer.echo",
                "typer.secho",
                "click.echo",
                "Console",
                "sys.stdout.write",
                "sys.stderr.write",
                "sys.stdout.buffer.write",
            ):
                found.add((where, ast.unparse(node.func)))
    assert found == {
        ("common/umbel_host/terminal.py", "typer.echo"),
        *((door, "print") for door in PIPES),
    }
