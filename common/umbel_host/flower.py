"""How sealed bytes travel inside a Flower message: the same on both sides.

Flower's own metadata is never believed: who speaks is settled by the seal.
"""

from flwr.app import ConfigRecord, Message, RecordDict

from umbel_common.wire import FLOWER_FIELD, FLOWER_PIECE_BYTES, FLOWER_RECORD


def packed(sealed: bytes) -> RecordDict:
    """Sealed bytes as Flower's content: one record for each piece, which is sent by itself."""
    view = memoryview(sealed)
    starts = range(0, len(sealed), FLOWER_PIECE_BYTES)
    return RecordDict(
        {
            f"{FLOWER_RECORD}-{number}": ConfigRecord(
                {FLOWER_FIELD: bytes(view[start : start + FLOWER_PIECE_BYTES])}
            )
            for number, start in enumerate(starts)
        }
    )


def unpacked(message: Message) -> bytes | None:
    """The inverse of `packed`; None for an error or anything else."""
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
    return b"".join(pieces) or None
