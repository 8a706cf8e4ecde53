"""One process at a time, and nothing that looks like a line of the log and is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from umbel_common.errors import StorageError
from umbel_host.process import locked

HOLDER = """
import sys, pathlib
from umbel_host.process import locked
with locked(pathlib.Path(sys.argv[1]), "this process"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "trainer.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StorageError, match="runs already"), locked(path, "this process"):
            pass
        holder.kill()
    with locked(path, "this process"):
        assert os.stat(path).st_mode & 0o077 == 0


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="file/lock"),
        locked(tmp_path / "file" / "lock", "this process"),
    ):
        pass


def test_the_log_has_one_line_for_each_event() -> None:
    script = (
        "import logging; from umbel_host.log import configure; configure();"
        " logging.getLogger('umbel.x').info('first\\n2026-01-01T00:00:00Z INFO umbel: forged')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    first, second = done.stderr.splitlines()
    assert first.endswith("INFO umbel.x: first")
    assert second.startswith("    2026")
