"""One process of a kind at a time, and no text in the log that looks like a line of ours."""

import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from umbel_common.errors import StorageError
from umbel_host.processes.lifecycle import locked, require_state, this_user

HOLDER = """
import sys, pathlib
from umbel_host.processes.lifecycle import locked
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
        with pytest.raises(StorageError, match="is already running"), locked(path, "this process"):
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


def test_a_state_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        require_state(tmp_path / "var" / "state")
    finally:
        os.umask(former)
    assert (tmp_path / "var" / "state").stat().st_mode & 0o077 == 0


def test_a_state_folder_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/state"):
        require_state(tmp_path / "file" / "state")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@contextmanager
def as_nobody() -> Iterator[str]:
    """Makes this process a user who owns nothing; yields their name."""
    nobody = pwd.getpwnam("nobody")
    os.seteuid(nobody.pw_uid)
    try:
        yield nobody.pw_name
    finally:
        os.seteuid(0)


@needs_root
@pytest.mark.parametrize("name", ["", "new"])
def test_a_state_folder_that_is_closed_to_this_user_is_refused(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with as_nobody() as user, pytest.raises(StorageError) as refusal:
            require_state(Path(folder) / name)
    assert refusal.value.found == f"Permission denied, for user {user}"


@needs_root
def test_root_does_not_write_into_another_users_state(tmp_path: Path) -> None:
    """It could, but then the user's own process could not write any more."""
    os.chown(tmp_path, pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(StorageError) as refusal:
        require_state(tmp_path)
    assert refusal.value.found == f"user {this_user()}"
    assert "user nobody" in str(refusal.value.accepted)
    os.chown(tmp_path, 0, -1)
    require_state(tmp_path)


CRASH = """
import os, resource, sys
from umbel_host.processes import lifecycle
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
key = bytes(ord(one) + 1 for one in "the hidden key")
if sys.argv[1] == "hidden":
    lifecycle.hide_memory()
os.abort()
"""


@needs_root
@pytest.mark.skipif(
    Path("/proc/sys/kernel/core_pattern").read_text().startswith(("|", "/")),
    reason="this machine's cores go elsewhere",
)
def test_a_crash_writes_no_key_to_the_disk(tmp_path: Path) -> None:
    """Nor anything else; without `hide_memory` the key is in the file."""

    def cores(how: str) -> list[Path]:
        command = [sys.executable, "-c", CRASH, how]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGABRT, done.stderr
        return list(tmp_path.glob("core*"))

    assert cores("hidden") == []
    (core,) = cores("open")
    assert b"uif!ijeefo!lfz" in core.read_bytes()


def test_the_log_has_one_line_for_each_event() -> None:
    script = (
        "import logging; from umbel_host.processes.log import configure; configure();"
        " logging.getLogger('umbel.x').info('first\\n2026-01-01T00:00:00Z INFO umbel: forged')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    first, second = done.stderr.splitlines()
    assert first.endswith("INFO umbel.x: first")
    assert second.startswith("    2026")
