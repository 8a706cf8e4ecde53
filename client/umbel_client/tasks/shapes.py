"""The shapes in which records are computed: a record's shape follows from this record alone.

This module is part of the core of the privacy guarantee. Never let the length that a record is
padded to depend on another record, and never compute records in a number of rows that was not shown
to give the same bits.

Floating-point sums depend on their order, and the order in a processor's kernels depends on the
shape of a tensor. An adapter that a server made for it turns such a difference in the last bit into
a whole gradient. So if the longest record of a batch decided how far the others are padded, one
record could move the sum by many clip norms (`docs/privacy.md`).
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from umbel_client.data.tokens import Ints

_logger = logging.getLogger("umbel.trainer")

PADDED_LENGTHS = np.sort([size << n for n in range(21) for size in (16, 24)])
"""Tokens that a record may be padded to: 16, 24, 32, 48, 64, 96, and so on."""


def padded_lengths(lengths: Ints, longest: int | None) -> Ints:
    """The number of tokens that records are padded to, int64[n].

    Args:
        lengths: their own numbers of tokens, int64[n].
        longest: the plan's greatest number of tokens, where padding ends; None: no limit.
    """
    padded = PADDED_LENGTHS[np.searchsorted(PADDED_LENGTHS, lengths)]
    return padded if longest is None else np.maximum(np.minimum(padded, longest), lengths)


@dataclass(frozen=True)
class Part:
    """Records that are computed at once."""

    records: Ints
    """Indices, int64[n]."""
    length: int
    """Tokens of each row."""
    rows: int
    """At least n."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def filled(self) -> Ints:
        """Indices of what each row computes, int64[rows]: the rows that are left repeat a record,
        and nothing reads what comes out of them."""
        return np.resize(self.records, self.rows)


class BatchLimit:
    """The number of records computed at once; once lowered, it stays so for the rest of the job."""

    def __init__(self, records: int) -> None:
        """Records are computed in as many rows as a power of two, or in `records` rows."""
        self.records = records
        self._rows = [rows for rows in (1 << n for n in range(31)) if rows < records] + [records]
        self._larger: list[int] = []
        self._was_lowered = False

    @property
    def choices(self) -> tuple[int, ...]:
        """The numbers of rows that there may be, in rising order; the last one is `records`."""
        return tuple(self._rows)

    def rows(self, records: int) -> int:
        """The number of rows in which this number of records is computed.

        The records of a unit that is larger than a lowered limit have the rows that they had
        before: else their bits would follow from the records that lowered it.
        """
        shown = (*self._rows, *self._larger)
        return next((rows for rows in shown if rows >= records), records)

    def keep(self, choices: Iterable[int]) -> None:
        """Keeps only the numbers of rows that gave the same bits; `records` is always one."""
        self._rows = sorted({*choices, self.records})

    def largest(self) -> "BatchLimit":
        """Another limit, with the largest number of rows alone."""
        alone = BatchLimit(self.records)
        alone.keep(())
        return alone

    def smaller(self, most: int) -> int | None:
        """The largest number of rows that is at most `most`; None if all are larger."""
        return max((rows for rows in self._rows if rows <= most), default=None)

    def lower(self, records: int) -> None:
        """Lowers the limit. It warns the first time only: a batch may need several cuts."""
        level = logging.DEBUG if self._was_lowered else logging.WARNING
        _logger.log(
            level,
            "memory ran out with %d records at once: from now on at most %d at once, to the same"
            " result (physical_batch_size in client.toml)",
            self.records,
            records,
        )
        self.records = records
        self._larger = [rows for rows in self._rows if rows > records] + self._larger
        self._rows = [rows for rows in self._rows if rows <= records]
        self._was_lowered = True
