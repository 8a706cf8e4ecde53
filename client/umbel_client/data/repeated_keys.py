"""JSON lines in which one object has a key twice.

Every reader of JSON takes one of the two values and drops the other without a word; which one, they
do not agree on. So such a record is refused where the value is asked for, as a column that a CSV
file has twice.

Parsers that are fast do not say that they dropped a value. But each key has a colon after it: a
file with no more such colons than the keys that were read has no key twice. Counting them costs a
few percent of reading the file. Only the rows of other files are parsed once more.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

_CHUNK = 1 << 17
_ROWS = 64
"""Rows that are written out at once, to count the keys in objects within objects."""
_COLON, _QUOTE = ord(":"), ord('"')
_ESCAPED = re.compile(rb"\\u00(?:2[0-2]|3[aA])")
"""Characters of texts that `_colons` counts when they are written as they are, and not so."""
_BEFORE_VALUE = re.compile(r'[\0-"]:')


class Twice(dict[str, Any]):
    """An object that has keys twice, with the last value of each."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.keys_twice = tuple(name for name in self if names.count(name) > 1)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of `json.loads` for which a key that comes twice is no secret."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Twice(pairs)


def may_repeat(path: Path, rows: Sequence[Mapping[str, object]]) -> bool:
    """Whether an object of a file of JSON lines may have a key twice; False: no object has.

    Args:
        rows: the file's rows; True if one of its lines is not among them.
    """
    colons = sum(map(_colons, _chunks(path, before=1)))
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
    return colons != written or any(_has_escaped(part) for part in _chunks(path, before=5))


def has_twice(text: str, keys: int) -> bool:
    """Whether an object of a JSON text has a key twice.

    Args:
        keys: the number of keys that were read from it.
    """
    if len(_BEFORE_VALUE.findall(text)) == keys:
        return False
    return bool(list(twice_in(json.loads(text, object_pairs_hook=object_of))))


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


def _colons(data: bytes | memoryview) -> int:
    """The colons after a quotation mark or white space: those of all keys, and some of texts."""
    signs = np.frombuffer(data, np.uint8)
    return int(np.count_nonzero((signs[:-1] <= _QUOTE) & (signs[1:] == _COLON)))


def _has_escaped(data: memoryview) -> bool:
    whole = bytes(data)
    return b"\\u00" in whole and _ESCAPED.search(whole) is not None


def _chunks(path: Path, before: int) -> Iterator[memoryview]:
    """A file in pieces that a processor's cache holds, each after the last bytes of the one before.

    Args:
        before: how many of them.
    """
    buffer = bytearray(before + _CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(view[before:]):
            yield view[: before + size]
            view[:before] = bytes(view[size : size + before])
