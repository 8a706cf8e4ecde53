"""Sealed bytes as the content of a Flower message, the same on both sides.

A small message is in its content. The content of a larger one has the names of its pieces, which
are sent by themselves. Flower's own metadata is never believed; the seal settles who speaks.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.recorddict_pb2 import ConfigRecord as Record
from flwr.proto.recorddict_pb2 import ConfigRecordValue as RecordValue
from google.protobuf.message import DecodeError

from umbel_host.transport.pieces import (
    FLOWER_FIELD,
    FLOWER_NAMES,
    FLOWER_PIECE_BYTES,
    FLOWER_PLACE,
    FLOWER_RECORD,
    NAME_BYTES,
)

_HEAD, _DIVIDER = b"ConfigRecord  %d", b"\0"
"""What Flower writes before a record: its type, the names of its parts, of which it has none, and
the number of bytes that follow."""
_LONGEST_HEAD = 40
_LONGEST_PLACE = 256
"""Bytes of what follows a piece in its record."""


def _tag(number: int) -> bytes:
    return bytes([number << 3 | 2])


_ITEM = _tag(Record.ITEMS_FIELD_NUMBER)
_VALUE_OF_FIELD = Record.Item(key=FLOWER_FIELD).SerializeToString() + _tag(
    Record.Item.VALUE_FIELD_NUMBER
)
_BYTES = _tag(RecordValue.BYTES_FIELD_NUMBER)


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
    if not joined or len(joined) % NAME_BYTES:
        return None
    return [joined[start : start + NAME_BYTES].hex() for start in range(0, len(joined), NAME_BYTES)]


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


def is_piece(content: bytes) -> bool:
    """Whether an object is a piece of ours."""
    return _piece_in(content) is not None


def unpacked_piece(content: bytes) -> bytes | None:
    """The inverse of `packed_piece`; None if the object is not a piece of ours."""
    found = _piece_in(content)
    return None if found is None else content[found]


def _piece_in(content: bytes) -> slice | None:
    """Where the piece is in an object; None if the object is not one that `packed_piece` makes.

    Nothing is made of an object before that is known: over what has a million small parts, Flower
    takes seconds and a hundred times its bytes, and keeps its database for a part of that time.
    """
    body = content.find(_DIVIDER, 0, _LONGEST_HEAD) + 1
    if content[: max(body - 1, 0)] != _HEAD % (len(content) - body):
        return None
    item = _field_at(content, body, _ITEM)
    value = item and _field_at(content, item.start, _VALUE_OF_FIELD)
    piece = value and _field_at(content, value.start, _BYTES)
    if not item or not value or not piece or not item.stop == value.stop == piece.stop:
        return None
    if not 0 < len(content) - item.stop <= _LONGEST_PLACE:
        return None
    try:
        rest = Record.FromString(content[item.stop :]).items
    except DecodeError:
        return None
    return piece if [one.key for one in rest] == [FLOWER_PLACE] else None


def _field_at(content: bytes, start: int, tag: bytes) -> slice | None:
    """Where the bytes of a field of protobuf's are; None if no such field begins at `start`."""
    start += len(tag)
    if content[start - len(tag) : start] != tag:
        return None
    size = 0
    for place, digit in enumerate(content[start : start + 5]):
        size |= (digit & 0x7F) << 7 * place
        if digit < 0x80:
            start += place + 1
            return slice(start, start + size)
    return None


def _bytes_in(record: object, fields: set[str], name: str) -> bytes | None:
    """The bytes in a field of a record that has just these fields."""
    if not isinstance(record, ConfigRecord) or set(record) != fields:
        return None
    value = record[name]
    return value if isinstance(value, bytes) else None
