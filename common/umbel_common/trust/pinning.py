"""When a site may pin another roster: pure rules, without files and without a person.

The law: a key that was revoked or rotated away never comes back, no matter who lists or signs it.
So what was pinned once stays known, and no rule here forgets it. A key is believed because an old
key led to it or a person compared it, never because a message has it. No file, no clock, no
network, and no question to a person: the caller asks.

A site pins a `RosterDocument`. A proposed one passes three steps, each of which may refuse:

1. `merge`: verify what the holders of keys said, and join it to what is pinned already
2. `roster.compare`: find what would change, as a value to show to a person
3. `check_change`: see that each change follows from the old keys or from what the person compared
"""

from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import msgspec

from umbel_common.errors import IdentityError, SignatureError
from umbel_common.trust.identity import Member, Roster, fingerprint
from umbel_common.trust.key_statements import OPERATOR, SignedRevocation, SignedRotation
from umbel_common.trust.roster import RosterChange, RosterDocument, with_members, without_size


def merge(pinned: RosterDocument | None, proposed: RosterDocument, file: object) -> RosterDocument:
    """The proposed roster with every statement of both documents: what would be pinned.

    The proposed document's `revoked_here` is left out, since it is its sender's own decision.

    Args:
        pinned: None before the first approval.
        file: where the proposed document came from, for errors.

    Raises:
        SignatureError: a statement of the proposed document is not signed as it must be.
        IdentityError: the federation is another, or two rotations lead away from one key.
    """
    base = RosterDocument(proposed.roster) if pinned is None else pinned
    if base.roster.federation != proposed.roster.federation:
        raise IdentityError(
            "a roster belongs to another federation than the pinned one",
            file=file,
            field="federation",
            found=proposed.roster.federation,
            accepted=base.roster.federation,
            remedy="a site that joins a second federation keeps a client.toml and a roster for it",
        )
    _check_statements(base, proposed, file)
    revocations = _each_once((*base.revocations, *proposed.revocations))
    revoked = {entry.revocation.key for entry in revocations} | set(base.revoked_here)
    rotations = [
        signed
        for signed in _each_once((*base.rotations, *proposed.rotations))
        # A thief of a key can sign with it, so nothing that a revoked key says counts.
        if signed.rotation.old_key not in revoked
    ]
    _check_forks(rotations, file)
    return RosterDocument(
        roster=proposed.roster,
        rotations=tuple(rotations),
        revocations=tuple(revocations),
        revoked_here=base.revoked_here,
        departed=_departed(base, proposed.roster),
    )


def check_change(
    merged: RosterDocument,
    change: RosterChange,
    *,
    site: str,
    own_key: bytes,
    accepted_new_keys: Collection[str] = (),
    file: object,
) -> None:
    """Refuses a roster that this site may not pin.

    Args:
        change: from the pinned document to `merged`.
        own_key: public key of this site's own key file.
        accepted_new_keys: parties whose new key a person compared out of band, because no rotation
            vouches for it.
        file: where the proposed document came from, for errors.

    Raises:
        IdentityError: this site is missing or has another key; a key in the roster was revoked or
            rotated away; a party's key changed without a rotation, and nobody accepted it; or
            `accepted_new_keys` names a party without a new key.
    """
    _check_own_key(merged.roster, site, own_key, file)
    _check_dead_keys(merged, file)
    # This site's own key file is a better witness to its own key than any rotation.
    unproven = {key.party: key for key in change.keys if not key.rotated and key.party != site}
    for party, key in unproven.items():
        if party not in accepted_new_keys:
            raise IdentityError(
                f"the key of {party} changed, and no rotation by its old key leads to the new one",
                file=file,
                field=party,
                found=fingerprint(key.new_key),
                accepted=f"{fingerprint(key.old_key)}, or what that key rotates to",
                remedy=f"ask {party} for its rotation; if its old key is lost, compare the new"
                f" fingerprint by telephone and add --accept-new-key {party}",
            )
    for party in accepted_new_keys:
        if party not in unproven:
            raise IdentityError(
                f"there is no new key of {party} to accept",
                file=file,
                field="--accept-new-key",
                found=party,
                accepted=", ".join(unproven) or "nobody: each key is proven or unchanged",
                remedy="leave it out; it is for a party whose key changed without a rotation",
            )


