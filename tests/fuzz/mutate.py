"""Honest messages with a few changes: trees of maps, lists and values, changed by choices.

A tree is what MessagePack can encode: dict, list, str, bytes, numbers. Signed statements in a tree
can be changed and signed again, so that the code behind a signature check is reached too.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
from fuzz.choices import Choices
from vectors.values import IDENTITIES, OPERATOR

from umbel_common.canonical import Value
from umbel_common.secagg.shamir import PRIME
from umbel_common.trust.identity import Identity

Tree: TypeAlias = Any
Place: TypeAlias = tuple[Any, Any]
"""A container and the key or index of one of its children."""

CHANGES = (1, 1, 1, 1, 2, 2, 3, 4)
"""Numbers of changes to draw from; mostly one, since two seldom get past the first check."""
ODD_VALUES: tuple[Tree, ...] = (
    None,
    True,
    0,
    1,
    -1,
    2,
    255,
    2**31,
    2**32 - 1,
    2**53,
    2**64 - 1,
    1.0,
    -0.0,
    1e-300,
    math.nan,
    math.inf,
    "",
    "site-a",
    "site-b",
    "site-d",
    "Site-a",
    "site-a\n",
    "ä",
    "a" * 65,
    b"",
    bytes(32),
    bytes([1] + [0] * 31),
    b"\xff" * 32,
    PRIME.to_bytes(32, "big"),
    bytes(64),
    bytes(92),
    [],
    {},
    [[[[[[]]]]]],
    ["site-a", "site-b"],
    list(range(101)),
)
LABELS = {
    "cipher_key": "KeyAdvert",
    "sites": "Survivors",
    "cohort": "RoundHeader",
    "survivors": "Release",
    "training": "TrainingPlan",
    "event": "Entry",
}
"""A field that only one type of statement has -> the label under which that type is signed."""


def tree_of(value: Any) -> Tree:
    """The tree in the encoding of a value."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value))


def encoded(tree: Tree) -> bytes:
    """The tree as MessagePack, fit to be decoded as any type."""
    return msgspec.msgpack.encode(tree)


def mutated(tree: Tree, choices: Choices, others: Sequence[Tree] = ()) -> Tree:
    """`tree` with one to four changes, or unchanged if `choices` are used up.

    Args:
        others: trees from which parts may be taken.
    """
    root = [msgspec.msgpack.decode(msgspec.msgpack.encode(tree))]
    for _ in range(CHANGES[choices.below(len(CHANGES))]):
        if not choices.left:
            break
        # Half of the changes are near the root: whole parts missing, repeated, exchanged.
        places = _places(root) if choices.below(2) else _shallow(root)
        container, key = places[choices.below(len(places))]
        _CHANGES[choices.below(len(_CHANGES))](container, key, choices, root, others)
    return root[0] if root else None


def damaged(data: bytes, choices: Choices) -> bytes:
    """`data` with one change to its bytes: a flipped bit, a cut, an insertion, or none."""
    where = choices.below(len(data) + 1)
    match choices.below(4):
        case 0:
            return data
        case 1:
            return data[:where]
        case 2:
            return data[:where] + choices.take(4) + data[where:]
        case _:
            changed = bytes([data[where] ^ (1 << choices.below(8))]) if where < len(data) else b""
            return data[:where] + changed + data[where + 1 :]


def _places(root: list[Tree]) -> list[Place]:
    places: list[Place] = []
    waiting: list[Tree] = [root]
    while waiting:
        container = waiting.pop()
        keys = container.keys() if isinstance(container, dict) else range(len(container))
        for key in keys:
            places.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return places or [([None], 0)]


def _shallow(root: list[Tree]) -> list[Place]:
    """The root's children, or the root if it has no children."""
    if root and isinstance(root[0], dict | list) and root[0]:
        keys = root[0].keys() if isinstance(root[0], dict) else range(len(root[0]))
        return [(root[0], key) for key in keys]
    return _places(root)


def _copy(tree: Tree) -> Tree:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(tree))


def _odd(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    container[key] = _copy(ODD_VALUES[choices.below(len(ODD_VALUES))])


def _splice(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    """Puts in another part of this tree, or a part of one of the others."""
    sources = [root, *([tree] for tree in others)]
    places = _places(sources[choices.below(len(sources))])
    donor, at = places[choices.below(len(places))]
    container[key] = _copy(donor[at])


def _delete(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    del container[key]


def _repeat(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    if isinstance(container, list):
        container.insert(choices.below(len(container) + 1), _copy(container[key]))
    else:
        container[str(key) + "s"] = _copy(container[key])


def _swap(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    other = keys[choices.below(len(keys))]
    container[key], container[other] = container[other], container[key]


def _reverse(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    """Reverses a list, or the fields of a map."""
    if isinstance(container, list):
        container.reverse()
    else:
        container[key] = container.pop(key)


def _nudge(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    """Changes a value a little: a bit, a letter, one more or less."""
    value = container[key]
    match value:
        case bytes():
            container[key] = damaged(value, choices)
        case str():
            changed = damaged(value.encode(), choices)
            container[key] = changed.decode("utf-8", errors="replace")
        case bool() | None:
            container[key] = not value
        case int():
            container[key] = max(-(2**63), min(2**64 - 1, value + choices.below(3) - 1))
        case float():
            container[key] = value * (0.5, 2.0, -1.0, 1e9)[choices.below(4)]
        case _:
            container[key] = [value]


def _raw(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    container[key] = choices.take(choices.below(40))


def _resign(container: Any, key: Any, choices: Choices, root: Any, others: Any) -> None:
    """Changes a statement, and has its rightful signer, or another party, sign the change."""
    holders = [
        inner[at]
        for inner, at in _places(root)
        if isinstance(inner[at], dict)
        and isinstance(inner[at].get("statement"), bytes)
        and isinstance(inner[at].get("signature"), bytes)
    ]
    if not holders:
        return
    signed = holders[choices.below(len(holders))]
    try:
        statement = [msgspec.msgpack.decode(signed["statement"])]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return
    places = _places(statement)
    inner, at = places[choices.below(len(places))]
    _PLAIN[choices.below(len(_PLAIN))](inner, at, choices, statement, others)
    content = statement[0] if statement else None
    fields = content if isinstance(content, dict) else {}
    label = next((LABELS[field] for field in LABELS if field in fields), "KeyAdvert")
    data = damaged(encoded(content), choices) if choices.below(8) == 1 else encoded(content)
    signed["statement"] = data
    signed["signature"] = _signer(fields, choices).sign(label, data)


def _signer(fields: dict[str, Any], choices: Choices) -> Identity:
    site = fields.get("site")
    match choices.below(4):
        case 0 if isinstance(site, str) and site in IDENTITIES:
            return IDENTITIES[site]
        case 1:
            return IDENTITIES["site-a"]
        case 2:
            return IDENTITIES["site-b"]
        case _:
            return OPERATOR


_PLAIN = (_odd, _splice, _delete, _repeat, _swap, _reverse, _nudge, _nudge, _raw)
_CHANGES = (*_PLAIN, _splice, _repeat, _swap, _resign, _resign, _resign)


def trees_of(values: Sequence[Value]) -> tuple[Tree, ...]:
    """The tree of each value."""
    return tuple(map(tree_of, values))
