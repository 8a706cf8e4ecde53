"""A file of records as its owner looks at it, before any plan: its task, and its repeated records.

Where no plan names the task, the file's columns do. With a column of texts and one of labels it is
a classification. Else its columns are those of a format of `umbel_client.data.conversations`.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from umbel_client.data.conversations import Conversation, LmRecord, format_of
from umbel_client.data.records import (
    Columns,
    LmRecords,
    Records,
    columns_of,
    label_text,
    records_of,
    require_label,
)
from umbel_client.data.rows import Table
from umbel_client.data.tables import columns_text, near_columns, read_table, require_columns
from umbel_client.site.config import DataConfig
from umbel_common.errors import DataError
from umbel_common.plans.alike import folded, seen, shown
from umbel_common.plans.plan import CausalLm, Classification, Task

T = TypeVar("T")

Key: TypeAlias = tuple[str, ...]
"""Two records are the same if their keys are equal."""

Group: TypeAlias = list[int]
"""Indices of records in rising order."""

_EVERY_RECORD = 1_000_000
"""A number of records that no unit reaches, so that none is left out."""


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
        """The key of each record. The spaces between its words do not count, nor how its accents
        are composed, nor characters that nobody sees.

        In a classification the text alone is the key, without the label. Else a text with two
        labels could be in two parts of a split, and a test would ask what training has shown.
        """
        if isinstance(self.records, Records):
            return [(seen(text),) for text in self.records.texts]
        return [_key(record) for record in self.records.records]


def label_remark(examples: Examples, data: DataConfig) -> str | None:
    """What the owner of texts without labels should know, if the file has other columns too."""
    columns = examples.table.columns
    others = [name for name in columns if name not in ("text", data.unit_column)]
    if examples.format != "text" or not others or data.format != "auto":
        return None
    near = near_columns(data.label_column, columns)
    come = "comes near it: rename it" if len(near) == 1 else "come near it: rename one of them"
    which = f"{' and '.join(map(shown, near))} {come}" if near else "to use another, rename it"
    return (
        f"no column `{data.label_column}`: found {columns_text(columns)}; read as whole texts;"
        f" {which}, or set data.label_column in client.toml"
    )


def _key(record: LmRecord) -> Key:
    if not isinstance(record, Conversation):
        return (seen(record.text),)
    return tuple(part for turn in record.turns for part in (turn.role, seen(turn.content)))


def alike_records(keys: Sequence[Key]) -> Group:
    """The records that differ from an earlier one only in case, width, or the form of characters:
    to people they are the same."""
    first: dict[Key, Key] = {}
    return [
        index
        for index, key in enumerate(keys)
        if first.setdefault(tuple(map(folded, key)), key) != key
    ]


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
    unparsed: dict[int, DataError] = {}
    table = read_table(path, unparsed.__setitem__)
    if not table.rows:
        yield from unparsed.values()
        return
    any_label = task is None and not labels
    try:
        task, _, columns = _understood(path, table, data, task, labels, strict=False)
    except DataError:
        # What the columns are cannot be said of a file with rows that are of several formats.
        yield from unparsed.values()
        raise
    # First without any row: an error here is not one of a row.
    records_of(path, table.empty(), task, **columns)
    wrong = dict(unparsed)
    for index, (number, row) in enumerate(table.numbered()):
        try:
            if any_label and isinstance(task, Classification):
                require_label(path, data.label_column, number, row)
            records_of(path, table.alone(index), task, **columns)
        except DataError as error:
            wrong[number] = error
    for number in sorted(wrong):
        yield wrong[number]


def _understood(
    path: Path,
    table: Table,
    data: DataConfig,
    task: Task | None,
    labels: Sequence[str],
    *,
    strict: bool = True,
) -> tuple[Task, str, Columns]:
    """How a file is read: the task, the name of its format, and where the records are.

    Args:
        strict: rows without a label are errors, and so is a file with one label only.
    """
    columns = columns_of(data)
    columns["max_records_per_unit"] = _EVERY_RECORD
    if task is None:
        task = CausalLm(loss_on="all")
        if data.format == "auto" and {data.text_column, data.label_column} <= set(table.columns):
            require_columns(path, table, data.text_column, data.label_column)
            task = Classification(
                labels=tuple(labels) or _labels_of(path, table, data.label_column, strict=strict)
            )
    if isinstance(task, Classification):
        return task, "classification", columns
    chosen = format_of(path, table, strict=strict) if data.format == "auto" else data.format
    columns["record_format"] = chosen
    return task, chosen, columns


def _labels_of(path: Path, table: Table, column: str, *, strict: bool) -> tuple[str, ...]:
    """All labels of a file, in alphabetical order."""
    found = set()
    for number, row in table.numbered():
        try:
            found.add(require_label(path, column, number, row))
        except DataError:
            if strict:
                raise
    if len(found) < 2 and strict:
        raise DataError(
            "a data file has one label only: there is nothing to tell apart",
            file=path,
            field=column,
            found=", ".join(map(label_text, found)),
            accepted="at least two labels",
            remedy="where the other labels are at other sites, name all of them: labels ="
            ' ["...", "..."] in [policy] of client.toml (umbel-client init writes one)',
        )
    # A task has two labels at least, and the rows are looked at one by one.
    return tuple(sorted(found)) if len(found) > 1 else (*found, "", " ")[:2]


def repeated(keys: Sequence[Hashable]) -> list[Group]:
    """The records that occur more than once: a group for each key, in the order of the file.

    Args:
        keys: the key of each record.
    """
    groups: dict[Hashable, Group] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [group for group in groups.values() if len(group) > 1]
