"""A file of records as its owner looks at it, before any plan: its task, and its repeated records.

Where no plan names the task, the file's columns do. With a column of texts and one of labels it is
a classification. Else its columns are those of a format of `umbel_client.data.conversations`.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from umbel_client.data.conversations import Conversation, LmRecord, format_of
from umbel_client.data.records import Columns, LmRecords, Records, columns_of, label_of, records_of
from umbel_client.data.tables import Table, read_table
from umbel_client.site.config import DataConfig
from umbel_common.errors import DataError
from umbel_common.plans.plan import CausalLm, Classification, Task

T = TypeVar("T")

Key: TypeAlias = tuple[str, ...]
"""Two records are the same if their keys are equal."""

_EVERY_RECORD = 1_000_000
"""A number of records that no unit reaches, so that none is left out."""
_LONGEST_LABEL = 200
"""Characters of the longest label. Labels are shown; a longer one is a text from a wrong column."""


@dataclass(frozen=True)
class Examples:
    """All records of a file."""

    path: Path
    table: Table
    task: Task
    """The plan's task; without a plan, one that takes every record that the file may hold."""
    format: str
    """`classification`, or one of `Format`."""
    records: Records | LmRecords

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> list[str] | None:
        """The label of each record; None: a language model's records have none."""
        if not isinstance(self.records, Records) or not isinstance(self.task, Classification):
            return None
        return [self.task.labels[record.label] for record in self.records.records]

    @property
    def units(self) -> list[int]:
        """The unit of each record, from 0 in the order of the file."""
        return list(self.records.units) or list(range(len(self)))

    @property
    def keys(self) -> list[Key]:
        """The key of each record; the spaces between its words do not count.

        In a classification the text alone is the key, without the label. Else a text with two
        labels could be in two parts of a split, and a test would ask what training has shown.
        """
        if isinstance(self.records, Records):
            return [(_plain(text),) for text in self.records.texts]
        return [_key(record) for record in self.records.records]


def _key(record: LmRecord) -> Key:
    if not isinstance(record, Conversation):
        return (_plain(record.text),)
    return tuple(part for turn in record.turns for part in (turn.role, _plain(turn.content)))


def _plain(text: str) -> str:
    return " ".join(text.split())


def read_examples(
    path: Path, data: DataConfig, task: Task | None, labels: Sequence[str] = ()
) -> Examples:
    """Reads every record of a file, also those beyond `data.max_records_per_unit`.

    Args:
        data: where in the file the records are; its own `path` is not used.
        task: a plan's; None: the task that the file's columns say.
        labels: the labels that may occur where no plan names them; empty: any.

    Raises:
        DataError: the file cannot be read, or a row has no record that the task can use.
    """
    table = read_table(path)
    task, found, columns = _understood(path, table, data, task, labels)
    return Examples(
        path=path,
        table=table,
        task=task,
        format=found,
        records=records_of(path, table, task, **columns),
    )


def row_errors(
    path: Path, data: DataConfig, task: Task | None, labels: Sequence[str] = ()
) -> Iterator[DataError]:
    """Yields what is wrong with each row; for the arguments see `read_examples`.

    Raises:
        DataError: the file cannot be read at all, or lacks a column, or it is not clear what its
            columns are.
    """
    table = read_table(path)
    task, _, columns = _understood(path, table, data, task, labels)
    # First without any row: an error here is not one of a row.
    records_of(path, Table(table.columns, [], table.source), task, **columns)
    for number, row in enumerate(table.rows, start=1):
        try:
            records_of(path, Table(table.columns, [row], table.source, number), task, **columns)
        except DataError as error:
            yield error


def _understood(
    path: Path, table: Table, data: DataConfig, task: Task | None, labels: Sequence[str]
) -> tuple[Task, str, Columns]:
    """How a file is read: the task, the name of its format, and where the records are."""
    columns = columns_of(data)
    columns["max_records_per_unit"] = _EVERY_RECORD
    if task is None:
        task = CausalLm(loss_on="all")
        if data.format == "auto" and {data.text_column, data.label_column} <= set(table.columns):
            task = Classification(
                labels=tuple(labels) or _labels_of(path, table, data.label_column)
            )
    if isinstance(task, Classification):
        return task, "classification", columns
    chosen = format_of(path, table) if data.format == "auto" else data.format
    columns["record_format"] = chosen
    return task, chosen, columns


def _labels_of(path: Path, table: Table, column: str) -> tuple[str, ...]:
    """All labels of a file, in alphabetical order."""
    found = set()
    for number, row in enumerate(table.rows, start=1):
        label = label_of(row.get(column))
        if label is None or not label.strip() or len(label) > _LONGEST_LABEL:
            raise DataError(
                f"row {number} has no label",
                file=path,
                field=f"{column}, row {number}",
                found=type(row.get(column)).__name__
                if label is None
                else f"{len(label)} characters",
                accepted=f"a whole number, or a text of 1 to {_LONGEST_LABEL} characters",
            )
        found.add(label)
    if len(found) < 2:
        raise DataError(
            "a data file has one label only: there is nothing to tell apart",
            file=path,
            field=column,
            found=", ".join(found),
            accepted="at least two labels",
        )
    return tuple(sorted(found))


Group: TypeAlias = list[int]
"""Indices of records in rising order."""


def repeated(keys: Sequence[Hashable]) -> list[Group]:
    """The records that occur more than once: a group for each key, in the order of the file.

    Args:
        keys: the key of each record.
    """
    groups: dict[Hashable, Group] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [group for group in groups.values() if len(group) > 1]
