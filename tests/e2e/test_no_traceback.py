"""No command shows a traceback: run by another user, in folders of every kind, or interrupted."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import every_command, warm_python
from support.waiting import HANGING

from umbel_client.site.joining import set_up as set_up_site
from umbel_server.operator.files import set_up as set_up_operator

EVERY = every_command.every_command()
STATE = ("ledger.sqlite", "session.sqlite", "journal.sqlite", "queue.sqlite", "decisions/paused")
FORBIDDEN = ("Traceback", "a mistake of Umbel's", "Errno", "Exception ignored")


def a_party(folder: Path) -> Path:
    """A folder of a site and of an operator at once, with everything that they have."""
    set_up_operator(folder, "clinics", "localhost:9443")
    # Site and operator have files of the same names, and that is all that counts here.
    (folder / "identity.pem").unlink()
    set_up_site(folder, "hospital-a", "clinics")
    for name in (*STATE, "adapters/job/plan.json"):
        path = folder / "state" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    for name in ("closed.json", "data.jsonl", "model/config.json", "scenario.toml"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x", "label": "y"}')
    return folder


def opened(folder: Path, *names: str) -> None:
    """Closes a folder to other users, but for these files and what leads to them."""
    closed = os.geteuid() != 0
    for path in (*folder.rglob("*"), folder):
        is_open = path.relative_to(folder).as_posix() in names
        # A user who is not root owns what is here: then it is closed to all.
        mode = 0o755 if is_open else 0o000 if closed else 0o700
        path.chmod(mode if path.is_dir() or is_open else mode & 0o600)


@pytest.fixture(scope="module")
def folders() -> Iterator[list[Path]]:
    # Not pytest's own place for them, which it closes to other users.
    top = Path(tempfile.mkdtemp(prefix="umbel-parties-"))
    top.chmod(0o755)
    made = [a_party(top / name) for name in ("shut", "as-under-systemd", "readable")]
    opened(made[0])
    opened(made[1], ".", "client.toml", "server.toml", "closed.json", "data.jsonl")
    if os.geteuid() == 0:
        opened(made[2], *(path.relative_to(made[2]).as_posix() for path in made[2].rglob("*")), ".")
    yield made
    subprocess.run(["chmod", "-R", "u+rwX", top], check=True)
    shutil.rmtree(top)


@pytest.fixture(scope="module")
def said(folders: list[Path]) -> list[dict[str, Any]]:
    """What each command printed and ended with, run by another user in each folder."""
    done = warm_python.run(every_command.__file__, *folders)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_every_command_by_another_user_is_one_clear_error(said: list[dict[str, Any]]) -> None:
    assert len(said) == 3 * len(EVERY) > 3 * 50
    for one in said:
        assert not [word for word in FORBIDDEN if word in one["said"]], one
        assert one["code"] in {*range(3), *range(10, 60)}, one
        if one["code"] not in (0, 2):
            # These two report, a line for each thing that they look at.
            reports = one["words"][1] in ("doctor", "status")
            assert "error: " in one["said"] or reports, one


def test_what_is_closed_names_its_owner(said: list[dict[str, Any]]) -> None:
    """In a closed folder no command can do anything, and each says whose it is."""
    shut = [one for one in said if one["folder"].endswith("shut")]
    failed = [one for one in shut if one["code"] not in (0, 2)]
    assert len(failed) > 50
    # These folders are of the user that runs the tests. Nobody is told to act as root.
    whose = "it belongs to root" if os.geteuid() == 0 else "run this as"
    assert not [one for one in failed if whose not in one["said"]]


def test_no_advice_makes_a_second_ledger(said: list[dict[str, Any]]) -> None:
    assert not [one for one in said if "state folder of its own" in one["said"]]


PROGRAM = """
import os, signal, sys, threading, time
from umbel_host.entry import enter, exit_code
def told():
    signal.raise_signal(signal.SIGINT)
def program():
{imports}
    def command():
{runs}
    return exit_code(command)
