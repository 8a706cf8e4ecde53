from pathlib import Path

import numpy as np
import pytest

from umbel_client.storage.deltas import DeltaCache
from umbel_common.errors import LedgerError

ADAPTER = b"\x05" * 32
DELTA = np.arange(4, dtype=np.float32)
STATE = {
    "exp_avg/b": np.ones(2, dtype=np.float32),
    "step/b": np.array(3, dtype=np.float32),
    "exp_avg/a": np.zeros((2, 2), dtype=np.float32),
}


@pytest.fixture
def cache(tmp_path: Path) -> DeltaCache:
    return DeltaCache(tmp_path / "deltas")


def test_a_delta_comes_back_with_its_state_and_starting_adapter(cache: DeltaCache) -> None:
    digest = cache.save(1, ADAPTER, DELTA, STATE)
    adapter, delta, state = cache.load(1, digest)
    assert adapter == ADAPTER
    assert np.array_equal(delta, DELTA)
    assert state.keys() == STATE.keys()
    assert all(np.array_equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("what", ["delta", "state", "adapter"])
def test_the_digest_covers_everything_that_flows_into_a_release(
    cache: DeltaCache, what: str
) -> None:
    digest = cache.save(1, ADAPTER, DELTA, STATE)
    changed = {
        "delta": (ADAPTER, DELTA + np.float32(1), STATE),
        "state": (ADAPTER, DELTA, {**STATE, "exp_avg/a": np.ones((2, 2), dtype=np.float32)}),
        "adapter": (b"\x06" * 32, DELTA, STATE),
    }[what]
    assert cache.save(1, *changed) != digest
    with pytest.raises(LedgerError, match="not the one that the ledger recorded"):
        cache.load(1, digest)


def test_a_missing_or_torn_file_is_one_clear_error(cache: DeltaCache, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        cache.load(1, bytes(32))
    digest = cache.save(1, ADAPTER, DELTA, STATE)
    (path,) = (tmp_path / "deltas").iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(LedgerError, match=r"00001\.safetensors"):
        cache.load(1, digest)


def test_files_are_the_owners_alone_and_no_partial_one_is_left(
    cache: DeltaCache, tmp_path: Path
) -> None:
    cache.save(1, ADAPTER, DELTA, {})
    (path,) = (tmp_path / "deltas").iterdir()
    assert path.stat().st_mode & 0o077 == 0
