"""The relays that the operator admitted: sites.json, which `umbel-server sites` writes.

This list decides who may connect; the roster decides whose signatures count. A revoked site may do
neither.
"""

from pathlib import Path

import msgspec

from umbel_common.canonical import Name
from umbel_common.errors import IdentityError, StorageError
from umbel_common.single_keys import decode_document
from umbel_host.files.durable import replace
from umbel_host.files.text_file import find_text


class SiteEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One site's relay."""

    name: Name
    relay_key: str
    """The relay's public key, PEM."""
    certificate: str
    """The last certificate that was issued to it, PEM."""
    revoked: bool = False
    """Whether the site is revoked: its relay may not connect."""


class _Sites(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sites: tuple[SiteEntry, ...] = ()


def load_sites(path: Path) -> dict[str, SiteEntry]:
    """Reads name -> site; empty before the first site was added.

    Raises:
        IdentityError: the file is unreadable or malformed, or names a site or a key twice.
    """
    text = find_text(path)
    if text is None:
        return {}
    try:
        entries = decode_document(text, _Sites).sites
    except msgspec.MsgspecError as error:
        raise IdentityError("a list of sites is malformed", file=path, found=error) from None
    sites = {entry.name: entry for entry in entries}
    if len(sites) < len(entries) or len({entry.relay_key for entry in entries}) < len(entries):
        raise IdentityError("a list of sites names a site or a key twice", file=path)
    return sites


def save_sites(path: Path, sites: dict[str, SiteEntry]) -> None:
    """Writes the list, all of it or nothing.

    Raises:
        StorageError: it cannot be written; the former list stays.
    """
    entries = tuple(sites[name] for name in sorted(sites))
    text = msgspec.json.format(msgspec.json.encode(_Sites(entries)), indent=2)
    try:
        replace(path, text + b"\n")
    except OSError as error:
        raise StorageError(
            "the list of sites cannot be written", file=path, found=error.strerror
        ) from None
