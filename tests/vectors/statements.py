"""Vectors of signed statements: the one encoding of each, and refusals."""

from typing import Any

from vectors.cases import Case, accepted, identity, refused
from vectors.messagepack import Pairs, Raw, pack
from vectors.values import (
    ADVERT,
    HEADER,
    HEADER2,
    PREPARATION,
    RELEASE,
    RELEASE2,
    ROSTER,
    ROSTER2,
    STATEMENTS,
    SURVIVORS,
)

from umbel_common.canonical import Value, digest, encode
from umbel_common.trust.identity import label_of

MALFORMED = "malformed-message"


def statement_cases() -> list[Case]:
    """Every statement signed and opened, the digests of those that nobody signs, and refusals."""
    hashed = (
        ("the roster", ROSTER, ROSTER.digest()),
        ("the roster of version 2", ROSTER2, ROSTER2.digest()),
        ("the preparation", PREPARATION, PREPARATION.context()),
    )
    cases = [
        accepted(
            name,
            "digest-statement",
            {"label": label_of(type(statement)), "fields": statement},
            {"statement": encode(statement), "digest": found},
        )
        for name, statement, found in hashed
    ]
    for name, (signer, statement) in STATEMENTS.items():
        data, label = encode(statement), label_of(type(statement))
        signature = identity(signer).sign(label, data)
        inputs = {"label": label, "seed": identity(signer).seed(), "fields": statement}
        output = {"statement": data, "digest": digest(label, data), "signature": signature}
        cases.append(accepted(f"{name}: sign", "sign-statement", inputs, output))
        opening = _opening(label, data, signer)
        cases.append(accepted(f"{name}: open", "open-statement", opening, statement))
    return cases + _malformed() + _wrongly_signed()


def _opening(label: str, data: bytes, signer: str, signed_as: str | None = None) -> dict[str, Any]:
    """The inputs of a verifier: the expected label, the pinned key, the bytes, the signature."""
    return {
        "label": label,
        "public_key": identity(signer).public_key,
        "statement": data,
        "signature": identity(signer).sign(signed_as or label, data),
    }


def _fields(statement: Value) -> dict[str, Any]:
    """The fields, with byte strings as bytes."""
    return {name: getattr(statement, name) for name in statement.__struct_fields__}


