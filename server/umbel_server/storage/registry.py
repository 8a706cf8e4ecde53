"""Global adapters on disk: PEFT folders addressed by content; their releases are in the journal.

A folder appears complete or not at all: it is written under another name, synced, then renamed. An
adapter that is read is checked against the digest that names it. No folder is ever changed.

The same holds for the sums of rounds, each a file of `sums/`. They are kept as they are: what an
attempt's noise leaves of them to compress is a quarter to a half of a file as large as an adapter.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from umbel_common.adapters.peft_folder import text_files
from umbel_common.adapters.start import require_start
from umbel_common.adapters.vector import Vector, adapter_digest, initial_vector, start_digest
from umbel_common.errors import RemoteProtocolError, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.start import LabelNamesStart, ReleasedStart
from umbel_common.secagg.encoding import RingVector, sum_digest
from umbel_host.files.adapter_folder import read_vector, write_vector
from umbel_host.processes.lifecycle import require_own

SUMS = "sums"
"""Folder of the sums."""


class Registry:
    """The releases of an aggregation server."""

    def __init__(self, root: Path) -> None:
        """Creates `root` if it is missing.

        Raises:
            StorageError: another user could have put adapters there, or can.
        """
        root.mkdir(parents=True, exist_ok=True)
        require_own(root)
        self._root = root

    def folder(self, digest: bytes) -> Path:
        """The path of the folder with the adapter of a digest; it may not exist."""
        return self._root / digest.hex()

    def publish(self, plan: TrainingPlan, vector: Vector) -> bytes:
        """Stores an adapter; returns its digest.

        Storing an adapter again changes nothing.

        Raises:
            StorageError: it cannot be written; nothing half-written is left.
        """
        digest = adapter_digest(plan.digest(), vector)
        self._store(digest, plan, vector)
        return digest

    def keep_start(self, plan: TrainingPlan, vector: Vector) -> None:
        """Stores the tensor that a plan names as its start, which no release names yet.

        Raises:
            StorageError: it cannot be written; nothing half-written is left.
        """
        self._store(start_digest(vector), plan, vector)

    def start(self, plan: TrainingPlan) -> Vector:
        """The adapter that a plan starts from, float32[plan.lora.size].

        Raises:
            StorageError: it is a tensor that is not here, or is not what the plan names.
        """
        match plan.start:
            case LabelNamesStart() as start:
                folder = self.folder(start.tensor)
            case ReleasedStart() as start:
                folder = self.folder(start.adapter)
            case _:
                return initial_vector(plan)
        try:
            require_own(folder)
            vector = read_vector(folder, plan)
            require_start(plan, vector)
        except (StorageError, RemoteProtocolError) as error:
            raise StorageError(
                "the adapter that a plan starts from is not in the registry",
                file=folder,
                found=error.message,
                remedy="start the job beside the file that `umbel-server plan new` wrote, or at the"
                " operator whose job released the adapter",
            ) from None
        return vector

    def _store(self, digest: bytes, plan: TrainingPlan, vector: Vector) -> None:
        target = self.folder(digest)
        if target.exists():
            return
        partial = target.with_suffix(f".partial-{os.getpid()}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            write_folder(partial, plan, vector)
            for path in (*partial.iterdir(), partial):
                _sync(path)
            partial.rename(target)
            _sync(self._root)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _not_stored("an adapter", target, error) from error

    def load(self, plan: TrainingPlan, digest: bytes) -> Vector:
        """Reads a stored adapter, float32[plan.lora.size]; the caller may change the vector.

        Raises:
            StorageError: it is missing, does not match its digest, or could be another user's.
        """
        folder = self.folder(digest)
        require_own(folder)
        vector = read_vector(folder, plan)
        if adapter_digest(plan.digest(), vector) != digest:
            raise StorageError(
                "a stored adapter does not match its digest",
                file=folder,
                remedy="restore the folder from a backup; the digest is its name",
            )
        return vector

    def sum_file(self, digest: bytes) -> Path:
        """The path of the file with the sum of a digest; it may not exist."""
        return self._root / SUMS / digest.hex()

    def keep_sum(self, total: RingVector) -> bytes:
        """Stores the sum of a round; returns its digest.

        Storing a sum again changes nothing.

        Raises:
            StorageError: it cannot be written; nothing half-written is left.
        """
        digest = sum_digest(total)
        target = self.sum_file(digest)
        if target.exists():
            return digest
        partial = target.with_suffix(f".partial-{os.getpid()}")
        try:
            target.parent.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(np.ascontiguousarray(total).view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(target)
            for folder in (target.parent, self._root):
                _sync(folder)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _not_stored("a sum", target, error) from error
        return digest

    def load_sum(self, plan: TrainingPlan, digest: bytes) -> RingVector:
        """Reads a stored sum of a round of the plan.

        Raises:
            StorageError: it is missing, does not match its digest, or could be another user's.
        """
        path = self.sum_file(digest)
        require_own(path)
        try:
            total: RingVector = np.fromfile(path, dtype=f"<u{plan.aggregation.ring_bits // 8}")
        except OSError as error:
            raise StorageError("a sum cannot be read", file=path, found=error) from error
        if sum_digest(total) != digest:
            raise StorageError(
                "a stored sum does not match its digest",
                file=path,
                remedy="restore the file from a backup; the digest is its name",
            )
        return total


def _not_stored(what: str, target: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{what} cannot be stored",
        file=target,
        found=error,
        remedy="free space or make the folder writable; the job resumes where it stopped",
    )


def write_folder(folder: Path, plan: TrainingPlan, vector: Vector) -> None:
    """Writes a new PEFT folder with an adapter, float32[plan.lora.size].

    Raises:
        OSError: it exists, or cannot be written; what is there is not whole.
    """
    folder.mkdir()
    write_vector(folder, plan, vector)
    for name, text in text_files(plan).items():
        (folder / name).write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
