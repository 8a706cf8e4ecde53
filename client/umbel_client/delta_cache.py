"""A round's delta on the site's disk: computed once, released under any number of attempts.

The file holds the (noisy) delta and the optimiser's state behind it, and names the adapter that
training started from. It appears complete or not at all, before the ledger learns its digest; the
ledger's digest is what makes it final.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from umbel_common.adapter import Vector, to_bytes
from umbel_common.canonical import digest
from umbel_common.errors import LedgerError, StorageError

State = dict[str, npt.NDArray[np.float32]]
"""The optimiser's state by name, as `training.train_round` gives and takes it."""

_DELTA = "delta"
_STATE_PREFIX = "state."


class DeltaCache:
    """The deltas of one job."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made if it is missing, readable by its owner only."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def save(self, round_number: int, adapter: bytes, delta: Vector, state: State) -> bytes:
        """Stores a round's delta; returns the digest that the ledger is to record.

        Raises:
            StorageError: the disk does not take it.
        """
        path = self._path(round_number)
        partial = path.with_suffix(".partial")
        tensors = {_DELTA: delta, **{_STATE_PREFIX + name: value for name, value in state.items()}}
        try:
            data = safetensors.numpy.save(tensors, metadata={"adapter": adapter.hex()})
            with open(partial, "wb", opener=_private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            _sync(self._folder)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise StorageError("a delta cannot be stored", file=path, found=error) from error
        return _digest(adapter, delta, state)

    def load(self, round_number: int, expected: bytes) -> tuple[bytes, Vector, State]:
        """Digest of the starting adapter, delta and optimiser state of a round.

        Args:
            expected: the digest that the ledger recorded.

        Raises:
            LedgerError: the file is missing, unreadable or not what the ledger recorded.
        """
        path = self._path(round_number)
        try:
            with safe_open(path, "numpy") as file:
                adapter = bytes.fromhex((file.metadata() or {})["adapter"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            delta = tensors.pop(_DELTA)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise LedgerError(
                "the delta of a charged round cannot be read",
                file=path,
                found=error,
                remedy="restore the file from a backup; this round cannot be computed again",
            ) from error
        state = {name.removeprefix(_STATE_PREFIX): value for name, value in sorted(tensors.items())}
        if _digest(adapter, delta, state) != expected:
            raise LedgerError(
                "a delta is not the one that the ledger recorded",
                file=path,
                remedy="restore the file from a backup; this round cannot be computed again",
            )
        return adapter, delta, state

    def _path(self, round_number: int) -> Path:
        return self._folder / f"{round_number:05}.safetensors"


def _digest(adapter: bytes, delta: Vector, state: State) -> bytes:
    """What the ledger records: the delta, the adapter that it started from, and the optimiser's
    state, which flows into later deltas."""
    parts: list[bytes | memoryview] = [adapter, to_bytes(delta)]
    for name in sorted(state):
        parts += [digest("state", name.encode()), to_bytes(state[name].reshape(-1))]
    return digest("delta", *parts)


def _sync(folder: Path) -> None:
    """Makes a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
