"""How sealed bytes travel inside a Flower message: the same on both sides.

Flower's own metadata is never believed: who speaks is settled by the seal.
"""

from collections.abc import Iterator

from flwr.app import ConfigRecord, Message, RecordDict

from umbel_common.wire import FLOWER_FIELD, FLOWER_PIECE_BYTES, FLOWER_RECORD


def packed(sealed: bytes) -> RecordDict:
    """Sealed bytes as Flower's content: one record for each piece, which is sent by itself."""
    return packed_pieces(iter([sealed]))


def packed_pieces(parts: Iterator[bytes]) -> RecordDict:
    """As `packed`, of bytes that come in parts of any size: what has come is not copied again."""
    return RecordDict(
        {
            f"{FLOWER_RECORD}-{number}": ConfigRecord({FLOWER_FIELD: piece})
            for number, piece in enumerate(_regrouped(parts))
        }
    )


def _regrouped(parts: Iterator[bytes]) -> Iterator[bytes]:
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
    """The inverse of `packed`; None for an error or anything else."""
    pieces = unpacked_pieces(message)
    return None if pieces is None else b"".join(pieces)


def unpacked_pieces(message: Message) -> list[bytes] | None:
    """As `unpacked`, in the pieces in which it came; None for an error or anything else."""
    if not message.has_content():
        return None
    pieces = []
    for number in range(len(message.content)):
        record = message.content.get(f"{FLOWER_RECORD}-{number}")
        if not isinstance(record, ConfigRecord) or set(record) != {FLOWER_FIELD}:
            return None
        piece = record[FLOWER_FIELD]
        if not isinstance(piece, bytes):
            return None
        pieces.append(piece)
    return pieces if any(pieces) else None
