"""Rows of a file of records, whatever its kind: JSON lines, CSV, Parquet, or a data set's folder.

Every kind is checked equally strictly, and errors name the row. Reading leaves no copy of private
data anywhere, not even for a moment: its folder need not be writable. Folders that `save_to_disk`
of Hugging Face `datasets` wrote go through that library, without network.
"""

import csv
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from umbel_common.canonical import Digest
from umbel_common.errors import DataError
from umbel_host.processes.lifecycle import reason

KINDS = (".jsonl", ".csv", ".parquet", "a folder that save_to_disk wrote")
"""The kinds that can be read."""

Row = Mapping[str, object]
"""A row's values by column; in a CSV file all are texts. JSON lines may leave columns out."""


@dataclass(frozen=True)
class Table:
    """All rows of a file."""

    columns: tuple[str, ...]
    """The columns that occur, in the order of their first appearance."""
    rows: Sequence[Row]
    """The rows in the order of the file; people count them from 1, without a header."""
    source: Digest
    """SHA-256 of the file; for a folder, over its Arrow files in their order."""
    first: int = 1
    """Number of the first row, as people count."""


def require_file(path: Path) -> None:
    """Checks that a file of data can be read, without reading all of it.

    Raises:
        DataError: it is missing or unreadable.
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
    try:
        rows = _rows_of(path)
        if not rows:
            raise DataError("the data file holds no record", file=path)
        columns = dict.fromkeys(column for row in rows for column in row)
        return Table(tuple(columns), rows, _source(path))
    except OSError as error:
        raise _unreadable(path, error.strerror or type(error).__name__) from None


def _rows_of(path: Path) -> list[Row]:
    rows: list[Row]
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
    return rows


def _json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            _text(path, line, number)
            if not line.strip():
                raise _malformed(path, number, "an empty line")
            try:
                row = msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                raise _malformed(path, number, str(error)) from None
            except RecursionError:
                raise _malformed(path, number, "values within values without end") from None
            if not isinstance(row, dict):
                raise _malformed(path, number, f"{type(row).__name__}, not an object")
            rows.append(row)
    return rows


def _csv(path: Path) -> list[Row]:
    """Every value is a text: a reader that guesses would make numbers of codes, and drop NA."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    # Clinical notes are longer than the 128 KiB that a field may have by default.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_text(path, data, 1), newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        _require_different(path, header)
        for values in reader:
            if len(values) != len(header):
                raise _malformed(
                    path, len(rows) + 1, f"{len(values)} fields under {len(header)} columns"
                )
            rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise _malformed(path, len(rows) + 1, str(error)) from None
    return rows


def json_lines(path: Path, table: Table) -> list[bytes]:
    """Each row as a line of JSON with its newline; a file of JSON lines gives its own bytes.

    Args:
        path: the file that the table was read from.

    Raises:
        DataError: a row holds a value that JSON cannot, such as an image.
    """
    if path.suffix != ".jsonl" or path.is_dir():
        return [_json_line(path, number, row) for number, row in enumerate(table.rows, start=1)]
    data = path.read_bytes()
    if hashlib.sha256(data).digest() != table.source:
        raise DataError("the data file changes while it is read", file=path, remedy="try again")
    lines = data.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    return [line + b"\n" for line in lines]


def _json_line(path: Path, number: int, row: Row) -> bytes:
    try:
        return msgspec.json.encode(row) + b"\n"
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"row {number} cannot be written as JSON",
            file=path,
            field=f"row {number}",
            found=error,
            accepted="texts, numbers, dates, lists and objects of them",
        ) from None


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
    # Imported here, as below: it takes a second, which other kinds of file need not wait.
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise _unreadable(path, type(error).__name__) from None
    _require_different(path, table.column_names)
    try:
        rows: list[Row] = table.to_pylist()
    except UnicodeDecodeError:
        # Row by row it takes ten times as long, but tells which row it is.
        rows = []
        for number in range(1, table.num_rows + 1):
            with _decoding(path, number):
                rows += table.slice(number - 1, 1).to_pylist()
    return rows


def _folder(path: Path) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(path), keep_in_memory=True)
    except (DatasetsError, ValueError, TypeError, OSError, KeyError) as error:
        raise _unreadable(path, type(error).__name__) from None
    if isinstance(found, datasets.DatasetDict):
        raise DataError(
            "a folder holds several data sets",
            file=path,
            found=", ".join(map(str, found)),
            accepted="the folder of one of them",
        )
    rows: list[Row] = []
    for number in range(1, len(found) + 1):
        with _decoding(path, number):
            rows.append(found[number - 1])
    return rows


@contextmanager
def _decoding(path: Path, row: int) -> Iterator[None]:
    """Names the row whose bytes are not text: Arrow does not check them."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"row {row} is not UTF-8",
            file=path,
            field=f"row {row}",
            found=f"byte 0x{error.object[error.start]:02x}",
            accepted="UTF-8",
        ) from None


def _require_different(path: Path, columns: Sequence[str]) -> None:
    if len(set(columns)) != len(columns):
        raise DataError("a data file names a column twice", file=path, found=", ".join(columns))


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


def _unreadable(path: Path, found: str | None) -> DataError:
    return DataError("the data file cannot be read", file=path, found=found)
