import resource
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from umbel_common.adapters.vector import initial_vector
from umbel_common.errors import StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import Release
from umbel_common.trust.identity import Identity, sign
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

MakePlan = Callable[..., TrainingPlan]


@pytest.fixture
def release() -> Any:
    operator = Identity(bytes(32))
    statement = Release(
        federation="clinics",
        job="job",
        plan=bytes(32),
        round=0,
        attempt=0,
        context=bytes(32),
        adapter=bytes(32),
        survivors=(),
        total_weight=0,
    )
    return sign(operator, statement)


def test_an_adapter_comes_back_by_its_digest(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    vector = initial_vector(plan)
    registry = Registry(tmp_path)
    digest = registry.publish(plan, vector)
    assert np.array_equal(registry.load(plan, digest), vector)
    assert registry.publish(plan, vector) == digest
    assert [path.name for path in tmp_path.iterdir()] == [digest.hex()]


def test_an_adapter_that_was_changed_on_disk_is_noticed(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    plan = make_plan()
    registry = Registry(tmp_path)
    digest = registry.publish(plan, initial_vector(plan))
    path = registry.folder(digest) / "head.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: value + 1 for name, value in tensors.items()}, path)
    with pytest.raises(StorageError, match="does not match its digest"):
        registry.load(plan, digest)
    path.write_bytes(b"torn")
    with pytest.raises(StorageError, match="cannot be read"):
        registry.load(plan, digest)


def test_a_registry_on_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    plan = make_plan()
    registry = Registry(tmp_path / "registry")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be stored"):
            registry.publish(plan, initial_vector(plan))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "registry").iterdir()) == []


def test_an_attempt_number_is_burned_before_it_is_used(tmp_path: Path, release: Any) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    assert journal.next_attempt("job", 1) == 1
    journal.record_attempt("job", 1, 1, release)
    journal.close()
    journal = Journal(tmp_path / "journal.sqlite")
    assert journal.next_attempt("job", 1) == 2
    assert journal.next_attempt("job", 2) == 1
    with pytest.raises(StorageError):
        journal.record_attempt("job", 1, 1, release)
    journal.close()


@pytest.mark.parametrize("content", [b"not a database at all, but long enough" * 100])
def test_a_corrupt_journal_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"journal\.sqlite"):
        Journal(path)


def test_a_journal_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StorageError, match="accepted: at most 2"):
        Journal(path)
