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
from umbel_common.errors import DataError


def hold_out(
    records: Records | LmRecords, share: float
) -> tuple[Records | LmRecords, Records | LmRecords]:
    """Divides records: most to train on, and about `share` of all units to score on.

    Raises:
        DataError: one of the two would be empty.
    """
    chosen = [_position(key) < share for key in _keys(records)]
    training = _only(records, [index for index, held in enumerate(chosen) if not held])
    scoring = _only(records, [index for index, held in enumerate(chosen) if held])
    if not len(training) or not len(scoring):
        raise DataError(
            "too few records to train on some and score on others",
            file=records.path,
            field="data.evaluation_share",
            found=f"{len(scoring)} of {len(records)} held out",
            remedy="raise data.evaluation_share, or take no part in plans with an evaluation",
        )
    return training, scoring


def _keys(records: Records | LmRecords) -> Sequence[bytes]:
    """What decides for each record: the name of its unit, or its content."""
    if records.units:
        return [records.unit_names[unit].encode() for unit in records.units]
    return [msgspec.json.encode(record) for record in records.records]


def _position(key: bytes) -> float:
    """A number between 0 and 1 that looks random."""
    return int.from_bytes(hashlib.sha256(b"umbel held out" + key).digest()[:8], "big") / 2**64


def _only(records: Records | LmRecords, kept: list[int]) -> Records | LmRecords:
    numbers: dict[int, int] = {}
    units = [records.units[index] for index in kept] if records.units else []
    for unit in units:
        numbers.setdefault(unit, len(numbers))
    return msgspec.structs.replace(
        records,
        records=tuple(records.records[index] for index in kept),
        rows=tuple(records.rows[index] for index in kept) if records.rows else (),
        units=tuple(numbers[unit] for unit in units),
        unit_names=tuple(records.unit_names[unit] for unit in numbers),
    )
