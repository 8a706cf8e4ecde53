"""The data of an audit: a site's records and the canaries, with records or patients as the unit.

The two kinds of audit differ in the records' units only. All later steps take records with their
units, as a site's own training does.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from umbel_client.data.conversations import Conversation, LmRecord, Passage, Turn
from umbel_client.data.records import LmRecords, Record, Records, load_records
from umbel_common.plans.plan import Classification, Task, TrainingPlan
from umbel_simulations.inputs.partition import site_rows
from umbel_simulations.inputs.sources import Example
from umbel_simulations.scenario.run_folder import write

AnyRecords = Records | LmRecords

Unit = Literal["record", "patient"]
"""What the privacy claim is about. `patient` is also the name of the site's `data.unit_column`."""

RECORDS_OF_A_PATIENT = 10
"""The more records, the further one patient moves a sum in which single records are clipped."""
WORDS = 3
"""Words in a canary's text. The fewer they are, the less two canaries resemble each other."""


def site_records(examples: Sequence[Example], task: Task, unit: Unit) -> AnyRecords:
    """The records as the site itself reads them from its file.

    Few scenarios name the patient of a record; this function makes patients up for all of them.
    Each has `RECORDS_OF_A_PATIENT` consecutive records, and the last patient has the rest.
    """
    rows = [
        {**row, "patient": number // RECORDS_OF_A_PATIENT}
        for number, row in enumerate(site_rows(examples))
    ]
    with TemporaryDirectory(prefix="umbel-audit-") as folder:
        path = Path(folder) / "data.jsonl"
        write(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        return load_records(path, task, unit_column=None if unit == "record" else unit)


def records_of_a_unit(unit: Unit) -> int:
    """Number of records in a complete unit; a canary is one too."""
    return 1 if unit == "record" else RECORDS_OF_A_PATIENT


def unit_of_each(records: AnyRecords) -> npt.NDArray[np.int64]:
    """The unit of each record: int64[records], numbered from 0."""
    return np.array(records.units or range(len(records)), dtype=np.int64)


def unit_count(records: AnyRecords) -> int:
    """How many units the records belong to."""
    return int(unit_of_each(records).max()) + 1


def first_units(records: AnyRecords, most: int) -> AnyRecords:
    """The first units, each with all its records: `most` records at most, but at least one unit.

    Without some of its records, a unit would have another gradient.
    """
    units = unit_of_each(records)
    count = max(1, int(np.searchsorted(np.cumsum(np.bincount(units)), most, side="right")))
    kept = np.flatnonzero(units < count)
    return msgspec.structs.replace(
        records,
        records=tuple(records.records[index] for index in kept),
        rows=(),
        units=tuple(records.units[index] for index in kept) if records.units else (),
    )


def make_canaries(records: AnyRecords, plan: TrainingPlan, count: int, seed: int) -> AnyRecords:
    """Makes `count` units, each with copies of one record: random words from the site's texts under
    a random label, or as question and answer.

    No model fits these records. So their gradients stay far longer than the clip norm and are
    nearly orthogonal: canaries come close to the worst case. The gradients of copies point in one
    direction, so an error that clips each copy, and not their mean, shows at full length.
    """
    generator = np.random.default_rng(seed)
    words = sorted({word for text in _texts(records) for word in text.split()})
    copies = RECORDS_OF_A_PATIENT if records.units else 1
    of_passages = isinstance(records.records[0], Passage)

    def made_up() -> str:
        return " ".join(generator.choice(words, WORDS))

    def canary() -> Record | LmRecord:
        text = made_up()
        if isinstance(plan.task, Classification):
            return Record(text=text, label=int(generator.integers(len(plan.task.labels))))
        if of_passages:
            return Passage(text=text)
        return Conversation((Turn("user", text), Turn("assistant", made_up())))

    made = [canary() for _ in range(count)]
    return msgspec.structs.replace(
        records,
        records=tuple(record for record in made for _ in range(copies)),
        rows=(),
        units=tuple(number for number in range(count) for _ in range(copies))
        if records.units
        else (),
    )


def _texts(records: AnyRecords) -> list[str]:
    """Every text of some records."""
    if isinstance(records, Records):
        return records.texts
    return [
        text
        for record in records.records
        for text in (
            [turn.content for turn in record.turns]
            if isinstance(record, Conversation)
            else [record.text]
        )
    ]


def with_included(
    records: AnyRecords, canaries: AnyRecords, included: npt.NDArray[np.bool_]
) -> AnyRecords:
    """The site's records and those of the included canaries.

    Args:
        included: bool[canary units].
    """
    units = unit_of_each(canaries)
    kept = np.flatnonzero(included[units])
    joined = records.units
    if joined:
        # Unit numbers have no gaps.
        numbers = max(joined) + np.cumsum(included)
        joined += tuple(int(numbers[units[index]]) for index in kept)
    return msgspec.structs.replace(
        records,
        records=records.records + tuple(canaries.records[index] for index in kept),
        rows=(),
        units=joined,
    )
