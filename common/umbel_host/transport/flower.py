"""Sealed bytes as the content of a Flower message, the same on both sides.

A small message is in its content. The content of a larger one has the names of its pieces, which
are sent by themselves. Flower's own metadata is never believed; the seal settles who speaks.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from umbel_host.transport.pieces import (
    FLOWER_FIELD,
    FLOWER_NAMES,
    FLOWER_PIECE_BYTES,
    FLOWER_PLACE,
    FLOWER_RECORD,
)

_NAME_BYTES = 32


def packed(sealed: bytes) -> RecordDict:
    """Flower's content of a message without pieces, of any size."""
    return RecordDict({FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: sealed})})


def packed_names(names: Sequence[str]) -> RecordDict:
    """Flower's content of a message in pieces.

    Args:
        names: of the pieces, in their order, in hexadecimal digits.
    """
    joined = b"".join(map(bytes.fromhex, names))
    return RecordDict({FLOWER_RECORD: ConfigRecord({FLOWER_NAMES: joined})})


def unpacked(message: Message) -> bytes | None:
    """The inverse of `packed`; None for an error or any other content."""
    return _field(message, FLOWER_FIELD) or None


def unpacked_names(message: Message) -> list[str] | None:
    """The inverse of `packed_names`; None for an error or any other content."""
    joined = _field(message, FLOWER_NAMES)
    if not joined or len(joined) % _NAME_BYTES:
        return None
    return [
        joined[start : start + _NAME_BYTES].hex() for start in range(0, len(joined), _NAME_BYTES)
    ]


def _field(message: Message, name: str) -> bytes | None:
    if not message.has_content() or set(message.content) != {FLOWER_RECORD}:
        return None
    return _bytes_in(message.content[FLOWER_RECORD], {name}, name)


def regrouped(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of `FLOWER_PIECE_BYTES`, the last one shorter."""
    rest = bytearray()
    for part in parts:
        view = memoryview(part)
        while len(view):
            room = FLOWER_PIECE_BYTES - len(rest)
            rest += view[:room]
            view = view[room:]
            if len(rest) == FLOWER_PIECE_BYTES:
                yield bytes(rest)
                rest.clear()
    if rest:
        yield bytes(rest)


def packed_piece(piece: bytes, message: str, number: int) -> tuple[str, bytes]:
    """Name and bytes of a piece as an object of Flower's.

    Args:
        message: what names the message that the piece belongs to.
        number: of the piece in it.
    """
    content = ConfigRecord({FLOWER_FIELD: piece, FLOWER_PLACE: f"{message}-{number}"}).deflate()
    return hashlib.sha256(content).hexdigest(), content


def unpacked_piece(name: str, content: bytes) -> bytes | None:
    """The inverse of `packed_piece`; None if the object is not a piece of ours."""
    try:
        record = inflate_object_from_contents(name, {name: content})
    except Exception:
        # Flower may raise anything for bytes that are not its own.
        return None
    return _bytes_in(record, {FLOWER_FIELD, FLOWER_PLACE}, FLOWER_FIELD)


def _bytes_in(record: object, fields: set[str], name: str) -> bytes | None:
    """The bytes in a field of a record that has just these fields."""
    if not isinstance(record, ConfigRecord) or set(record) != fields:
        return None
    value = record[name]
    return value if isinstance(value, bytes) else None
