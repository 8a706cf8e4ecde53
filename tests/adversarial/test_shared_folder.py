"""A folder that two users share: what one of them leaves there is not used by the other.

Each attack is run a second time without the fix, where it must reach its goal. It needs two users,
and so root, which takes the second user's name for a moment.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from umbel_common.adapters.vector import adapter_digest, initial_vector
from umbel_common.errors import StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_host.processes import lifecycle
from umbel_host.processes.lifecycle import locked, require_own, require_state
from umbel_server.jobs import evaluator
from umbel_server.jobs.evaluator import ProcessEvaluator
from umbel_server.operator.config import EvaluationConfig
from umbel_server.storage.job_queue import JobQueue
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

MakePlan = Callable[..., TrainingPlan]
STRANGER = 65533
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder as the operator's state under systemd: root's, sticky, for both users."""
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o3777)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    return folder


@contextmanager
def as_stranger() -> Iterator[None]:
    os.seteuid(STRANGER)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def unchecked(replace_everywhere: Callable[[object, object], None]) -> Callable[[], None]:
    """Takes the fix out."""
    return lambda: replace_everywhere(require_own, lambda path: None)


@needs_root
@pytest.mark.parametrize("kind", [Journal, JobQueue])
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_a_database_that_was_laid_in_the_way_is_not_used(
    shared: Path,
    unchecked: Callable[[], None],
    kind: Callable[[Path], Journal],
    mode: int,
) -> None:
    path = shared / "database.sqlite"
    with as_stranger():
        path.touch()
        path.chmod(mode)
    with pytest.raises(StorageError, match="another user of this machine"):
        kind(path)
    assert path.stat().st_size == 0
    # The kernel's own protection of sticky folders, where it is on, would refuse it too.
    shared.chmod(0o700)
    unchecked()
    with closing(kind(path)):
        assert path.stat().st_uid == STRANGER


@needs_root
@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_nor_a_log_beside_a_database(shared: Path, suffix: str) -> None:
    path = shared / "database.sqlite"
    JobQueue(path).close()
    with as_stranger():
        (shared / f"database.sqlite{suffix}").touch()
    with pytest.raises(StorageError, match=rf"database\.sqlite{suffix}"):
        JobQueue(path)


@needs_root
def test_nor_a_link(shared: Path) -> None:
    JobQueue(shared / "queue.sqlite").close()
    with as_stranger():
        (shared / "journal.sqlite").symlink_to("queue.sqlite")
        (shared / "rounds.lock").symlink_to("/etc/new-file")
        (shared / "lock").touch()
    with pytest.raises(StorageError, match="another user of this machine"):
        Journal(shared / "journal.sqlite")
    for name in ("rounds.lock", "lock"):
        with pytest.raises(StorageError), locked(shared / name, "the process"):
            pass
    assert not Path("/etc/new-file").exists()


@needs_root
def test_a_registry_that_was_laid_in_the_way_is_not_used(
    shared: Path, make_plan: MakePlan, unchecked: Callable[[], None]
) -> None:
    with as_stranger():
        (shared / "registry").mkdir(mode=0o777)
    with pytest.raises(StorageError, match="another user of this machine"):
        Registry(shared / "registry")
    unchecked()
    plan = make_plan()
    vector = initial_vector(plan)
    digest = adapter_digest(plan.digest(), vector)
    with as_stranger():
        planted = shared / "registry" / digest.hex()
        planted.mkdir()
    assert Registry(shared / "registry").publish(plan, vector) == digest
    assert list(planted.iterdir()) == []


@needs_root
@pytest.mark.parametrize("trap", ["folder", "link to a folder"])
def test_an_evaluation_writes_over_nothing(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchecked: Callable[[], None],
    trap: str,
) -> None:
    journal = tmp_path / "journal.sqlite"
    journal.write_bytes(b"a journal")
    scratch = shared / "evaluation"
    with as_stranger():
        if trap == "folder":
            scratch.mkdir()
            (scratch / "adapter.f32").symlink_to(journal)
        else:
            scratch.symlink_to(tmp_path)
    scoring = ProcessEvaluator(EvaluationConfig(holdout="h", model="m"), scratch)
    with pytest.raises(StorageError, match="another user of this machine"):
        scoring._write("adapter.f32", np.zeros(4, np.float32))
    unchecked()
    scoring._write("adapter.f32", np.zeros(4, np.float32))
    # A second barrier: the file is made, never written over.
    assert journal.read_bytes() == b"a journal"
    if trap == "folder":
        (scratch / "adapter.f32").unlink()
        (scratch / "adapter.f32").symlink_to(journal)
        monkeypatch.setattr(evaluator, "create", lambda path, data, mode: path.write_bytes(data))
        monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        scoring._write("adapter.f32", np.zeros(4, np.float32))
        assert journal.read_bytes() == bytes(16)


@needs_root
def test_a_state_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", STRANGER, STRANGER)
    with pytest.raises(StorageError, match="belongs to another user"):
        require_state(tmp_path / "state")


@pytest.mark.parametrize("mode", [0o666, 0o622, 0o602])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "queue.sqlite"
    JobQueue(path).close()
    path.chmod(mode)
    with pytest.raises(StorageError, match=rf"mode {mode:04o}"):
        JobQueue(path)
    path.chmod(0o600)
    JobQueue(path).close()


def test_a_file_of_a_group_that_is_not_our_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "queue.sqlite"
    JobQueue(path).close()
    path.chmod(0o660)
    JobQueue(path).close()
    monkeypatch.setattr(lifecycle.os, "getegid", lambda: path.stat().st_gid + 1)
    with pytest.raises(StorageError, match="mode 0660"):
        JobQueue(path)