def _malformed() -> list[Case]:
    """Statements that are validly signed but refused for the bytes that were signed."""
    advert, header, survivors = _fields(ADVERT), _fields(HEADER), _fields(SURVIVORS)
    entries = tuple(advert.items())
    good = pack(advert)
    assert good == encode(ADVERT)
    wrong: dict[str, tuple[str, bytes]] = {
        "nothing": ("KeyAdvert", b""),
        "truncated": ("KeyAdvert", good[:-1]),
        "trailing bytes": ("KeyAdvert", good + b"\xc0"),
        "two statements": ("KeyAdvert", good + good),
        "an unknown field": ("KeyAdvert", pack({**advert, "more": 1})),
        "a missing field": ("KeyAdvert", pack(Pairs(entries[:-1]))),
        "a missing version": ("RoundHeader", pack(Pairs(tuple(header.items())[:-1]))),
        "another version": ("RoundHeader", pack({**header, "version": 2})),
        "version 2 that names version 1": (
            "RoundHeader2",
            pack({**_fields(HEADER2), "version": 1}),
        ),
        "version 2 without its further field": ("RoundHeader2", encode(HEADER)),
        "another order of the map": ("KeyAdvert", pack(Pairs((*entries[1:], entries[0])))),
        "a duplicate key, same value": ("KeyAdvert", pack(Pairs((*entries, entries[-1])))),
        "a duplicate key, other value": (
            "KeyAdvert",
            pack(Pairs(((entries[0][0], bytes(32)), *entries))),
        ),
        "an integer wider than it needs": (
            "RoundHeader",
            pack({**header, "round": Raw(b"\xcd\x00\x01")}),
        ),
        "a signed integer format": ("RoundHeader", pack({**header, "round": Raw(b"\xd0\x01")})),
        "an integer as a float": ("RoundHeader", pack({**header, "round": 1.0})),
        "an integer as a text": ("RoundHeader", pack({**header, "round": "1"})),
        "an integer past its range": ("RoundHeader", pack({**header, "round": 10_001})),
        "a byte string as a text": ("KeyAdvert", pack({**advert, "cipher_key": "a" * 32})),
        "a text as a byte string": ("KeyAdvert", pack({**advert, "site": b"site-a"})),
        "a text with a wider head": (
            "KeyAdvert",
            pack({**advert, "site": Raw(b"\xd9\x06site-a")}),
        ),
        "a map with a wider head": ("Survivors", b"\xde\x00\x02" + pack(survivors)[1:]),
        "an array instead of a map": ("KeyAdvert", pack(list(advert.values()))),
        "nil": ("KeyAdvert", pack(None)),
        "a key of 31 bytes": ("KeyAdvert", pack({**advert, "mask_key": bytes(31)})),
        "a name with a capital": ("KeyAdvert", pack({**advert, "site": "Site-a"})),
        "a name with a newline": ("KeyAdvert", pack({**advert, "site": "site-a\n"})),
        "a name that ends in a hyphen": ("KeyAdvert", pack({**advert, "site": "site-"})),
        "an empty name": ("KeyAdvert", pack({**advert, "site": ""})),
        "a name of 65 letters": ("KeyAdvert", pack({**advert, "site": "a" * 65})),
        "a name that is no UTF-8": ("KeyAdvert", pack({**advert, "site": Raw(b"\xa1\xff")})),
        "a cohort of one": ("RoundHeader", pack({**header, "cohort": ["site-a"]})),
        "a cohort of 101": (
            "RoundHeader",
            pack({**header, "cohort": [f"site-{index:03}" for index in range(101)]}),
        ),
        "a cohort out of order": (
            "RoundHeader",
            pack({**header, "cohort": ["site-b", "site-a"]}),
        ),
        "a cohort with a repetition": (
            "RoundHeader",
            pack({**header, "cohort": ["site-a", "site-a"]}),
        ),
        "nested a thousand deep": ("KeyAdvert", b"\x91" * 1000 + b"\xc0"),
        "an array that promises 2^32 - 1 elements": (
            "Survivors",
            pack({**survivors, "sites": Raw(b"\xdd\xff\xff\xff\xff")}),
        ),
    }
    return [
        refused(f"malformed: {name}", "open-statement", _opening(label, data, "site-a"), MALFORMED)
        for name, (label, data) in wrong.items()
    ]


def _wrongly_signed() -> list[Case]:
    """Statements that are well formed but refused for the signature."""
    good = _opening("KeyAdvert", encode(ADVERT), "site-a")
    signature = good["signature"]
    wrong: dict[str, dict[str, Any]] = {
        "by another identity": {"public_key": identity("site-b").public_key},
        "signed as another type": _opening("KeyAdvert", encode(ADVERT), "site-a", "Survivors"),
        "a release signed as a header": _opening(
            "Release", encode(RELEASE), "operator", "RoundHeader"
        ),
        "a release of one version signed as another": _opening(
            "Release2", encode(RELEASE2), "operator", "Release"
        ),
        "one bit of the statement flipped": {
            "statement": good["statement"][:-1] + bytes([good["statement"][-1] ^ 1])
        },
        "one bit of the signature flipped": {
            "signature": bytes([signature[0] ^ 1]) + signature[1:]
        },
        "a signature of zeros": {"signature": bytes(64)},
        "a signature with s past the group's order": {
            "signature": signature[:32] + _past_order(signature[32:])
        },
        "a pinned key that is no point": {"public_key": b"\xff" * 32},
    }
    return [
        refused(f"signature: {name}", "open-statement", {**good, **change}, "pinned-signature")
        for name, change in wrong.items()
    ]


def _past_order(scalar: bytes) -> bytes:
    """The same scalar plus the order of the group, which RFC 8032, section 5.1.7, refuses."""
    order = 2**252 + 27742317777372353535851937790883648493
    return (int.from_bytes(scalar, "little") + order).to_bytes(32, "little")
