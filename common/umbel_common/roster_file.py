"""The roster as a JSON file that people read, compare and keep under their own control."""

import msgspec

from umbel_common.canonical import Name
from umbel_common.errors import IdentityError
from umbel_common.identity import Roster


class _MemberEntry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: Name
    public_key: str
    weight: int = 1


class _RosterEntry(msgspec.Struct, forbid_unknown_fields=True):
    federation: Name
    operator: str
    members: list[_MemberEntry]


def roster_to_json(roster: Roster) -> str:
    """The roster as indented JSON, keys in hexadecimal, with a newline at its end."""
    entry = _RosterEntry(
        federation=roster.federation,
        operator=roster.operator.hex(),
        members=[
            _MemberEntry(name=member.name, public_key=member.public_key.hex(), weight=member.weight)
            for member in roster.members
        ],
    )
    return msgspec.json.format(msgspec.json.encode(entry), indent=2).decode("utf-8") + "\n"


def roster_from_json(text: str, file: object) -> Roster:
    """Reads what `roster_to_json` wrote, or what people wrote like it, in any order of members.

    Args:
        file: where the text came from, for errors.

    Raises:
        IdentityError: no JSON, an unknown, missing or wrong field, a key that is none, or two
            parties with one name or one key.
    """
    try:
        entry = msgspec.json.decode(text, type=_RosterEntry)
        members = [
            {
                "name": member.name,
                "public_key": _key(member.public_key, member.name, file),
                "weight": member.weight,
            }
            for member in sorted(entry.members, key=lambda member: member.name)
        ]
        parts = {
            "federation": entry.federation,
            "operator": _key(entry.operator, "operator", file),
            "members": members,
        }
        return msgspec.convert(parts, Roster)
    except msgspec.MsgspecError as error:
        raise IdentityError(
            "a roster file is malformed",
            file=file,
            found=str(error).replace("`$.", "`"),
            remedy="compare it with the roster that the other parties pinned",
        ) from None


def _key(text: str, owner: str, file: object) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise IdentityError(
            "a public key in the roster is malformed",
            file=file,
            field=owner,
            found=f"{len(text)} characters",
            accepted="64 hexadecimal digits",
        )
    return key
