"""The adapter of the newest verified release, on a site's disk: whole, closed, never believed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from umbel_client.storage.kept_adapter import KeptAdapter
from umbel_common.adapters.vector import Vector, adapter_digest, initial_vector
from umbel_common.errors import RemoteProtocolError, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_host.files import tensor_file


@pytest.fixture
def plan(make_plan: Callable[..., TrainingPlan]) -> TrainingPlan:
    return make_plan()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "releases" / "job.safetensors"


@pytest.fixture
def adapter(plan: TrainingPlan) -> Vector:
    return initial_vector(plan)


@pytest.fixture
def digest(plan: TrainingPlan, adapter: Vector) -> bytes:
    return adapter_digest(plan.digest(), adapter)


@pytest.fixture
def kept(path: Path, adapter: Vector, digest: bytes) -> KeptAdapter:
    kept = KeptAdapter(path)
    kept.keep(digest, adapter)
    return kept


def refused(kept: KeptAdapter, plan: TrainingPlan, *accepted: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as refusal:
        kept.load(plan, accepted)
    assert refusal.value.check == "release-missing"
    return refusal.value


def test_what_was_kept_comes_back_and_may_be_changed(
    kept: KeptAdapter, plan: TrainingPlan, adapter: Vector, digest: bytes
) -> None:
    loaded = kept.load(plan, {digest, bytes(32)})
    assert np.array_equal(loaded, adapter)
    loaded += 1


def test_only_its_owner_reads_it(kept: KeptAdapter, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_the_newest_takes_the_place_of_the_one_before(
    kept: KeptAdapter, path: Path, plan: TrainingPlan, adapter: Vector, digest: bytes
) -> None:
    newer = adapter + np.float32(1)
    newest = adapter_digest(plan.digest(), newer)
    kept.keep(newest, newer)
    assert np.array_equal(kept.load(plan, {newest}), newer)
    error = refused(kept, plan, digest)
    assert (error.found, error.accepted) == (newest.hex(), (digest.hex(),))
    assert path.exists()


def test_one_that_is_there_is_not_written_again(
    kept: KeptAdapter, path: Path, adapter: Vector, digest: bytes
) -> None:
    before = path.stat()
    kept.keep(digest, adapter)
    assert path.stat().st_ino == before.st_ino


def test_none_is_refused_by_name(path: Path, plan: TrainingPlan, digest: bytes) -> None:
    assert refused(KeptAdapter(path), plan, digest).file == path


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def renamed(path: Path) -> None:
    """Another adapter under the name of this one."""
    with tensor_file.TensorFile(path) as file:
        name = file.metadata["adapter"]
        other = file.read("adapter") + np.float32(1)
    tensor_file.write(path, {"adapter": other}, {"adapter": name})


def reshaped(path: Path) -> None:
    """The same numbers, and so the same digest, in another shape."""
    with tensor_file.TensorFile(path) as file:
        name, numbers = file.metadata["adapter"], file.read("adapter")
    tensor_file.write(path, {"adapter": numbers.reshape(1, -1)}, {"adapter": name})


def unnamed(path: Path) -> None:
    with tensor_file.TensorFile(path) as file:
        numbers = file.read("adapter")
    tensor_file.write(path, {"adapter": numbers}, {})


def misnamed(path: Path) -> None:
    with tensor_file.TensorFile(path) as file:
        numbers = file.read("adapter")
    tensor_file.write(path, {"adapter": numbers}, {"adapter": "no digest"})


@pytest.mark.parametrize(
    "alter", [flipped, cut, emptied, renamed, reshaped, unnamed, misnamed], ids=lambda f: f.__name__
)
def test_a_copy_that_was_altered_is_noticed_named_and_deleted(
    kept: KeptAdapter,
    path: Path,
    plan: TrainingPlan,
    adapter: Vector,
    digest: bytes,
    alter: Callable[[Path], None],
) -> None:
    alter(path)
    error = refused(kept, plan, digest)
    assert "not the one that it verified" in error.message
    assert error.file == path
    assert error.found is not None
    assert not path.exists()
    # Had it stayed, the whole adapter that comes next would not be written over it.
    kept.keep(digest, adapter)
    assert np.array_equal(kept.load(plan, {digest}), adapter)


def test_a_disk_that_takes_nothing_leaves_what_was_there(
    kept: KeptAdapter,
    path: Path,
    plan: TrainingPlan,
    adapter: Vector,
    digest: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(target: Path, *_: object, **__: object) -> None:
        target.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        kept.keep(bytes(32), adapter)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert np.array_equal(kept.load(plan, {digest}), adapter)


def test_deleting_it_twice_is_deleting_it_once(kept: KeptAdapter, path: Path) -> None:
    for _ in range(2):
        kept.delete()
        assert not path.exists()
