"""Whose record is whose: the unit that differential privacy protects as a whole, such as a patient.

Where units are known, a step samples units, averages the gradients of each one's records, clips the
average, and the accountant counts units: adding or removing everything of one patient moves the sum
by the clip norm at most. Without units each record is its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from umbel_client.data.tokens import Ints


@dataclass(frozen=True)
class Units:
    """The unit of each record."""

    of_record: Ints
    """int64[records]: from 0, every number up to the last one used."""

    def __len__(self) -> int:
        return int(self.of_record.max()) + 1

    def records_of(self, chosen: Ints) -> Ints:
        """All records of the chosen units, int64[n], rising."""
        return np.flatnonzero(np.isin(self.of_record, chosen))

    def whole(self, records: Ints, size: int) -> Iterator[Ints]:
        """Cuts records into parts of about `size` that hold all or none of a unit's records.

        A part is larger where a single unit is. Units come in the order of their first record in
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
