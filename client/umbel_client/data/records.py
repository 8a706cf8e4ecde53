"""A site's own records, from its own file, checked row by row.

Error texts name the row, not its text; they are for the site's own log and never leave it.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack, overload

import msgspec

from umbel_client.data.conversations import LmRecord, read_conversations
from umbel_client.data.rows import Row, Table
from umbel_client.data.tables import read_table, require_columns
from umbel_client.site.config import DataConfig
from umbel_common.canonical import Digest, Value, digest
from umbel_common.errors import DataError
from umbel_common.plans.alike import plain, seen, shown, told
from umbel_common.plans.figures import Format
from umbel_common.plans.plan import CausalLm, Classification, Task

_NO_NAMES = frozenset({"", "nan", "none", "null", "n/a", "na", "<na>", "#n/a", "nat"})
"""What other programs write where a unit is missing, in lower case; it would be one unit of all."""
LONGEST_LABEL = 200
"""Characters of the longest label that is shown."""
_SHOWN = 10
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of characters that are not seen: control, format, halves of others, separators."""


class Record(Value, frozen=True):
    """One example of a classification."""

    text: str
    label: int
    """Index into the plan's labels."""


class DataSet(Value, frozen=True, kw_only=True):
    """What is known of a site's data set, whatever kind its records are."""

    source: Digest
    """SHA-256 of the file."""
    path: str = ""
    """The file's path, for errors."""
    rows: tuple[int, ...] = ()
    """The row of each record in the file, from 1."""
    units: tuple[int, ...] = ()
    """The unit (patient) of each record, numbered from 0 in the order of the file; empty: each
    record is its own unit."""
    unit_names: tuple[str, ...] = ()
    """The name of each unit in the file."""
    unit_column: str | None = None
    """The column that names the units; None: each record is its own unit."""
    records: tuple[Any, ...]
    """The records, in the order of the file."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def unit_count(self) -> int:
        """Number of units."""
        return len(self) if self.unit_column is None else len(self.unit_names)

    def row(self, index: int) -> int:
        """The row of a record in the file, from 1."""
        return self.rows[index] if self.rows else index + 1

    def only(self, kept: Sequence[int]) -> Self:
        """The data set with these records alone, and with the units that they belong to.

        Args:
            kept: indices of records, in rising order.
        """
        numbers: dict[int, int] = {}
        units = [self.units[index] for index in kept] if self.units else []
        for unit in units:
            numbers.setdefault(unit, len(numbers))
        return msgspec.structs.replace(
            self,
            records=tuple(self.records[index] for index in kept),
            rows=tuple(self.rows[index] for index in kept) if self.rows else (),
            units=tuple(numbers[unit] for unit in units),
            unit_names=tuple(self.unit_names[unit] for unit in numbers),
        )

    def digest(self) -> bytes:
        """The name of the data set, and so of its privacy ledger, 32 bytes.

        It covers the file and nothing of the plan: a plan that renames a column or reorders the
        labels must not open a fresh ledger on the same records. It covers what a unit is: a cost
        that was charged by the record says nothing about patients, so the two share no ledger.
        """
        if self.unit_column is None:
            return self.source
        return digest("units", self.source, self.unit_column.encode())


class Records(DataSet, frozen=True, kw_only=True):
    """Texts and their labels."""

    records: tuple[Record, ...]

    @property
    def texts(self) -> list[str]:
        """The texts, in the order of the file."""
        return [record.text for record in self.records]

    @property
    def labels(self) -> list[int]:
        """The label indices, in the order of the file."""
        return [record.label for record in self.records]


class LmRecords(DataSet, frozen=True, kw_only=True):
    """Conversations or passages that a language model learns from."""

    records: tuple[LmRecord, ...]


Misfit = Callable[[DataError], None]
"""Called with what is wrong with a record that does not fit a plan; the record is left out."""


def refuse(misfit: DataError) -> None:
    """The `Misfit` of a caller that takes all records or none.

    Raises:
        DataError: `misfit`.
    """
    raise misfit


class Columns(TypedDict, total=False):
    """Where in a file the records are.

    Columns are the site's own choice: a plan that could name them could ask about any of them.
    """

    text_column: str
    label_column: str
    record_format: Format
    """The format of a causal language model's records; `auto`: what the columns say."""
    unit_column: str | None
    """The column that names each record's unit; None: each record is its own unit."""
    max_records_per_unit: int
    """Number of records of a unit that are used, in the order of the file; the others are left out.
    This depends on the unit's own records alone, so it costs no privacy."""


