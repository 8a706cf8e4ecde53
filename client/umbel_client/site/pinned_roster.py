"""The roster that this site pinned: one file, which changes by this site's own decision only.

This module is part of the core of the privacy guarantee. Never change the file on a server's word,
and never believe a roster that was not pinned.

A new version replaces the file at once, on disk when the call returns; the roster before it stays
beside it under its digest.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from umbel_client.site.config import ClientConfig
from umbel_common.canonical import digest
from umbel_common.errors import IdentityError, StorageError
from umbel_common.trust.identity import Identity, Roster, fingerprint
from umbel_common.trust.key_statements import SignedRevocation
from umbel_common.trust.pinning import check_revocation
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_from_json, document_to_json
from umbel_host.files.durable import replace
from umbel_host.files.text_file import find_text


@dataclass(frozen=True)
class Pinned:
    """Whom this site believes."""

    roster: Roster
    revoked: frozenset[bytes]
    """Public keys, 32 bytes each, that must not speak even where the roster lists them."""
    former: tuple[Roster, ...] = ()
    """Rosters that this site pinned before: a job that began under one continues under it."""

    def mark(self) -> str:
        """A digest that differs where a trainer would have to start again to believe the same."""
        rosters = sorted(roster.digest() for roster in self.former)
        parts = (self.roster.digest(), *rosters, *sorted(self.revoked))
        return digest("pinned", b"".join(parts)).hex()


def load_pinned(config: ClientConfig) -> Pinned:
    """The roster that a site pinned, and the keys that it holds for revoked.

    Raises:
        IdentityError: no roster is pinned, or its file is unreadable or malformed.
    """
    path = Path(config.roster)
    document = require_document(path)
    # Only files that are named by a digest were pinned: a proposal may lie beside them.
    kept = path.parent.glob(_kept(path, "[0-9a-f]" * 64))
    former = (require_document(file).roster for file in sorted(kept))
    return Pinned(document.roster, document.revoked(), tuple(former))


def require_document(path: Path) -> RosterDocument:
    """The pinned document.

    Raises:
        IdentityError: no roster is pinned, or its file is unreadable or malformed.
    """
    document = find_document(path)
    if document is None:
        raise IdentityError(
            "this site has pinned no roster yet",
            file=path,
            remedy="compare the operator's roster file with the other parties, then run:"
            " umbel-client roster approve FILE",
        )
    return document


def find_document(path: Path) -> RosterDocument | None:
    """The pinned document; None before the first approval.

    Raises:
        IdentityError: its file is unreadable or malformed.
    """
    text = find_text(path)
    return None if text is None else document_from_json(text, path)


def pin(path: Path, former: RosterDocument | None, document: RosterDocument) -> Path | None:
    """Pins `document` in the place of `former`; returns where the former roster is kept.

    Returns None before the first approval, and if the roster is the same and only more is known
    about keys: the new file has all of that.

    Raises:
        IdentityError: the file no longer holds `former`, so what would be replaced was not
            compared. Nothing changed.
        StorageError: it could not be written; the former file stays.
    """
    with _locked(path):
        if find_document(path) != former:
            raise IdentityError(
                "the pinned roster changed while it was being compared with another",
                file=path,
                remedy="run the command again",
            )
        kept = None
        if former is not None and former.roster != document.roster:
            kept = path.with_name(_kept(path, former.roster.digest().hex()))
            replace(kept, document_to_json(former).encode())
        replace(path, document_to_json(document).encode())
    return kept


def revoke_signed(path: Path, signed: SignedRevocation, file: object) -> None:
    """Adds a revocation by the key itself or by the operator to what is pinned.

    Args:
        file: where the revocation came from, for errors.

    Raises:
        SignatureError: it is signed by neither, or does not verify.
        IdentityError: it is of another federation, or no roster is pinned.
        StorageError: it could not be written.
    """
    former = require_document(path)
    check_revocation(former, signed, file)
    if signed not in former.revocations:
        revocations = (*former.revocations, signed)
        pin(path, former, msgspec.structs.replace(former, revocations=revocations))


def revoke_here(path: Path, key: bytes) -> None:
    """Revokes a key by this site's own decision, which nobody needs to sign.

    Raises:
        IdentityError: no roster is pinned.
        StorageError: it could not be written.
    """
    former = require_document(path)
    if key not in former.revoked():
        revoked = (*former.revoked_here, key)
        pin(path, former, msgspec.structs.replace(former, revoked_here=revoked))


def _kept(path: Path, digest: str) -> str:
    """Name of the file of a roster that was pinned before."""
    return f"{path.stem}-{digest}{path.suffix}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time change the file; the lock is on its folder, and leaves no file."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(
            "the pinned roster cannot be written",
            file=path,
            found=error.strerror,
            remedy="see that the disk has space and the folder is writable",
        ) from error


def check_own_key(pinned: Pinned, site: str, identity: Identity) -> None:
    """Refuses to start a site that the others would not believe.

    Raises:
        IdentityError: the site is not in the roster, or is there with another key, or its key is
            revoked.
    """
    key = pinned.roster.member(site).public_key
    if key != identity.public_key:
        raise IdentityError(
            "the pinned roster has another key for this site than its key file",
            field=site,
            found=fingerprint(identity.public_key),
            accepted=fingerprint(key),
            remedy="approve a roster with this site's key, or use the key file that it names",
        )
    if key in pinned.revoked:
        raise IdentityError(
            "this site's own key is revoked",
            field=site,
            found=fingerprint(key),
            remedy="make a new identity, and have the others approve a roster with it",
        )
