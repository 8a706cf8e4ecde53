"""Which of a site's records are held out from training.

This module is part of the core of the privacy guarantee. Never let another unit's records decide on
which side a unit is.

For each unit it depends on this unit alone: its own content is hashed. So adding or removing
another unit moves no unit from one side to the other.
"""

import hashlib
from collections.abc import Sequence

import msgspec

from umbel_client.data.records import LmRecords, Records


def hold_out(
    records: Records | LmRecords, share: float
) -> tuple[Records | LmRecords, Records | LmRecords]:
    """Divides records: most to train on, and about `share` of all units to score on.

    Either part may be empty. A refusal would tell whether a record is on its side alone.
    """
    chosen = [_position(key) < share for key in _keys(records)]
    training = records.only([index for index, held in enumerate(chosen) if not held])
    scoring = records.only([index for index, held in enumerate(chosen) if held])
    return training, scoring


def _keys(records: Records | LmRecords) -> Sequence[bytes]:
    """What decides for each record: the name of its unit, or its content."""
    if records.units:
        return [records.unit_names[unit].encode() for unit in records.units]
    return [msgspec.json.encode(record) for record in records.records]


def _position(key: bytes) -> float:
    """A number between 0 and 1 that looks random."""
    return int.from_bytes(hashlib.sha256(b"umbel held out" + key).digest()[:8], "big") / 2**64