def columns_of(config: DataConfig) -> Columns:
    """The columns that client.toml names."""
    return {
        "text_column": config.text_column,
        "label_column": config.label_column,
        "record_format": config.format,
        "unit_column": config.unit_column,
        "max_records_per_unit": config.max_records_per_unit,
    }


@overload
def load_records(path: Path, task: Classification, **columns: Unpack[Columns]) -> Records: ...


@overload
def load_records(path: Path, task: CausalLm, **columns: Unpack[Columns]) -> LmRecords: ...


@overload
def load_records(path: Path, task: Task, **columns: Unpack[Columns]) -> Records | LmRecords: ...


def load_records(path: Path, task: Task, **columns: Unpack[Columns]) -> Records | LmRecords:
    """Reads every row of a file; other columns than those needed are ignored.

    Raises:
        DataError: the file is missing, malformed, empty or of another kind; a column is missing; a
            row has no text or no answer, no unit, or a label that the plan does not have.
    """
    return records_of(path, read_table(path), task, **columns)


def records_of(
    path: Path, table: Table, task: Task, **columns: Unpack[Columns]
) -> Records | LmRecords:
    """The records of a file's rows; see `load_records`.

    Args:
        path: the file's, for errors.

    Raises:
        DataError: as `load_records`.
    """
    unit_column = columns.get("unit_column")
    units = _units(path, table, unit_column)
    kept = _first_of_each(units, columns.get("max_records_per_unit", 32))
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    common: dict[str, Any] = {
        "source": table.source,
        "path": str(path),
        "rows": tuple(table.numbers[row] for row in kept),
        "units": () if unit_column is None else tuple(numbers[units[row]] for row in kept),
        "unit_names": () if unit_column is None else tuple(numbers),
        "unit_column": unit_column,
    }
    if isinstance(task, Classification):
        labelled = _labelled(
            path,
            table,
            task,
            columns.get("text_column", "text"),
            columns.get("label_column", "label"),
        )
        return Records(records=tuple(labelled[row] for row in kept), **common)
    read = read_conversations(path, table, task, columns.get("record_format", "auto"))
    return LmRecords(records=tuple(read[row] for row in kept), **common)


def _labelled(
    path: Path, table: Table, task: Classification, text_column: str, label_column: str
) -> list[Record]:
    require_columns(path, table, text_column, label_column)
    index_of = {label: index for index, label in enumerate(task.labels)}
    records = []
    for number, row in table.numbered():
        text = _text(path, text_column, number, row.get(text_column))
        name = label_of(row.get(label_column))
        if name is None or name not in index_of:
            value = row.get(label_column)
            raise _unknown_label(path, label_column, number, value, table, task.labels)
        records.append(Record(text=text, label=index_of[name]))
    return records


def _units(path: Path, table: Table, column: str | None) -> list[str]:
    """The unit of each row, from the column; without one each row is its own unit."""
    if column is None:
        return [str(number) for number in range(len(table.rows))]
    require_columns(path, table, column)
    return [_unit(path, column, number, row.get(column)) for number, row in table.numbered()]


def _first_of_each(units: list[str], most: int) -> list[int]:
    """Row indices of the first `most` records of each unit."""
    seen: Counter[str] = Counter()
    kept = []
    for row, unit in enumerate(units):
        seen[unit] += 1
        if seen[unit] <= most:
            kept.append(row)
    return kept


