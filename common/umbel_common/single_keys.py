"""JSON documents that people hand over, in which each key stands once in its object.

Readers of JSON do not agree on which of two values counts. So two people could read different
things in one plan or roster, and a third thing be signed.
"""

import json
from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode_document(text: str, kind: type[T]) -> T:
    """The value that a document describes.

    Raises:
        msgspec.DecodeError: the text is not JSON, has a wrong field, or has a key twice.
        RecursionError: there are values within values without end.
    """
    value = msgspec.json.decode(text, type=kind)
    json.loads(text, object_pairs_hook=_once)
    return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise msgspec.DecodeError(f"Object contains the field `{twice}` twice")
    return found
