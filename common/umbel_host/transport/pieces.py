"""How sealed bytes are cut into Flower records: names and sizes that both sides use."""

FLOWER_MESSAGE_TYPE = "train.umbel"

FLOWER_RECORD = "umbel"

FLOWER_FIELD = "sealed"

FLOWER_PIECE_BYTES = 1 << 22
"""A Flower message carries the sealed bytes in records `umbel-0`, `umbel-1` and so on, each with
one field: a piece of so many bytes at most, which Flower sends, and sends again, by itself."""