def _unit(path: Path, column: str, row: int, unit: object) -> str:
    """The name of a row's unit, so that two ways to write one name are one unit."""
    found: object = type(unit).__name__
    if isinstance(unit, str):
        name = unicodedata.normalize("NFC", unit).strip()
        hidden = next((sign for sign in name if unicodedata.category(sign) in _HIDDEN), None)
        found = "an empty text" if not name else "a text that stands for no value"
        if hidden is not None:
            found = f"the character U+{ord(hidden):04X}, which nobody sees"
        elif name.casefold() not in _NO_NAMES:
            return name
    elif isinstance(unit, int) and not isinstance(unit, bool):
        return str(unit)
    raise DataError(
        f"row {row} does not say whose record it is",
        file=path,
        field=f"{column}, row {row}",
        found=found,
        accepted="a text or a whole number; no empty text, nan, none, null or n/a, and no"
        " characters without a shape",
        remedy="give each row the number of its person; two numbers of one person count as two",
    )


def _text(path: Path, column: str, row: int, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        found = type(text).__name__ if not isinstance(text, str) else "an empty text"
        raise DataError(
            f"row {row} has no text",
            file=path,
            field=f"{column}, row {row}",
            found=found,
            accepted="a text that is not empty",
        )
    return text


def label_of(value: object) -> str | None:
    """A label as a plan writes it; None if the value cannot be a label.

    Codes such as 0 and 1 are numbers in JSON and Parquet, and texts in a plan.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def require_label(path: Path, column: str, number: int, row: Row) -> str:
    """The label of a row where no plan says which labels there are.

    Raises:
        DataError: its value cannot be a label.
    """
    value = row.get(column)
    label = label_of(value)
    if label is None or not seen(label) or len(label) > LONGEST_LABEL:
        raise DataError(
            f"row {number} has no label",
            file=path,
            field=f"{column}, row {number}",
            found=_value_text(value) if label is None else _length_text(label),
            accepted=f"a whole number, or a text of 1 to {LONGEST_LABEL} characters",
            remedy=_LABEL_REMEDIES.get(type(value)),
        )
    return label


_LABEL_REMEDIES: dict[type, str] = {
    float: "write 1 for 1.0: pandas makes such numbers where a row has no label",
    bool: "write names or numbers, such as yes and no, or 1 and 0",
    list: "give each record one label",
}


def _value_text(value: object) -> str:
    """A value that cannot be a label, as it is shown."""
    kind = type(value).__name__
    return f"{kind}: {value}" if isinstance(value, bool | float) else kind


def _length_text(label: str) -> str:
    return f"{len(label)} characters" if seen(label) else "an empty text"


def label_text(label: str | None) -> str:
    """A label as it is shown; a long one is a text from a wrong column, and is not."""
    if label is None:
        return "no label"
    return shown(label) if len(label) <= LONGEST_LABEL else f"{len(label)} characters"


def label_counts(table: Table, column: str) -> Counter[str | None]:
    """Number of rows with each label; None: rows whose value cannot be a label."""
    counts = Counter[str | None]()
    for row in table.rows:
        try:
            counts[label_of(row.get(column))] += 1
        except DataError:
            counts[None] += 1
    return counts


def counts_text(counts: Mapping[str | None, int]) -> str:
    """The commonest labels, each with its number of rows."""
    most = Counter(counts).most_common()
    more = f" and {len(most) - _SHOWN} more" if len(most) > _SHOWN else ""
    return ", ".join(f"{label_text(label)} {count:,}" for label, count in most[:_SHOWN]) + more


def _unknown_label(
    path: Path, column: str, row: int, value: object, table: Table, labels: Sequence[str]
) -> DataError:
    """What is wrong with a row's label, and how many rows have a label that the plan lacks."""
    name = label_of(value)
    unknown = {label: n for label, n in label_counts(table, column).items() if label not in labels}
    near = [label for label in labels if name is not None and plain(label) == plain(name)]
    alike = f"{told([(near[0], name)])[0]}. " if near and name is not None else ""
    if type(value) in _LABEL_REMEDIES:
        alike = f"{_LABEL_REMEDIES[type(value)]}. "
    return DataError(
        f"row {row} has a label that the plan does not have",
        file=path,
        field=f"{column}, row {row}",
        found=repr(value) if name is None else label_text(name),
        accepted=", ".join(labels),
        remedy=f"{alike}labels of rows that the plan lacks: {counts_text(unknown)}."
        " Correct them, or agree on a plan that has them",
    )
