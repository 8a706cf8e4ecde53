"""Real processes under a supervisor are restarted when they die, and end with it in any case."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.waiting import HANGING

from umbel_host.processes.supervisor import bound_to_parent

SUPERVISOR = """
import os, sys

from umbel_host.processes import supervisor
from umbel_host.processes.log import configure
from umbel_host.processes.supervisor import Command, supervise
if "UNSAFE" in os.environ:
    supervisor.our_module = lambda module, *words: [sys.executable, "-m", module, *words]
configure()
commands = [Command(name, "child", (name,)) for name in sys.argv[1:]]
sys.exit(supervise(commands, stopping_seconds=1.0))
"""
CHILD = """
import os, pathlib, signal, sys, time
name = sys.argv[1]
if name.startswith("ends-") and not pathlib.Path(name).exists():
    pathlib.Path(name).touch()
    sys.exit(int(name.removeprefix("ends-")))
pathlib.Path(f"{name}.pid").write_text(str(os.getpid()))
if name == "broken":
    sys.exit(10)
if name == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a supervisor of children with these names."""
    (tmp_path / "child.py").write_text(CHILD)
    started: list[subprocess.Popen[str]] = []

    def run(*names: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, *names],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def pid_of(folder: Path, name: str, other_than: int = 0) -> int:
    """The process id of a child, once it runs."""
    deadline = time.monotonic() + HANGING
    while time.monotonic() < deadline:
        text = (folder / f"{name}.pid").read_text() if (folder / f"{name}.pid").exists() else ""
        if text and int(text) != other_than:
            return int(text)
        time.sleep(0.05)
    raise AssertionError(f"{name} does not run")


def ended(pid: int) -> bool:
    deadline = time.monotonic() + HANGING
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_process_that_was_killed_is_started_again(start: Start, tmp_path: Path) -> None:
    start("one")
    first = pid_of(tmp_path, "one")
    os.kill(first, signal.SIGKILL)
    assert pid_of(tmp_path, "one", other_than=first) != first


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_supervisor_that_is_told_to_stop_ends_them_all(
    start: Start, tmp_path: Path, how: signal.Signals
) -> None:
    process = start("one", "two")
    pids = [pid_of(tmp_path, name) for name in ("one", "two")]
    process.send_signal(how)
    assert process.wait(HANGING) == 0
    assert all(ended(pid) for pid in pids)


def test_who_does_not_listen_is_killed(start: Start, tmp_path: Path) -> None:
    process = start("stubborn")
    pid = pid_of(tmp_path, "stubborn")
    time.sleep(0.3)
    process.terminate()
    assert process.wait(HANGING) == 0
    assert ended(pid)


def test_a_killed_supervisor_leaves_nobody_behind(start: Start, tmp_path: Path) -> None:
    process = start("one")
    pid = pid_of(tmp_path, "one")
    process.kill()
    assert ended(pid)


def test_who_gives_up_at_its_first_start_ends_all_with_its_exit_code(
    start: Start, tmp_path: Path
) -> None:
    process = start("one", "broken")
    assert process.wait(HANGING) == 10
    assert ended(pid_of(tmp_path, "one"))


def test_the_other_side_decides_not_when_all_end(start: Start, tmp_path: Path) -> None:
    """A lying peer can show a mistake of ours or break the protocol, also at once."""
    names = ("ends-1", "ends-40", "ends-44")
    process = start(*names)
    assert all(pid_of(tmp_path, name) for name in names)
    assert process.poll() is None


@pytest.mark.parametrize(("environment", "code"), [({}, 10), ({"UNSAFE": "1"}, 11)])
def test_a_module_in_the_working_folder_does_not_run(
    tmp_path: Path, environment: dict[str, str], code: int
) -> None:
    """A file that another party sent may be called as a module is; without `-P` it would run."""
    ours, site = tmp_path / "ours", tmp_path / "site"
    for folder, text in ((ours, CHILD), (site, "raise SystemExit(11)")):
        folder.mkdir()
        (folder / "child.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-P", "-c", SUPERVISOR, "broken"],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(ours), **environment},
        capture_output=True,
        check=False,
        timeout=HANGING,
    )
    assert done.returncode == code


_PARENT = """\
import subprocess, sys
from umbel_host.processes.supervisor import bound_to_parent
child = subprocess.Popen(bound_to_parent(["/bin/sleep", "600"]), stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
child.wait()
"""


def test_a_bound_child_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + HANGING
        command = Path(f"/proc/{child}/cmdline")
        # Before it has become the program, it may not be bound yet.
        while not command.read_bytes().startswith(b"/bin/sleep"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        parent.kill()
    while command.exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        bound_to_parent([str(tmp_path / "none")]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path / 'none'}: No such file or directory\n"
