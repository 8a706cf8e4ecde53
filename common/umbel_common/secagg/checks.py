"""Signed statements of one attempt, opened under the identities that the roster pins.

The law: a key is taken from the roster, never from a message, and of an unverified statement one
thing is read, the name under which its key is looked up. Steps of `participant` (S) and
`coordinator` (C) that these checks are:

- `open_advert`: S2.1 and C1.1
- `check_distinct_keys`: S2.2 and C1.2
- `check_recipients`: C2.2 and, of `preparing`, R2.1
- `open_prepared`: P2.1 of `preparation` and R1.1 of `preparing`
- `check_confirmation`: S5.1 and C4.2
"""

from collections.abc import Iterable
from typing import TypeVar

from umbel_common.canonical import decode
from umbel_common.errors import require
from umbel_common.secagg.messages import (
    EncryptedShare,
    KeyAdvert,
    PreparedKeys,
    Survivors,
    SurvivorSignature,
)
from umbel_common.trust.identity import Roster, Signed, open_signed

Keys = TypeVar("Keys", KeyAdvert, PreparedKeys)


def open_advert(
    signed: Signed, context: bytes, cohort: tuple[str, ...], roster: Roster
) -> KeyAdvert:
    """The advert in a signed statement, if a site of `cohort` signed it for this attempt.

    Raises:
        RemoteProtocolError: `malformed-message`, `not-in-cohort`, `not-in-roster`,
            `pinned-signature` or `other-context`.
    """
    return _open_keys(signed, KeyAdvert, context, cohort, roster)


def open_prepared(
    signed: Signed, context: bytes, cohort: tuple[str, ...], roster: Roster
) -> PreparedKeys:
    """The prepared keys in a signed statement, if a site of `cohort` signed them.

    Args:
        context: of the preparation, 32 bytes.

    Raises:
        RemoteProtocolError: as `open_advert`.
    """
    return _open_keys(signed, PreparedKeys, context, cohort, roster)


def _open_keys(
    signed: Signed, kind: type[Keys], context: bytes, cohort: tuple[str, ...], roster: Roster
) -> Keys:
    # Only the claimed name is taken from the statement before its signature is verified.
    claimed = decode(signed.statement, kind).site
    require(
        claimed in cohort,
        "not-in-cohort",
        "keys were advertised by a site outside the cohort",
        field="site",
        found=claimed,
    )
    member = roster.find(claimed)
    require(
        member is not None,
        "not-in-roster",
        "keys were advertised by a site outside the roster",
        field=claimed,
    )
    assert member is not None  # required above
    keys = open_signed(signed, kind, member.public_key, claimed)
    _check_context(keys.context, context, claimed)
    return keys


def check_confirmation(
    signature: SurvivorSignature, context: bytes, survivors: tuple[str, ...], roster: Roster
) -> None:
    """Refuses what is not a signature by a survivor over the set `survivors` of this attempt.

    Raises:
        RemoteProtocolError: `not-a-survivor`, `pinned-signature`, `malformed-message`,
            `other-context` or `other-survivors`.
    """
    site = signature.site
    require(
        site in survivors,
        "not-a-survivor",
        "a survivor set is signed by a site that is not in it",
        field="site",
        found=site,
    )
    statement = open_signed(signature.signed, Survivors, roster.member(site).public_key, site)
    _check_context(statement.context, context, site)
    require(
        statement.sites == survivors,
        "other-survivors",
        "a site signed another survivor set",
        field=site,
        found=statement.sites,
        accepted=survivors,
    )


def check_distinct_keys(adverts: Iterable[KeyAdvert | PreparedKeys]) -> None:
    """Refuses a public key that occurs twice, within a site or between sites.

    Raises:
        RemoteProtocolError: `duplicate-key`.
    """
    seen: dict[int, str] = {}
    for advert in adverts:
        for key in map(_x25519_point, (advert.cipher_key, advert.mask_key)):
            require(
                key not in seen,
                "duplicate-key",
                "a public key is advertised twice",
                found=f"by {seen.get(key)} and by {advert.site}",
            )
            seen[key] = advert.site


def check_recipients(shares: tuple[EncryptedShare, ...], site: str, sites: tuple[str, ...]) -> None:
    """Refuses what is not one share of `site` for each other site of `sites`, which is sorted.

    Raises:
        RemoteProtocolError: `wrong-sender` or `wrong-recipient`.
    """
    require(
        all(share.sender == site for share in shares),
        "wrong-sender",
        "a site sent another's shares",
        field=site,
    )
    require(
        sorted(share.recipient for share in shares) == [peer for peer in sites if peer != site],
        "wrong-recipient",
        "a site must send one share to each of its peers",
        field=site,
    )


def _x25519_point(key: bytes) -> int:
    """The point that X25519 reads from 32 bytes. It ignores the top bit and reduces modulo
    2^255 - 19 (RFC 7748, section 5), so several byte strings are one key."""
    return int.from_bytes(key, "little") % 2**255 % (2**255 - 19)


def _check_context(found: bytes, accepted: bytes, site: str) -> None:
    require(
        found == accepted,
        "other-context",
        "a signed statement belongs to another attempt",
        field=site,
    )