enter(program)
"""
INTERRUPTED = {
    "as it imports": ("told()", "pass"),
    "as it imports what swallows it": (
        "try:\n        told()\n    except BaseException:\n        pass",
        "pass",
    ),
    "as it runs": ("pass", "told()"),
    "as a library makes an error of its own of it": (
        "pass",
        "try:\n            told()\n        except BaseException:\n            raise ImportError",
    ),
    "in a finalizer": (
        "pass",
        "class A:\n            def __del__(self): told()\n        A()",
    ),
    "as it ends": ("import atexit; atexit.register(told)", "pass"),
}


def run_program(imports: str, runs: str, **how: Any) -> "subprocess.CompletedProcess[str]":
    text = PROGRAM.format(imports=f"    {imports}", runs=f"        {runs}")
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, **how
    )


@pytest.mark.parametrize("moment", INTERRUPTED)
def test_an_interrupt_ends_a_program_with_one_word(moment: str) -> None:
    done = run_program(*INTERRUPTED[moment])
    # At its end nobody is left to say so, and the signal itself ends it: shells show 130 too.
    expected = (-signal.SIGINT, "") if moment == "as it ends" else (130, "interrupted\n")
    assert (done.returncode, done.stderr) == expected


FAILURES = {
    "a mistake": ("[][1]", 1, "a mistake of Umbel's: IndexError in Python itself"),
    "a package that is missing": ("import umbel_no_such", 1, "a mistake of Umbel's"),
    "another's package": ("import no_such_package", 10, 'pip install -c constraints.txt ".['),
    "a file that is not there": ("open('nowhere')", 50, "file: nowhere"),
    "a path that no file can have": ("open('a\\0b')", 10, "found: the character U+0000"),
    "a name that is too long": ("open('n' * 300)", 50, "at most 255 bytes"),
    "an output that is full": ("print('x' * 100000, file=open('/dev/full', 'w'))", 50, "no space"),
    "no memory": ("raise MemoryError", 1, "no memory left"),
    "another thread's": (
        "t = threading.Thread(target=lambda: [][1]); t.start(); t.join()",
        0,
        "a mistake of Umbel's: IndexError",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_whatever_fails_is_one_sentence_with_its_code(case: str) -> None:
    runs, code, words = FAILURES[case]
    done = run_program("pass", runs)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert not [word for word in ("Traceback", "Errno") if word in done.stderr]


def test_who_asks_for_it_sees_a_traceback() -> None:
    done = run_program("pass", "[][1]", env={**os.environ, "UMBEL_TRACEBACK": "1"})
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


SHELL = {
    "closed standard streams": (">&- 2>&- <&-", 0),
    "a full output": (">/dev/full", 50),
    "a reader that has seen enough": ("| true", 1),
}


@pytest.mark.parametrize("case", SHELL)
def test_an_output_that_takes_nothing_is_no_traceback(case: str, tmp_path: Path) -> None:
    how, code = SHELL[case]
    text = PROGRAM.format(imports="    pass", runs="        print('x' * 1000000)")
    (tmp_path / "program.py").write_text(text)
    line = f"set -o pipefail; {sys.executable} program.py {how}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    line = f"rmdir ../gone; {sys.executable} -m umbel_client.cli budget show"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path / "gone", capture_output=True, text=True, check=False
    )
    assert done.returncode == 50
    assert "the folder that this command runs in is gone" in done.stderr


def test_without_a_home_folder_a_path_from_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('state = "~nobody-knows/state"\n')
    done = warm_python.run("-m", "umbel_server.cli", "job", "status", cwd=tmp_path)
    assert done.returncode == 10, done.stderr
    assert "~nobody-knows" in done.stderr


ENTRY = ("umbel_host/__init__.py", "umbel_host/entry.py")


@pytest.mark.full
@pytest.mark.parametrize("moment", [0.05, 0.15, 0.3, 0.5, 0.8, 1.2])
def test_each_command_is_interrupted_in_its_first_second(
    folders: list[Path], moment: float
) -> None:
    for words in EVERY:
        script = Path(sys.executable).with_name(words[0])
        process = subprocess.Popen(
            [sys.executable, "-X", "frozen_modules=on", script, *words[1:]],
            cwd=folders[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        time.sleep(moment)
        # As a terminal does: to all processes of the command.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        _, complaints = process.communicate(timeout=HANGING)
        assert "a mistake of Umbel's" not in complaints, words
        if "Traceback" in complaints:
            # The interpreter was interrupted as it began, or as it read what leads to `enter`.
            package = words[0].replace("-", "_").replace("simulate", "simulations")
            ours = re.findall(r"/(umbel_\w+/.*)\", line \d+, in (.+)", complaints)
            assert {function for _, function in ours} <= {"<module>", "main"}, (words, complaints)
            first = {f"{package}/__init__.py", f"{package}/cli/__init__.py", *ENTRY}
            assert {file for file, _ in ours} <= first, (words, complaints)
            assert process.returncode == -signal.SIGINT
        assert process.returncode in {-signal.SIGINT, 130, *range(3), *range(10, 60)}, words
