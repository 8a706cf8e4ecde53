"""The unit that differential privacy protects as a whole, such as all records of a patient.

This module is part of the core of the privacy guarantee. Never part the records of a unit, or let
another unit's records decide which unit a record is in.

Where units are known, a step samples units. It averages the gradients of each unit's records and
clips the average, and the accountant counts units. Adding or removing all records of one patient
moves the sum by the clip norm at most. Without units each record is its own unit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from umbel_client.data.tokens import Ints


@dataclass(frozen=True)
class Units:
    """The unit of each record."""

    of_record: Ints
    """int64[records]: numbers from 0, without a gap."""

    def __len__(self) -> int:
        return int(self.of_record.max(initial=-1)) + 1

    def records_of(self, chosen: Ints) -> Ints:
        """All records of the chosen units, int64[n], in rising order."""
        return np.flatnonzero(np.isin(self.of_record, chosen))

    def whole(self, records: Ints, size: int) -> Iterator[Ints]:
        """Cuts records into parts of about `size` that hold all or none of a unit's records.

        A part is larger if a single unit is. Units come in the order of their first record in
        `records`.
        """
        units, first = np.unique(self.of_record[records], return_index=True)
        part: list[Ints] = []
        for unit in units[np.argsort(first)]:
            members = records[self.of_record[records] == unit]
            if part and sum(map(len, part)) + len(members) > size:
                yield np.concatenate(part)
                part = []
            part.append(members)
        if part:
            yield np.concatenate(part)

    def numbered(self, part: Ints) -> Ints:
        """The unit of each record of a part, int64[n], numbered from 0 within the part."""
        return np.unique(self.of_record[part], return_inverse=True)[1].astype(np.int64)
