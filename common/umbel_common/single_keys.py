"""JSON in which an object has a key twice.

Every reader of JSON takes one of the two values and drops the other without a word; which one, they
do not agree on. So two people could read different things in one plan or roster, and a third thing
be signed; and nobody knows what a record with two labels was meant to say.

Fast parsers do not say that they dropped a value. But each key has a colon after it: a file of
records with no more such colons than the keys that were read has no key twice. To count them takes
a few percent of the time that reading takes. Only the records of other files are parsed again.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

_ROWS = 64
"""Records that are written out at once, to count the keys in objects within objects."""
_COLON, _QUOTE, _BACKSLASH, _U = b':"\\u'
_ESCAPED = re.compile(rb"\\u00(?:2[0-2]|3[aA])")
"""Characters of texts that `_colons` counts when they are written as they are, and not so."""
_LONGEST = 6
_BEFORE_VALUE = re.compile(r'[\0-"]:')

T = TypeVar("T")


def decode_document(text: str, kind: type[T]) -> T:
    """The value that a JSON document describes, which people hand over.

    Raises:
        msgspec.DecodeError: the text is not JSON, has a wrong field, or has a key twice.
        RecursionError: there are values within values without end.
    """
    value = msgspec.json.decode(text, type=kind)
    for key in twice_in(json.loads(text, object_pairs_hook=object_of)):
        raise msgspec.DecodeError(f"Object contains the field `{key}` twice")
    return value


class Twice(dict[str, Any]):
    """An object that has keys twice, with the last value of each."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.keys_twice = tuple(name for name in self if names.count(name) > 1)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` with which `json.loads` makes a `Twice` of such an object."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Twice(pairs)


def twice_in(value: object) -> Iterator[str]:
    """Every key that an object within a value has twice."""
    if isinstance(value, Twice):
        yield from value.keys_twice
    if isinstance(value, dict):
        for part in value.values():
            yield from twice_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from twice_in(part)


def has_twice(text: str, keys: int) -> bool:
    """Whether an object of a JSON text has a key twice.

    Args:
        keys: the number of keys that were read from it.
    """
    if len(_BEFORE_VALUE.findall(text)) == keys:
        return False
    return any(True for _ in twice_in(json.loads(text, object_pairs_hook=object_of)))


def may_repeat(
    pieces: Callable[[int], Iterable[bytes | memoryview]], rows: Sequence[Mapping[str, object]]
) -> bool:
    """Whether an object of a file of JSON lines may have a key twice; False: no object has.

    Args:
        pieces: yields the file in pieces, each after this number of bytes of the one before.
        rows: the file's rows; True if one of its lines is not among them.
    """
    colons = sum(map(_colons, pieces(1)))
    if colons == sum(map(len, rows)):
        return False
    try:
        written = sum(
            _colons(msgspec.json.encode(rows[start : start + _ROWS]))
            for start in range(0, len(rows), _ROWS)
        )
    except (TypeError, ValueError, msgspec.MsgspecError):
        # A row with NaN, or a number that JSON has no room for.
        return True
    return colons != written or any(map(_has_escaped, pieces(_LONGEST - 1)))


def _colons(data: bytes | memoryview) -> int:
    """The colons after a quotation mark or white space: those of all keys, and some of texts."""
    return _pairs(data, lambda sign, following: (sign <= _QUOTE) & (following == _COLON))


def _has_escaped(data: bytes | memoryview) -> bool:
    begun = _pairs(data, lambda sign, following: (sign == _BACKSLASH) & (following == _U))
    return begun > 0 and _ESCAPED.search(data) is not None


def _pairs(data: bytes | memoryview, wanted: Callable[[Any, Any], Any]) -> int:
    """Number of the places where two bytes follow each other that are wanted."""
    # Commands that read no records should not wait for it.
    import numpy as np

    signs = np.frombuffer(data, np.uint8)
    return int(np.count_nonzero(wanted(signs[:-1], signs[1:])))
