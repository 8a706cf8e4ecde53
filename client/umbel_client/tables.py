"""Rows of a file of records, whatever its kind: JSON lines, CSV, Parquet, or a data set's folder.

Every kind is held to the same strictness, and what is wrong is named by its row. JSON lines and CSV
are read as they are; Parquet and folders that `save_to_disk` of Hugging Face `datasets` wrote go
through that library, with no network.
"""

import csv
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import msgspec
from datasets.exceptions import DatasetsError

from umbel_common.canonical import Digest
from umbel_common.errors import DataError
from umbel_host.process import reason

KINDS = (".jsonl", ".csv", ".parquet", "a folder that save_to_disk wrote")
"""What can be read."""

Row = Mapping[str, object]
"""A row's values by column; in a CSV file all are texts. JSON lines may leave columns out."""


@dataclass(frozen=True)
class Table:
    """All rows of a file."""

    columns: tuple[str, ...]
    """Those that occur, in the order of their first appearance."""
    rows: Sequence[Row]
    """In the order of the file; people count them from 1, without a header."""
    source: Digest
    """SHA-256 of the file; of a folder, over its Arrow files in their order."""


def require_file(path: Path) -> None:
    """Finds out whether data can be read, without reading them.

    Raises:
        DataError: they are missing or unreadable.
    """
    try:
        if path.is_dir():
            os.listdir(path)
        else:
            path.open("rb").close()
    except FileNotFoundError:
        raise DataError("the data file does not exist", file=path) from None
    except OSError as error:
        raise DataError(
            "the data file cannot be read",
            file=path,
            found=reason(error),
            remedy="let the trainer's user read it, and nobody else",
        ) from None


def read_table(path: Path) -> Table:
    """Reads every row of a file.

    Raises:
        DataError: the file is missing, unreadable, of another kind, malformed, not UTF-8, or
            empty.
    """
    require_file(path)
    if path.is_dir():
        rows = _folder(path)
    elif path.suffix in KINDS and path.stat().st_size == 0:
        rows = []
    elif path.suffix == ".jsonl":
        rows = _json_lines(path)
    elif path.suffix == ".csv":
        rows = _csv(path)
    elif path.suffix == ".parquet":
        rows = _parquet(path)
    else:
        raise DataError(
            "the data file is of an unknown kind",
            file=path,
            found=path.suffix or "no suffix",
            accepted=", ".join(KINDS),
        )
    if not rows:
        raise DataError("the data file holds no record", file=path)
    columns = dict.fromkeys(column for row in rows for column in row)
    return Table(tuple(columns), rows, _source(path))


def _json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            _text(path, line, number)
            try:
                row = msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                raise _malformed(path, number, str(error)) from None
            if not isinstance(row, dict):
                raise _malformed(path, number, f"{type(row).__name__}, not an object")
            rows.append(row)
    return rows


def _csv(path: Path) -> list[Row]:
    """Every value is a text: a reader that guesses makes numbers of codes, and nothing of NA."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    # Clinical notes are longer than the 128 KiB that a field may have by default.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_text(path, data, 1), newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError("a data file names a column twice", file=path, found=", ".join(header))
        for values in reader:
            if len(values) != len(header):
                raise _malformed(
                    path, len(rows) + 1, f"{len(values)} fields under {len(header)} columns"
                )
            rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise _malformed(path, len(rows) + 1, str(error)) from None
    return rows


def _text(path: Path, data: bytes, first_line: int) -> str:
    """Decodes UTF-8; names the line of the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise DataError(
            f"line {line} is not UTF-8",
            file=path,
            field=f"line {line}",
            found=f"byte 0x{data[error.start]:02x}",
            accepted="UTF-8",
            remedy="convert the file, for example with iconv",
        ) from None


def _parquet(path: Path) -> list[Row]:
    datasets.disable_progress_bars()
    try:
        # Private data must leave no copy elsewhere, not even if this process is killed here.
        with tempfile.TemporaryDirectory(prefix=".umbel-", dir=path.parent) as cache:
            return _rows(
                path,
                datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True),
            )
    except (DatasetsError, ValueError, TypeError, OSError) as error:
        raise _unreadable(path, error) from None


def _folder(path: Path) -> list[Row]:
    try:
        found = datasets.load_from_disk(str(path), keep_in_memory=True)
    except (DatasetsError, ValueError, TypeError, OSError, KeyError) as error:
        raise _unreadable(path, error) from None
    if isinstance(found, datasets.DatasetDict):
        raise DataError(
            "a folder holds several data sets",
            file=path,
            found=", ".join(map(str, found)),
            accepted="the folder of one of them",
        )
    return _rows(path, found)


def _rows(path: Path, data: datasets.Dataset) -> list[Row]:
    rows: list[Row] = []
    for number in range(1, len(data) + 1):
        try:
            rows.append(data[number - 1])
        except UnicodeDecodeError as error:
            raise DataError(
                f"row {number} is not UTF-8",
                file=path,
                field=f"row {number}",
                found=f"byte 0x{error.object[error.start]:02x}",
                accepted="UTF-8",
            ) from None
    return rows


def _source(path: Path) -> bytes:
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    combined = hashlib.sha256()
    for part in sorted(path.glob("*.arrow")):
        with part.open("rb") as file:
            combined.update(hashlib.file_digest(file, "sha256").digest())
    return combined.digest()


def _malformed(path: Path, row: int, found: str) -> DataError:
    return DataError(f"row {row} cannot be read", file=path, field=f"row {row}", found=found)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        "the data file cannot be read", file=path, found=type(error.__cause__ or error).__name__
    )
