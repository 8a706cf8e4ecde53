"""How sealed bytes are put into a Flower message: names and sizes for both sides."""

FLOWER_MESSAGE_TYPE = "train.umbel"
"""Type of every message of ours, for Flower."""

FLOWER_RECORD = "umbel"
"""Name of the one record of a message's content."""

FLOWER_FIELD = "sealed"
"""Name of the record's field, if the message is in it; and of the field of a piece."""

FLOWER_NAMES = "names"
"""Name of the record's field with the names of the message's pieces."""

NAME_BYTES = 32
"""Size of a piece's name, the digest of its object."""

FLOWER_PLACE = "place"
"""Name of a piece's field with the message that it belongs to, and its number there: no two pieces
are the same object, whatever is in them."""

FLOWER_PIECE_BYTES = 1 << 22
"""Size of the largest piece. Flower sends, and sends again, each piece by itself."""

FLOWER_INLINE_BYTES = 3 << 14
"""Size of the largest message without pieces: it is one request, or a part of one answer."""
