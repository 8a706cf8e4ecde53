"""An attempt's noisy sum on the site's disk: computed once, sent in this attempt and no other.

This module is part of the core of the privacy guarantee. Never return a sum that the ledger did not
record, or one attempt's sum for another. A file that is gone is a lost attempt; one that is altered
is an error of this site, which somebody has to look at.

A file has the digest of the adapter that the gradients were computed at (32 bytes), then the sum as
int32, little-endian. What is past its range wraps, as it would in the ring.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from umbel_common.canonical import digest
from umbel_common.errors import LedgerError, RemoteProtocolError, StorageError
from umbel_host.files import durable

_DIGEST_BYTES = hashlib.sha256().digest_size


class NoisySums:
    """The noisy sums of one job."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made if it is missing, readable by its owner only."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def save(
        self, round_number: int, attempt: int, adapter: bytes, values: npt.NDArray[np.int64]
    ) -> bytes:
        """Stores an attempt's sum; returns the digest that the ledger is to record.

        Sums of earlier rounds are removed: nobody asks for them any more.

        Args:
            adapter: digest of the adapter that the round starts from, 32 bytes.
            values: int64[n].

        Raises:
            StorageError: the disk does not take it.
        """
        path = self._path(round_number, attempt)
        data = adapter + values.astype("<i4").tobytes()
        try:
            for former in self._folder.glob("*.sum"):
                if former.name < f"{round_number:05}":
                    former.unlink(missing_ok=True)
            # What a killed computation left is not what is recorded.
            path.unlink(missing_ok=True)
            durable.create(path, data, 0o600)
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise StorageError("a noisy sum cannot be stored", file=path, found=error) from error
        return _digest(round_number, attempt, data)

    def load(
        self, round_number: int, attempt: int, expected: bytes
    ) -> tuple[bytes, npt.NDArray[np.int64]]:
        """Digest of the adapter, 32 bytes, and the sum of an attempt, int64[n].

        Args:
            expected: the digest that the ledger recorded.

        Raises:
            RemoteProtocolError: `attempt-lost` if there is no file.
            LedgerError: the file is unreadable, or not what the ledger recorded.
        """
        path = self._path(round_number, attempt)
        remedy = "look at this disk; the attempt stays charged, and the site sits its round out"
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            # The server may ask for another attempt, with this site.
            raise RemoteProtocolError(
                "attempt-lost",
                "the noisy sum of a charged attempt is gone",
                file=path,
                remedy="nothing: it stays charged, and the server may ask for another attempt",
            ) from error
        except OSError as error:
            raise LedgerError(
                "the noisy sum of a charged attempt cannot be read",
                file=path,
                found=error,
                remedy=remedy,
            ) from error
        if _digest(round_number, attempt, data) != expected:
            raise LedgerError(
                "a noisy sum is not the one that the ledger recorded", file=path, remedy=remedy
            )
        values = np.frombuffer(data, dtype="<i4", offset=_DIGEST_BYTES)
        return data[:_DIGEST_BYTES], values.astype(np.int64)

    def _path(self, round_number: int, attempt: int) -> Path:
        return self._folder / f"{round_number:05}-{attempt:05}.sum"


def _digest(round_number: int, attempt: int, data: bytes) -> bytes:
    key = round_number.to_bytes(4, "big") + attempt.to_bytes(4, "big")
    return digest("noisy sum", key, data)
