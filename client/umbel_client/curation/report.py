"""What a site's people are shown of their own records: counts, lengths, repeated records.

All of it is as private as the records. It holds no text; rows have their number in the file.
"""

from collections import Counter

import msgspec
import numpy as np

from umbel_client.curation.examples import Examples, alike_records, label_remark, repeated
from umbel_client.curation.lengths import Lengths
from umbel_client.data.site_data import warnings_of
from umbel_client.data.tokens import Ints
from umbel_client.site.config import DataConfig
from umbel_common.plans.plan import CausalLm, Classification

_SMALLEST_CUT = 32


class Spread(msgspec.Struct, frozen=True):
    """The distribution of a count over records or units."""

    least: int
    median: int
    percentile_95: int
    most: int


class Cut(msgspec.Struct, frozen=True):
    """What a plan with this `max_tokens` would do to the records."""

    max_tokens: int
    longer: int
    """Number of records with more tokens; they are cut, or refused."""
    unanswered: int | None
    """How many of them would lose their whole answer; None: there are no answers."""


class DataReport(msgspec.Struct, frozen=True):
    """A file of records in figures."""

    file: str
    format: str
    records: int
    units: int | None
    """Number of units; None: each record is its own unit."""
    records_per_unit: Spread | None
    labels: dict[str, int] | None
    """Number of records of each label, the commonest first; None for a language model."""
    repeated_rows: list[int]
    """Rows whose record repeats an earlier one; the spaces between words do not count."""
    shared_by_units: int
    """Number of units with a record that another unit has too."""
    contradictory_rows: list[int]
    """Rows whose text an earlier row has with another label."""
    alike_rows: list[int] = []
    """Rows that differ from an earlier one only in case, or in the width or form of characters."""
    remarks: list[str] = []
    """What the records' owner should know besides, a sentence each."""
    tokens: Spread | None = None
    """Tokens of a record; None: no model was given whose tokenizer could count."""
    cuts: list[Cut] | None = None


def report(
    examples: Examples,
    lengths: Lengths | None = None,
    *,
    data: DataConfig,
    public_size: int | None = None,
) -> DataReport:
    """The figures of a file of records.

    Args:
        data: where in the file the records are.
        public_size: number of units that everyone may know; None: it is not used.
    """
    keys = examples.keys
    groups = repeated(keys)
    task = examples.task
    named = task.labels if isinstance(task, Classification) else ()
    remark = label_remark(examples, data)
    rows, units, labels = examples.records.rows, examples.units, examples.labels
    by_unit = examples.records.unit_column is not None
    contradictory = (
        []
        if labels is None
        else [row for group in groups for row in group[1:] if labels[row] != labels[group[0]]]
    )
    shared = {unit for group in groups for unit in _several({units[row] for row in group})}
    return DataReport(
        file=str(examples.path),
        format=examples.format,
        records=len(examples),
        units=len(set(units)) if by_unit else None,
        records_per_unit=spread(np.unique(units, return_counts=True)[1]) if by_unit else None,
        labels=None if labels is None else dict(Counter(labels).most_common()),
        repeated_rows=sorted(rows[row] for group in groups for row in group[1:]),
        shared_by_units=len(shared) if by_unit else 0,
        contradictory_rows=sorted(rows[row] for row in contradictory),
        alike_rows=[rows[row] for row in alike_records(keys)],
        remarks=[
            *([] if remark is None else [remark]),
            *warnings_of(examples.records, public_size, named),
        ],
        tokens=None if lengths is None else spread(lengths.whole),
        cuts=None if lengths is None else _cuts(lengths, isinstance(examples.task, CausalLm)),
    )


def _several(units: set[int]) -> set[int]:
    return units if len(units) > 1 else set()


def spread(counts: Ints) -> Spread:
    """The distribution of int64[n], n at least 1; its quantiles are counts that occur."""
    found = np.quantile(counts, [0, 0.5, 0.95, 1], method="inverted_cdf")
    return Spread(*(int(value) for value in found))


def _cuts(lengths: Lengths, answers: bool) -> list[Cut]:
    """The cuts at powers of two, up to the first that cuts nothing."""
    cuts = []
    most = _SMALLEST_CUT
    while True:
        longer = lengths.whole > most
        cuts.append(
            Cut(most, int(longer.sum()), int(lengths.unanswered(most).sum()) if answers else None)
        )
        if not longer.any():
            return cuts
        most *= 2
