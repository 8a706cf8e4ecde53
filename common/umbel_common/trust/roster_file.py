"""Rosters and statements about keys as JSON files that people read, compare, keep and send.

Every key and signature is hexadecimal. Reading checks the form only; `pinning` says whether a
signature holds, and what it is worth to a site.
"""

from typing import TypeVar

import msgspec

from umbel_common.canonical import Name, V, Value
from umbel_common.errors import IdentityError
from umbel_common.single_keys import decode_document
from umbel_common.trust.identity import (
    SIGNATURE_BYTES,
    Member,
    PublicKey,
    Roster,
    Roster2,
    public_size,
)
from umbel_common.trust.key_statements import SignedRevocation, SignedRotation
from umbel_common.trust.roster import RosterDocument

KEY_BYTES = 32


class _Entry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    pass


EntryT = TypeVar("EntryT", bound=_Entry)


class _MemberEntry(_Entry):
    name: Name
    public_key: str
    weight: int = 1
    public_size: int | None = None


class _ApproverEntry(_Entry):
    name: Name
    public_key: str


class _RotationEntry(_Entry):
    federation: Name
    party: Name
    old_key: str
    new_key: str
    signature_by_old_key: str
    signature_by_new_key: str


class _RevocationEntry(_Entry):
    federation: Name
    key: str
    signer: str
    signature: str


class _RosterEntry(_Entry):
    federation: Name
    operator: str
    members: list[_MemberEntry]
    rotations: list[_RotationEntry] = []
    revocations: list[_RevocationEntry] = []
    revoked_here: list[str] = []
    departed: list[_MemberEntry] = []
    approvers: list[_ApproverEntry] = []
    approvals: int = 0


class _Known(Value, frozen=True):
    """What a document has beside its roster, in the same order."""

    rotations: tuple[SignedRotation, ...]
    revocations: tuple[SignedRevocation, ...]
    revoked_here: tuple[PublicKey, ...]
    departed: tuple[Member, ...]


def document_to_json(document: RosterDocument) -> str:
    """A document as indented JSON with a newline at its end, without fields that are empty."""
    roster = document.roster
    second = roster if isinstance(roster, Roster2) else None
    return _to_json(
        _RosterEntry(
            federation=roster.federation,
            operator=roster.operator.hex(),
            members=[_member_entry(member) for member in roster.members],
            rotations=[_rotation_entry(signed) for signed in document.rotations],
            revocations=[_revocation_entry(signed) for signed in document.revocations],
            revoked_here=[key.hex() for key in document.revoked_here],
            departed=[_member_entry(member) for member in document.departed],
            approvers=[
                _ApproverEntry(name=approver.name, public_key=approver.public_key.hex())
                for approver in (second.approvers if second else ())
            ],
            approvals=second.approvals if second else 0,
        )
    )


def document_from_json(text: str, file: object) -> RosterDocument:
    """Reads what `document_to_json` wrote, or people wrote likewise, with members in any order.

    Args:
        file: where the text came from, for errors.

    Raises:
        IdentityError: the text is not JSON; a field is unknown, missing or wrong; a key or a
            signature is malformed; two parties have one name or one key; or a statement belongs to
            another federation.
    """
    entry = _from_json(text, _RosterEntry, file, "a roster file")
    roster = _roster(entry, file)
    parts: dict[str, object] = {
        "rotations": [_rotation_parts(rotation, file) for rotation in entry.rotations],
        "revocations": [_revocation_parts(revocation, file) for revocation in entry.revocations],
        "revoked_here": [_key(key, "revoked_here", file) for key in entry.revoked_here],
        "departed": _member_parts(entry.departed, file),
    }
    known = _convert(parts, _Known, file, "a roster file")
    try:
        return RosterDocument(roster, *msgspec.structs.astuple(known))
    except ValueError as error:
        raise _malformed(error, file, "a roster file") from None


def _roster(entry: _RosterEntry, file: object) -> Roster:
    """The roster of a file: of version 2 only if it says what version 1 cannot, so that a roster
    has one digest."""
    parts: dict[str, object] = {
        "federation": entry.federation,
        "operator": _key(entry.operator, "operator", file),
        "members": _member_parts(entry.members, file),
    }
    sized = any(member.public_size is not None for member in entry.members)
    if not (sized or entry.approvers or entry.approvals):
        return _convert(parts, Roster, file, "a roster file")
    parts["approvers"] = [
        {"name": one.name, "public_key": _key(one.public_key, one.name, file)}
        for one in sorted(entry.approvers, key=lambda one: one.name)
    ]
    parts["approvals"] = entry.approvals
    return _convert(parts, Roster2, file, "a roster file")


