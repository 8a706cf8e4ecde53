"""Signed statements of one attempt, opened under the identities that the roster pins."""

from collections.abc import Iterable

from umbel_common.canonical import V, decode
from umbel_common.errors import RemoteProtocolError, SignatureError
from umbel_common.identity import Roster, Signed, open_signed
from umbel_common.secagg.messages import KeyAdvert, Survivors, SurvivorSignature


def open_advert(
    signed: Signed, context: bytes, cohort: tuple[str, ...], roster: Roster
) -> KeyAdvert:
    """The advert of the site of `cohort` that signed it, over this attempt.

    Raises:
        RemoteProtocolError: `malformed-message`, `not-in-cohort`, `pinned-signature` or
            `other-context`.
    """
    # Only the claimed name is taken from the statement before its signature is verified.
    claimed = decode(signed.statement, KeyAdvert).site
    if claimed not in cohort:
        raise RemoteProtocolError(
            "not-in-cohort", "keys are of a site outside the cohort", field="site", found=claimed
        )
    advert = _open(signed, KeyAdvert, claimed, roster)
    _check_context(advert.context, context, claimed)
    return advert


def open_survivors(
    signature: SurvivorSignature, context: bytes, survivors: tuple[str, ...], roster: Roster
) -> None:
    """Checks that a survivor signed the set `survivors` for this attempt.

    Raises:
        RemoteProtocolError: `not-a-survivor`, `pinned-signature`, `malformed-message`,
            `other-context` or `other-survivors`.
    """
    if signature.site not in survivors:
        raise RemoteProtocolError(
            "not-a-survivor",
            "a survivor set is signed by a site outside it",
            field="site",
            found=signature.site,
        )
    statement = _open(signature.signed, Survivors, signature.site, roster)
    _check_context(statement.context, context, signature.site)
    if statement.sites != survivors:
        raise RemoteProtocolError(
            "other-survivors",
            "a site signed another survivor set",
            field=signature.site,
            found=", ".join(statement.sites),
            accepted=", ".join(survivors),
        )


def check_distinct_keys(adverts: Iterable[KeyAdvert]) -> None:
    """Checks that no public key occurs twice, within a site or between sites.

    Raises:
        RemoteProtocolError: `duplicate-key`.
    """
    seen: dict[bytes, str] = {}
    for advert in adverts:
        for key in (advert.cipher_key, advert.mask_key):
            if key in seen:
                raise RemoteProtocolError(
                    "duplicate-key",
                    "a public key is advertised twice",
                    found=f"by {seen[key]} and by {advert.site}",
                )
            seen[key] = advert.site


def _open(signed: Signed, kind: type[V], site: str, roster: Roster) -> V:
    try:
        return open_signed(signed, kind, roster.member(site).public_key)
    except SignatureError as error:
        raise RemoteProtocolError(
            "pinned-signature", error.message, field=site, accepted=error.accepted
        ) from None


def _check_context(found: bytes, accepted: bytes, site: str) -> None:
    if found != accepted:
        raise RemoteProtocolError(
            "other-context", "a signed statement belongs to another attempt", field=site
        )
