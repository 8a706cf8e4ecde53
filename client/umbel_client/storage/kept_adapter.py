"""The adapter of the newest release of a job that this site verified, on its disk.

A request to train may bring only what a release changed in it. The file appears complete or not at
all. It is never believed: what is read is compared with the digest of an adapter that the operator
released, and a file that does not have it is as good as none. So nothing is lost with it, and a
backup leaves it out: the operator sends the adapter again.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from umbel_common.adapters.vector import Vector, adapter_digest
from umbel_common.errors import RemoteProtocolError, StorageError, require
from umbel_common.plans.plan import TrainingPlan
from umbel_host.files import tensor_file
from umbel_host.files.durable import sync_folder
from umbel_host.files.tensor_file import TensorFile

_ADAPTER = "adapter"


class KeptAdapter:
    """The file of one job; there may be none."""

    def __init__(self, path: Path) -> None:
        """`path`: its folder is made when an adapter is kept, readable by its owner only."""
        self._path = path

    def keep(self, digest: bytes, adapter: Vector) -> None:
        """Puts an adapter into the place of the one before; returns when it is on disk.

        Args:
            digest: the adapter's, 32 bytes. If the file says that it has this one already, it stays
                as it is.
            adapter: float32[plan.lora.size].

        Raises:
            StorageError: the disk does not take it; the file before stays.
        """
        if self._named() == digest:
            return
        partial = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A file that was there before may have been readable by others.
            partial.unlink(missing_ok=True)
            tensor_file.write(partial, {_ADAPTER: adapter}, {_ADAPTER: digest.hex()}, mode=0o600)
            partial.rename(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError(
                "the adapter of a release cannot be stored", file=self._path, found=error
            ) from error

    def load(self, plan: TrainingPlan, accepted: Collection[bytes]) -> Vector:
        """The adapter, float32[plan.lora.size], if it is one of `accepted`; it may be changed.

        A file that is damaged is deleted, because `keep` would leave it where it is.

        Args:
            accepted: the digests of the adapters that are of use.

        Raises:
            RemoteProtocolError: `release-missing`: there is no file, or it is damaged, or holds
                another adapter.
            StorageError: a damaged file cannot be deleted.
        """
        try:
            with TensorFile(self._path) as file:
                named = bytes.fromhex(file.metadata[_ADAPTER])
                require(
                    named in accepted,
                    "release-missing",
                    "this site has kept the adapter of another release than the request builds on",
                    file=self._path,
                    found=named.hex(),
                    accepted=tuple(sorted({digest.hex() for digest in accepted})),
                    remedy="none is needed: the operator's next attempt brings the whole adapter",
                )
                adapter = np.empty(plan.lora.size, dtype=np.float32)
                file.read_into(_ADAPTER, adapter)
        except FileNotFoundError:
            raise RemoteProtocolError(
                "release-missing",
                "this site has no adapter of the job that the request builds on",
                file=self._path,
                remedy="none is needed: the operator's next attempt brings the whole adapter",
            ) from None
        except (OSError, KeyError, ValueError) as error:
            raise self._damaged(error) from error
        found = adapter_digest(plan.digest(), adapter)
        if found != named:
            raise self._damaged(f"an adapter with the digest {found.hex()}", named.hex())
        return adapter

    def delete(self) -> None:
        """Deletes the file, if there is one.

        Raises:
            StorageError: it cannot be deleted.
        """
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                "the adapter of a release cannot be deleted", file=self._path, found=error
            ) from error

    def _named(self) -> bytes | None:
        """The digest of the adapter that the file says it has."""
        try:
            with TensorFile(self._path) as file:
                return bytes.fromhex(file.metadata[_ADAPTER])
        except (OSError, KeyError, ValueError):
            return None

    def _damaged(self, found: object, accepted: str | None = None) -> RemoteProtocolError:
        """The error for a file that is not what was stored; the file is deleted."""
        self.delete()
        return RemoteProtocolError(
            "release-missing",
            "the adapter that this site kept is not the one that it verified, and was deleted",
            file=self._path,
            found=found,
            accepted=accepted,
            remedy="the operator's next attempt brings the whole adapter. Look after the disk:"
            " nothing but this site's trainer writes this file",
        )