def _member_entry(member: Member) -> _MemberEntry:
    return _MemberEntry(
        name=member.name,
        public_key=member.public_key.hex(),
        weight=member.weight,
        public_size=public_size(member),
    )


def _member_parts(entries: list[_MemberEntry], file: object) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        part: dict[str, object] = {
            "name": entry.name,
            "public_key": _key(entry.public_key, entry.name, file),
            "weight": entry.weight,
        }
        if entry.public_size is not None:
            part["public_size"] = entry.public_size
        parts.append(part)
    return parts


def roster_to_json(roster: Roster) -> str:
    """A roster without any statements, as `document_to_json` writes it."""
    return document_to_json(RosterDocument(roster))


def roster_from_json(text: str, file: object) -> Roster:
    """The roster of a document, as `document_from_json` reads it."""
    return document_from_json(text, file).roster


def rotation_to_json(signed: SignedRotation) -> str:
    """A rotation as a file of its own, in the form that it has in a roster file."""
    return _to_json(_rotation_entry(signed))


def rotation_from_json(text: str, file: object) -> SignedRotation:
    """Reads what `rotation_to_json` wrote.

    Raises:
        IdentityError: the text is not JSON; a field is unknown, missing or wrong; or a key or a
            signature is malformed.
    """
    entry = _from_json(text, _RotationEntry, file, "a rotation file")
    return _convert(_rotation_parts(entry, file), SignedRotation, file, "a rotation file")


def revocation_to_json(signed: SignedRevocation) -> str:
    """A revocation as a file of its own, in the form that it has in a roster file."""
    return _to_json(_revocation_entry(signed))


def revocation_from_json(text: str, file: object) -> SignedRevocation:
    """Reads what `revocation_to_json` wrote.

    Raises:
        IdentityError: the text is not JSON; a field is unknown, missing or wrong; or a key or a
            signature is malformed.
    """
    entry = _from_json(text, _RevocationEntry, file, "a revocation file")
    return _convert(_revocation_parts(entry, file), SignedRevocation, file, "a revocation file")


def _rotation_entry(signed: SignedRotation) -> _RotationEntry:
    return _RotationEntry(
        federation=signed.rotation.federation,
        party=signed.rotation.party,
        old_key=signed.rotation.old_key.hex(),
        new_key=signed.rotation.new_key.hex(),
        signature_by_old_key=signed.by_old.hex(),
        signature_by_new_key=signed.by_new.hex(),
    )


def _rotation_parts(entry: _RotationEntry, file: object) -> dict[str, object]:
    return {
        "rotation": {
            "federation": entry.federation,
            "party": entry.party,
            "old_key": _key(entry.old_key, "old_key", file),
            "new_key": _key(entry.new_key, "new_key", file),
        },
        "by_old": _signature(entry.signature_by_old_key, "signature_by_old_key", file),
        "by_new": _signature(entry.signature_by_new_key, "signature_by_new_key", file),
    }


def _revocation_entry(signed: SignedRevocation) -> _RevocationEntry:
    return _RevocationEntry(
        federation=signed.revocation.federation,
        key=signed.revocation.key.hex(),
        signer=signed.signer.hex(),
        signature=signed.signature.hex(),
    )


def _revocation_parts(entry: _RevocationEntry, file: object) -> dict[str, object]:
    return {
        "revocation": {"federation": entry.federation, "key": _key(entry.key, "key", file)},
        "signer": _key(entry.signer, "signer", file),
        "signature": _signature(entry.signature, "signature", file),
    }


def _to_json(entry: _Entry) -> str:
    return msgspec.json.format(msgspec.json.encode(entry), indent=2).decode("utf-8") + "\n"


def _from_json(text: str, kind: type[EntryT], file: object, what: str) -> EntryT:
    try:
        return decode_document(text, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _malformed(error, file, what) from None


def _convert(parts: dict[str, object], kind: type[V], file: object, what: str) -> V:
    try:
        return msgspec.convert(parts, kind)
    except msgspec.MsgspecError as error:
        raise _malformed(error, file, what) from None


def _malformed(error: Exception, file: object, what: str) -> IdentityError:
    return IdentityError(
        f"{what} is malformed",
        file=file,
        found=str(error).replace("`$.", "`"),
        remedy="compare it with the one that the other parties have",
    )


def _key(text: str, owner: str, file: object) -> bytes:
    return _hexadecimal(text, KEY_BYTES, "public key", owner, file)


def _signature(text: str, field: str, file: object) -> bytes:
    return _hexadecimal(text, SIGNATURE_BYTES, "signature", field, file)


def _hexadecimal(text: str, size: int, what: str, field: str, file: object) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != size:
        raise IdentityError(
            f"a {what} is malformed",
            file=file,
            field=field,
            found=f"{len(text)} characters",
            accepted=f"{2 * size} hexadecimal digits",
        )
    return value