def check_revocation(document: RosterDocument, signed: SignedRevocation, file: object) -> None:
    """Refuses a revocation that does not count for a site that pinned `document`.

    Raises:
        SignatureError: neither the key itself nor the operator signed it.
        IdentityError: it belongs to another federation.
    """
    if signed.revocation.federation != document.roster.federation:
        raise IdentityError(
            "a revocation belongs to another federation than the pinned roster",
            file=file,
            field="federation",
            found=signed.revocation.federation,
            accepted=document.roster.federation,
        )
    operators = _operators(document.rotations, document.roster.operator) - document.revoked()
    _check_revocation(signed, operators, document.roster.operator, file)


def propose(pinned: RosterDocument, signed: SignedRotation, file: object) -> RosterDocument:
    """The pinned roster with the new key of a rotation, to be sent around, compared and approved.

    Raises:
        SignatureError: one of the two keys did not sign the rotation.
        IdentityError: it belongs to another federation, or does not start from the party's key.
    """
    rotation = signed.rotation
    _check_rotation(signed, file)
    known = pinned.parties().get(rotation.party)
    if (
        rotation.federation != pinned.roster.federation
        or known != rotation.old_key
        or known in pinned.revoked()
    ):
        raise IdentityError(
            "a rotation does not start from a good key of the pinned roster",
            file=file,
            field=rotation.party,
            found=f"{fingerprint(rotation.old_key)} of federation {rotation.federation}",
            accepted=f"{'nobody' if known is None else fingerprint(known)}"
            f" of federation {pinned.roster.federation}, unless that key is revoked",
            remedy="earlier rotations of this party come first; nothing leads away from a revoked"
            " key",
        )
    return RosterDocument(
        roster=_with_key(pinned.roster, rotation.party, rotation.new_key, file),
        rotations=(*pinned.rotations, signed),
        revocations=pinned.revocations,
    )


def _with_key(roster: Roster, party: str, key: bytes, file: object) -> Roster:
    members = tuple(
        msgspec.structs.replace(member, public_key=key) if member.name == party else member
        for member in roster.members
    )
    operator = key if party == OPERATOR else roster.operator
    try:
        return with_members(msgspec.structs.replace(roster, operator=operator), members)
    except ValueError as error:
        raise IdentityError(
            "a rotation leads to a key that another party has",
            file=file,
            field=party,
            found=error,
            remedy=f"ask {party} for a rotation to a key of its own",
        ) from None


def _departed(base: RosterDocument, roster: Roster) -> tuple[Member, ...]:
    """Members of earlier rosters that are not in `roster`, as last known, sorted by name."""
    known = {member.name: member for member in (*base.departed, *base.roster.members)}
    present = {member.name for member in roster.members}
    return tuple(without_size(known[name]) for name in sorted(known.keys() - present))


def _check_statements(base: RosterDocument, proposed: RosterDocument, file: object) -> None:
    """Checks what is new: the pinned statements were checked when they came, by the operator's key
    of that time."""
    for rotation in set(proposed.rotations) - set(base.rotations):
        _check_rotation(rotation, file)
    rotations = (*base.rotations, *proposed.rotations)
    # A key that is revoked for this site says nothing more, not even which others are revoked.
    operators = _operators(rotations, base.roster.operator, proposed.roster.operator)
    operators -= base.revoked()
    for revocation in set(proposed.revocations) - set(base.revocations):
        _check_revocation(revocation, operators, proposed.roster.operator, file)


def _operators(rotations: Sequence[SignedRotation], *keys: bytes) -> set[bytes]:
    """The operator's `keys` and its former ones, from which verified rotations lead away."""
    operators = set(keys)
    steps = [entry.rotation for entry in rotations if entry.rotation.party == OPERATOR]
    for _ in steps:
        operators |= {step.old_key for step in steps if step.new_key in operators}
    return operators


