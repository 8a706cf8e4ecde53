"""A process that is started warm is what `python` would have started, but for the time it takes."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support import warm_python

LOOKS = """\
import atexit, logging, os, signal, sys, threading, weakref
atexit.register(lambda: print("at the end"))
weakref.finalize(atexit, lambda: print("at the very end"))
print(sys.argv[1:], sys.path[0], os.getcwd(), os.environ.get("GIVEN"), sys.stdin.read())
print("complaint", file=sys.stderr)
assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert not logging.root.handlers
assert not [name for name in sys.modules if name.startswith("umbel")]
assert "torch" in sys.modules
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(LOOKS)
    return path


def test_a_script_finds_what_it_was_given(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = {**os.environ, "GIVEN": "yes"}
    done = warm_python.run(script, "a", 1, cwd=folder, env=environment, input="typed")
    assert done.stderr == "complaint\n"
    assert done.stdout == f"['a', '1'] {tmp_path} {folder} yes typed\nat the end\nat the very end\n"
    assert done.returncode == 7


def test_a_module_is_found_from_the_folder_of_the_process(script: Path) -> None:
    assert warm_python.run("-m", "script", cwd=script.parent).returncode == 7


def test_a_module_is_not_found_from_the_folder_with_safe_paths(script: Path) -> None:
    done = warm_python.run("-P", "-m", "script", cwd=script.parent)
    assert (done.returncode, "No module named script" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("raise SystemExit('this went wrong')", 1, "this went wrong"),
        ("raise SystemExit", 0, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_it_ends_as_a_program_ends(tmp_path: Path, program: str, code: int, said: str) -> None:
    path = tmp_path / "program.py"
    path.write_text(program)
    done = warm_python.run(path)
    assert (done.returncode, said in done.stderr) == (code, True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_running_process_can_be_signalled(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "program.py"
    path.write_text("import time\nprint('begun', flush=True)\ntime.sleep(3600)\n")
    ours, theirs = os.pipe()
    with open(os.devnull, "w") as nowhere:
        process = warm_python.start(path, stdout=theirs, stderr=nowhere.fileno())
    os.close(theirs)
    with open(ours) as output:
        assert output.readline() == "begun\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(how)
        assert process.wait() == -how
        # Nobody else holds what it wrote to.
        assert output.read() == ""
