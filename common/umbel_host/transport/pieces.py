"""How sealed bytes are cut into records of a Flower message: names and sizes for both sides."""

FLOWER_MESSAGE_TYPE = "train.umbel"
"""Type of every message of ours, for Flower."""

FLOWER_RECORD = "umbel"
"""Prefix of the names of records: `umbel-0`, `umbel-1` and so on."""

FLOWER_FIELD = "sealed"
"""Name of the one field of a record."""

FLOWER_PIECE_BYTES = 1 << 22
"""Size of the largest piece in a record. Flower sends, and sends again, each piece by itself."""

FLOWER_INLINE_BYTES = 1 << 18
"""Size of the largest message that rides whole in its announcement, without pieces."""

FLOWER_MARK = "umbel-inline"
"""Name of an empty record in an announcement without the message, by which a server says that it
takes replies whole; and what a relay that takes them so puts into its question for messages."""
