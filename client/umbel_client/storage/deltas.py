"""A round's delta on the site's disk: computed once, released under any number of attempts.

This module is part of the core of the privacy guarantee. Never return a delta that the ledger did
not record, or leave half a file under a delta's name.

The file holds the (noisy) delta and the optimizer state after it, and names the adapter that
training started from. It appears complete or not at all, and before the ledger records its digest;
that record makes it final.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from umbel_common.adapters.vector import Vector, to_bytes
from umbel_common.canonical import digest, digest_of
from umbel_common.errors import LedgerError, StorageError
from umbel_host.files import tensor_file
from umbel_host.files.durable import sync_folder
from umbel_host.files.tensor_file import TensorFile

OptimizerState = dict[str, npt.NDArray[np.float32]]
"""Moments of the optimizer, float32 each: `exp_avg/<tensor>`, `exp_avg_sq/<tensor>` and
`step/<tensor>`, or `momentum_buffer/<tensor>`."""

_DELTA = "delta"
_STATE_PREFIX = "state."


class DeltaCache:
    """The deltas of one job."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made if it is missing, readable by its owner only."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def save(
        self, round_number: int, adapter: bytes, delta: Vector, state: OptimizerState
    ) -> bytes:
        """Stores a round's delta; returns the digest that the ledger is to record.

        Raises:
            StorageError: the disk does not take it.
        """
        path = self._path(round_number)
        partial = path.with_suffix(".partial")
        tensors = {_DELTA: delta, **{_STATE_PREFIX + name: value for name, value in state.items()}}
        try:
            # A file that was there before may have been readable by others.
            partial.unlink(missing_ok=True)
            tensor_file.write(partial, tensors, {"adapter": adapter.hex()}, mode=0o600)
            partial.rename(path)
            sync_folder(self._folder)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError("a delta cannot be stored", file=path, found=error) from error
        return _digest(adapter, delta, sorted(state), state.__getitem__)

    def load(
        self, round_number: int, expected: bytes, *, with_state: bool = True
    ) -> tuple[bytes, Vector, OptimizerState]:
        """Digest of the starting adapter, delta and optimizer state of a round.

        Args:
            expected: the digest that the ledger recorded.
            with_state: whether the optimizer state is returned. It is verified in either case; it
                may be twice as large as the delta.

        Raises:
            LedgerError: the file is missing, unreadable or not what the ledger recorded.
        """
        path = self._path(round_number)
        try:
            with TensorFile(path) as file:
                adapter = bytes.fromhex(file.metadata["adapter"])
                delta = file.read(_DELTA)
                state: OptimizerState = {}

                def read(name: str) -> npt.NDArray[np.float32]:
                    value = file.read(_STATE_PREFIX + name)
                    if with_state:
                        state[name] = value
                    return value

                names = [name.removeprefix(_STATE_PREFIX) for name in file if name != _DELTA]
                found = _digest(adapter, delta, sorted(names), read)
        except (OSError, KeyError, ValueError) as error:
            raise LedgerError(
                "the delta of a charged round cannot be read",
                file=path,
                found=error,
                remedy="restore the file from a backup; this round cannot be computed again",
            ) from error
        if found != expected:
            raise LedgerError(
                "a delta is not the one that the ledger recorded",
                file=path,
                remedy="restore the file from a backup; this round cannot be computed again",
            )
        return adapter, delta, state

    def _path(self, round_number: int) -> Path:
        return self._folder / f"{round_number:05}.safetensors"


def _digest(
    adapter: bytes,
    delta: Vector,
    names: Iterable[str],
    state: Callable[[str], npt.NDArray[np.float32]],
) -> bytes:
    """The digest that the ledger records. It covers the delta, the adapter that it started from,
    and the optimizer state, which flows into later deltas and is read tensor by tensor."""

    def parts() -> Iterator[bytes | memoryview]:
        yield adapter
        yield to_bytes(delta)
        for name in names:
            yield digest("state", name.encode())
            yield to_bytes(state(name).reshape(-1))

    return digest_of("delta", parts())