def _check_rotation(signed: SignedRotation, file: object) -> None:
    if not signed.verifies():
        raise SignatureError(
            "a rotation is not signed by the old and the new key",
            file=file,
            field=signed.rotation.party,
            accepted=f"signatures by {fingerprint(signed.rotation.old_key)}"
            f" and {fingerprint(signed.rotation.new_key)}",
            remedy=f"ask {signed.rotation.party} for the file that `umbel-client rotate` wrote",
        )


def _check_revocation(
    signed: SignedRevocation, operators: set[bytes], operator: bytes, file: object
) -> None:
    """Refuses a revocation that is not signed by a key whose word counts.

    Args:
        operators: keys of the operator whose word counts, former ones too.
        operator: its present key, which a former one, perhaps stolen, cannot revoke.
    """
    key = signed.revocation.key
    if signed.signer != key and (signed.signer not in operators or key == operator):
        raise SignatureError(
            "a revocation is signed neither by the revoked key nor by the operator",
            file=file,
            field=fingerprint(key),
            found=f"a signature by {fingerprint(signed.signer)}",
            remedy="ask the operator to sign it again; a site that believes it all the same takes"
            f" it out of the file and runs: umbel-client roster revoke --key {key.hex()}",
        )
    if not signed.verifies():
        raise SignatureError(
            "the signature of a revocation does not verify",
            file=file,
            field=fingerprint(key),
            accepted=f"a signature by {fingerprint(signed.signer)}",
            remedy="ask its signer for the file that `umbel-client revoke` wrote",
        )


def _check_forks(rotations: Iterable[SignedRotation], file: object) -> None:
    seen: dict[bytes, SignedRotation] = {}
    for signed in rotations:
        rotation = signed.rotation
        if rotation.old_key in seen:
            raise IdentityError(
                "one key was rotated twice: one of the two was signed by a thief",
                file=file,
                field=rotation.party,
                found=f"{fingerprint(rotation.old_key)} to {fingerprint(rotation.new_key)}",
                accepted=f"to {fingerprint(seen[rotation.old_key].rotation.new_key)} only",
                remedy=f"call {rotation.party}; then umbel-client roster revoke --key"
                f" {rotation.old_key.hex()}, after which neither rotation counts",
            )
        seen[rotation.old_key] = signed


def _check_own_key(roster: Roster, site: str, own_key: bytes, file: object) -> None:
    listed = {member.name: member.public_key for member in roster.members}
    if site not in listed:
        raise IdentityError(
            "this site is not in the roster",
            file=file,
            field="members",
            found=", ".join(listed),
            accepted=f"a roster with {site}",
            remedy="ask the operator to add this site, with the public key that keygen printed",
        )
    if listed[site] != own_key:
        raise IdentityError(
            "the roster gives this site a key that is not in its key file",
            file=file,
            field=site,
            found=fingerprint(listed[site]),
            accepted=fingerprint(own_key),
            remedy="if this site's key is new, check that `identity` in client.toml names its file;"
            " if not, somebody wants to speak in this site's name: call the operator",
        )


def _check_dead_keys(merged: RosterDocument, file: object) -> None:
    rotated_away = {signed.rotation.old_key for signed in merged.rotations}
    dead = {
        **dict.fromkeys(rotated_away, "rotated away"),
        **dict.fromkeys(merged.revoked(), "revoked"),
    }
    for party, key in merged.parties().items():
        if key in dead:
            raise IdentityError(
                f"the roster contains a key that was {dead[key]}",
                file=file,
                field=party,
                found=fingerprint(key),
                accepted="a key that is still good",
                remedy="it may be an old roster: ask the operator for the latest one",
            )


E = TypeVar("E", SignedRotation, SignedRevocation)


def _each_once(statements: Iterable[E]) -> list[E]:
    return list(dict.fromkeys(statements))
