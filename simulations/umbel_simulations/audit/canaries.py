"""The data of an audit: a site's records, by the record or by the patient, and the canaries.

Both levels differ in the unit of the records alone; whatever follows takes records with their
units, as a site's own training does.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from umbel_client.data.records import Record, Records, load_records
from umbel_common.plans.plan import Classification, TrainingPlan
from umbel_simulations.inputs.sources import Example
from umbel_simulations.scenario.run_folder import write

Unit = Literal["record", "patient"]
"""What privacy is promised for; `patient` is the site's `data.unit_column` too."""

RECORDS_OF_A_PATIENT = 10
"""The more, the further each patient moves a sum that clips single records."""
WORDS = 3
"""In a canary's text: the fewer, the less alike are two of them."""


def site_records(examples: Sequence[Example], task: Classification, unit: Unit) -> Records:
    """What the site itself reads from its file.

    No scenario says whose a record is, so patients are made: each has `RECORDS_OF_A_PATIENT` in a
    row, the last one what is left.
    """
    rows = [
        {
            "text": example.text,
            "label": example.label,
            "patient": number // RECORDS_OF_A_PATIENT,
        }
        for number, example in enumerate(examples)
    ]
    with TemporaryDirectory(prefix="umbel-audit-") as folder:
        path = Path(folder) / "data.jsonl"
        write(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        return load_records(path, task, unit_column=None if unit == "record" else unit)


def records_of_a_unit(unit: Unit) -> int:
    """Of each whole one, canaries too."""
    return 1 if unit == "record" else RECORDS_OF_A_PATIENT


def unit_of_each(records: Records) -> npt.NDArray[np.int64]:
    """int64[records], numbered from 0."""
    return np.array(records.units or range(len(records)), dtype=np.int64)


def unit_count(records: Records) -> int:
    """How many units the records are of."""
    return int(unit_of_each(records).max()) + 1


def first_units(records: Records, most: int) -> Records:
    """The first units with all of their records, and `most` records at most; at least one unit.

    A unit that is cut would be another unit, and its gradient another gradient.
    """
    units = unit_of_each(records)
    count = max(1, int(np.searchsorted(np.cumsum(np.bincount(units)), most, side="right")))
    kept = np.flatnonzero(units < count)
    return msgspec.structs.replace(
        records,
        records=tuple(records.records[index] for index in kept),
        units=tuple(records.units[index] for index in kept) if records.units else (),
    )


def make_canaries(records: Records, plan: TrainingPlan, count: int, seed: int) -> Records:
    """`count` units, each of one record in copies: random words of the site's own texts under a
    random label.

    Nothing fits them, so their gradients are far longer than the clip norm and stay so, and they
    are nearly orthogonal: close to the worst records that there are. The copies' gradients point
    one way, so that clipping each of them instead of their mean shows at its full length.
    """
    generator = np.random.default_rng(seed)
    assert isinstance(plan.task, Classification)  # site_records reads no other
    labels = len(plan.task.labels)
    words = sorted({word for text in records.texts for word in text.split()})
    copies = RECORDS_OF_A_PATIENT if records.units else 1
    made = [
        Record(
            text=" ".join(generator.choice(words, WORDS)),
            label=int(generator.integers(labels)),
        )
        for _ in range(count)
    ]
    return msgspec.structs.replace(
        records,
        records=tuple(record for record in made for _ in range(copies)),
        units=tuple(number for number in range(count) for _ in range(copies))
        if records.units
        else (),
    )


def with_included(records: Records, canaries: Records, included: npt.NDArray[np.bool_]) -> Records:
    """The site's records and those of the included canaries.

    Args:
        included: bool[canary units].
    """
    units = unit_of_each(canaries)
    kept = np.flatnonzero(included[units])
    joined = records.units
    if joined:
        # Units have every number up to the last one used.
        numbers = max(joined) + np.cumsum(included)
        joined += tuple(int(numbers[units[index]]) for index in kept)
    return msgspec.structs.replace(
        records,
        records=records.records + tuple(canaries.records[index] for index in kept),
        units=joined,
    )
