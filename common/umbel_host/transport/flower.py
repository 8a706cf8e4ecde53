"""Sealed bytes as the content of a Flower message, the same on both sides.

Flower's own metadata is never believed; the seal settles who speaks.
"""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from flwr.app import ConfigRecord, Message, RecordDict

from umbel_host.transport.pieces import (
    FLOWER_FIELD,
    FLOWER_MARK,
    FLOWER_PIECE_BYTES,
    FLOWER_RECORD,
)


class PieceInFile(ConfigRecord):
    """A piece in a file, which is read whenever Flower asks for it."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._place = file, start, length

    def deflate(self) -> bytes:
        """The bytes of an ordinary record with the piece; see Flower's `InflatableObject`."""
        file, start, length = self._place
        file.seek(start)
        return ConfigRecord({FLOWER_FIELD: file.read(length)}).deflate()


class PieceElsewhere(ConfigRecord):
    """A piece of which only its name among Flower's objects is known."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def packed(sealed: bytes) -> RecordDict:
    """Sealed bytes as Flower's content, with one record for each piece, which is sent by itself."""
    return packed_pieces(regrouped([sealed]))


def packed_pieces(pieces: Iterable[bytes]) -> RecordDict:
    """Like `packed`, from pieces as `regrouped` makes them, which are not copied."""
    return _content(ConfigRecord({FLOWER_FIELD: piece}) for piece in pieces)


def packed_file(parts: Iterable[bytes], file: BinaryIO) -> RecordDict:
    """Like `packed`, from parts of any size, which are kept in a file that must stay open."""
    records, start = [], 0
    for piece in regrouped(parts):
        file.write(piece)
        records.append(PieceInFile(file, start, len(piece)))
        start += len(piece)
    return _content(records)


def _content(records: Iterable[ConfigRecord]) -> RecordDict:
    return RecordDict(
        {f"{FLOWER_RECORD}-{number}": record for number, record in enumerate(records)}
    )


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


def unpacked(message: Message) -> bytes | None:
    """The inverse of `packed`; None for an error or any other content."""
    pieces = unpacked_pieces(message)
    return None if pieces is None else b"".join(pieces)


def unpacked_pieces(message: Message) -> list[bytes] | None:
    """Like `unpacked`, in the pieces in which the bytes came."""
    pieces = []
    for record in _records(message):
        piece = piece_of(record)
        if piece is None:
            return None
        pieces.append(piece)
    return pieces if any(pieces) else None


def mark() -> RecordDict:
    """The content of an announcement whose message comes in pieces (`FLOWER_MARK`)."""
    return RecordDict({FLOWER_MARK: ConfigRecord()})


def takes_inline(announcement: Message) -> bool:
    """Whether a server that announces so takes replies whole."""
    if not announcement.has_content():
        return False
    return FLOWER_MARK in announcement.content or bool(unpacked_pieces(announcement))


def names_of_pieces(message: Message) -> list[str] | None:
    """The names of a message's pieces, in their order, if all are `PieceElsewhere`; else None."""
    records = _records(message)
    names = [record.name for record in records if isinstance(record, PieceElsewhere)]
    return names if names and len(names) == len(records) else None


def piece_of(record: object) -> bytes | None:
    """The bytes in one of Flower's records; None if the record is not a piece of ours."""
    if not isinstance(record, ConfigRecord) or set(record) != {FLOWER_FIELD}:
        return None
    piece = record[FLOWER_FIELD]
    return piece if isinstance(piece, bytes) else None


def _records(message: Message) -> list[object]:
    """The records in the places of our pieces, in their order, whatever they are."""
    if not message.has_content():
        return []
    content = message.content
    return [content.get(f"{FLOWER_RECORD}-{number}") for number in range(len(content))]
