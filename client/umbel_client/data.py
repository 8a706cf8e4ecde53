"""A site's own records: JSON lines, CSV or Parquet, through Hugging Face `datasets` and no network.

Error texts name the row, not its text; they are for the site's own log and never leave it.
"""

import csv
import hashlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from umbel_common.canonical import Digest, Value, digest
from umbel_common.errors import DataError
from umbel_common.plan import Classification


class Record(Value, frozen=True):
    """One example."""

    text: str
    label: int
    """Index into the plan's labels."""


class Records(Value, frozen=True):
    """A site's data set."""

    records: tuple[Record, ...]
    source: Digest
    """SHA-256 of the file."""
    units: tuple[int, ...] = ()
    """The unit (patient) of each record, numbered from 0 in the order of the file; empty: each
    record is its own."""
    unit_column: str | None = None
    """Where units come from."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def texts(self) -> list[str]:
        """In the order of the file."""
        return [record.text for record in self.records]

    @property
    def labels(self) -> list[int]:
        """In the order of the file."""
        return [record.label for record in self.records]

    def digest(self) -> bytes:
        """Names the data set, and so its privacy ledger.

        It covers the file and nothing of the plan: a plan that renames a column or reorders the
        labels must not open a fresh ledger on the same records. It covers what a unit is: what was
        charged by the record says nothing about patients, so the two do not share a ledger.
        """
        if self.unit_column is None:
            return self.source
        return digest("units", self.source, self.unit_column.encode())


def load_records(
    path: Path,
    task: Classification,
    *,
    text_column: str = "text",
    label_column: str = "label",
    unit_column: str | None = None,
    max_records_per_unit: int = 32,
    scratch: Path | None = None,
) -> Records:
    """Reads every row of a .jsonl, .csv or .parquet file; other columns are ignored.

    Columns are the site's own choice: a plan that could name them could ask about any of them.

    Args:
        unit_column: says whose a record is; None: each record is its own unit.
        max_records_per_unit: records of a unit past so many, in the order of the file, are left
            out. That depends on this unit's records alone, so it costs no privacy.
        scratch: a folder as private as the file, where what the reader has to write lies meanwhile;
            None: the file's own, which must then be writable.

    Raises:
        DataError: the file is missing, malformed, empty or of another kind; a column is missing; a
            row has no text, no unit, or a label that the plan does not have.
    """
    if not path.is_file():
        raise DataError("the data file does not exist", file=path)
    table = _read(path, path.parent if scratch is None else scratch)
    for column in (text_column, label_column, unit_column):
        if column is not None and column not in table.column_names:
            raise DataError(
                "a column is missing",
                file=path,
                field=column,
                found=", ".join(table.column_names),
                remedy="rename a column of the file, or set data.text_column, data.label_column or "
                "data.unit_column",
            )
    index_of = {label: index for index, label in enumerate(task.labels)}
    pairs = zip(table[text_column], table[label_column], strict=True)
    records = tuple(
        Record(
            text=_text(path, text_column, row, text),
            label=_label(path, label_column, row, label, index_of),
        )
        for row, (text, label) in enumerate(pairs, start=1)
    )
    if not records:
        raise DataError("the data file holds no record", file=path)
    with path.open("rb") as file:
        source = hashlib.file_digest(file, "sha256").digest()
    if unit_column is None:
        return Records(records=records, source=source)
    units = [_unit(path, unit_column, row, unit) for row, unit in enumerate(table[unit_column], 1)]
    kept = _first_of_each(units, max_records_per_unit)
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    return Records(
        records=tuple(records[row] for row in kept),
        source=source,
        units=tuple(numbers[units[row]] for row in kept),
        unit_column=unit_column,
    )


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
    known = (isinstance(unit, str) and unit.strip()) or isinstance(unit, int)
    if not known or isinstance(unit, bool):
        raise DataError(
            f"row {row} does not say whose record it is",
            file=path,
            field=f"{column}, row {row}",
            found=type(unit).__name__ if not isinstance(unit, str) else "an empty text",
            accepted="a text or a whole number",
        )
    return str(unit).strip()


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


def _label(path: Path, column: str, row: int, label: object, index_of: dict[str, int]) -> int:
    # Codes such as 0 and 1 are numbers in JSON and Parquet, and texts in a plan.
    name = str(label) if isinstance(label, int) and not isinstance(label, bool) else label
    if not isinstance(name, str) or name not in index_of:
        raise DataError(
            f"row {row} has a label that the plan does not have",
            file=path,
            field=f"{column}, row {row}",
            found=repr(label),
            accepted=", ".join(index_of),
        )
    return index_of[name]


def _read(path: Path, scratch: Path) -> datasets.Dataset:
    readers: dict[str, Any] = {
        ".jsonl": datasets.Dataset.from_json,
        ".csv": datasets.Dataset.from_csv,
        ".parquet": datasets.Dataset.from_parquet,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(
            "the data file is of an unknown kind",
            file=path,
            found=path.suffix or "no suffix",
            accepted=", ".join(readers),
        )
    if path.stat().st_size == 0:
        raise DataError("the data file holds no record", file=path)
    datasets.disable_progress_bars()
    try:
        options = _csv_options(path) if path.suffix == ".csv" else {}
        # Private data must leave no copy elsewhere, not even if this process is killed here.
        with tempfile.TemporaryDirectory(prefix=".umbel-", dir=scratch) as cache:
            return reader(str(path), cache_dir=cache, keep_in_memory=True, **options)
    except (DatasetsError, csv.Error, ValueError, TypeError, OSError) as error:
        cause = error.__cause__ or error
        reason = cause.strerror if isinstance(cause, OSError) else None
        raise DataError(
            "the data file cannot be read", file=path, found=reason or type(cause).__name__
        ) from None


def _csv_options(path: Path) -> dict[str, Any]:
    """Every column is text: left to itself the reader makes numbers of codes, and nothing of NA."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    columns = {name: datasets.Value("string") for name in header}
    return {"features": datasets.Features(columns), "keep_default_na": False}
