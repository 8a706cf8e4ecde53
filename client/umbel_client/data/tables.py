"""Rows of a file of records, whatever its kind: JSON lines, CSV, Parquet, or a data set's folder.

Every command that takes a file of records reads it here, so that all of them see the same rows,
refuse the same rows, and number them in the same way. Every kind is checked equally strictly, and
errors name the row. A row's values are looked at when a column is asked for: what stands in a
column that nobody asks for does not matter.

Reading leaves no copy of private data anywhere, not even for a moment: its folder need not be
writable. Folders that `save_to_disk` of Hugging Face `datasets` wrote go through that library,
without network.
"""

import hashlib
import io
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from umbel_client.data.arrow_rows import folder_rows, parquet_rows
from umbel_client.data.kinds import FOLDER, KINDS, kind_of
from umbel_client.data.rows import GuardedRow, OnWrongRow, Row, Table, unreadable
from umbel_client.data.text_rows import csv_rows, json_line_rows, lines_in
from umbel_common.errors import DataError
from umbel_common.plans.alike import plain, seen, shown
from umbel_host.processes.lifecycle import reason

_ACCEPTED = f"a file of records ({', '.join(KINDS[:-1])}), or {FOLDER}"
_FEW = 3
"""Files of a folder that an error names."""
_NAMED = 20
"""Columns that an error names."""
_LONGEST_NAME = 40
"""Characters of a column's name in an error: where the header is missing, it is a text."""


def _refuse(number: int, error: DataError) -> None:
    raise error


def require_file(path: Path) -> None:
    """Checks that a file of data can be read, without reading all of it.

    Raises:
        DataError: it is missing or unreadable.
    """
    try:
        if path.is_dir():
            os.listdir(path)
            return
        if not stat.S_ISREG(path.stat().st_mode):
            # It would be read twice, or never end.
            raise unreadable(path, "a pipe, a socket or a device", _ACCEPTED)
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(path) from None
    except OSError as error:
        closed = isinstance(error, PermissionError)
        remedy = "let the trainer's user read it, and nobody else" if closed else None
        raise unreadable(path, reason(error), _ACCEPTED, remedy) from None


def _absent(path: Path) -> DataError:
    """What is there in place of a file that is not."""
    folder = path.absolute().parent
    if path.is_symlink():
        found = f"a link to {path.readlink()}, which is not there"
    elif folder.is_dir():
        found = f"no such file in {folder}{_others(folder)}"
    else:
        there = next(above for above in path.absolute().parents if above.exists())
        missing = there / path.absolute().relative_to(there).parts[0]
        found = f"{missing} is not there" if there.is_dir() else f"{there} is a file and no folder"
    return DataError(
        "the data file does not exist",
        file=path,
        found=found,
        accepted=_ACCEPTED,
        remedy="give the path of the file with the records; data.path of client.toml starts at its"
        " folder, and a path of the command line where the command is given",
    )


def _others(folder: Path) -> str:
    """Which files of records a folder has, if this user may know."""
    try:
        names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in KINDS)
    except OSError:
        return ""
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f", which has {', '.join(names[:_FEW])}{more}" if names else ""


def read_table(path: Path, on_wrong_row: OnWrongRow = _refuse) -> Table:
    """Reads the rows of a file.

    Args:
        on_wrong_row: takes each row that cannot be parsed, and leaves it out of the table; without
            it, the first such row is an error.

    Raises:
        DataError: the file is missing, unreadable, of another kind, not UTF-8, or empty; or a row
            cannot be parsed.
    """
    require_file(path)
    try:
        wrong: list[int] = []

        def on_wrong(number: int, error: DataError) -> None:
            on_wrong_row(number, error)
            wrong.append(number)

        kind = kind_of(path)
        if kind != FOLDER and path.stat().st_size == 0:
            raise _empty(path)
        table = _READERS[kind](path, on_wrong)
        if not table.rows and not wrong:
            raise _empty(path)
        return replace(table, source=_source(path))
    except OSError as error:
        raise unreadable(path, reason(error), _ACCEPTED) from None


def _empty(path: Path) -> DataError:
    return DataError("the data file holds no record", file=path)


def require_columns(path: Path, table: Table, *columns: str) -> None:
    """Refuses a file that lacks a column, or that has it twice.

    Raises:
        DataError: names it, and the columns of the file.
    """
    for column in columns:
        if column in table.twice:
            raise DataError(
                "a data file names a column twice",
                file=path,
                field=column,
                found=columns_text(table.columns),
                remedy="rename or remove one of them",
            )
        if column not in table.columns:
            near = near_columns(column, table.columns)
            rename = f"{' and '.join(map(shown, near))} comes near: " if near else ""
            raise DataError(
                "a column is missing",
                file=path,
                field=column,
                found=columns_text(table.columns),
                remedy=f"{rename}rename a column of the file, or set data.text_column,"
                " data.label_column or data.unit_column",
            )


def near_columns(wanted: str, columns: Sequence[str]) -> list[str]:
    """Columns whose names are nearly the one that is wanted: `labels`, ` label`, `Label`."""

    def stem(name: str) -> str:
        return str(plain(name)).removesuffix("s")

    return [name for name in columns if name != wanted and stem(name) == stem(wanted)]


def columns_text(columns: Sequence[str]) -> str:
    """Names of columns for an error, none of them long: one may be a text of a first line."""
    names = [name if name and name == seen(name) else shown(name) for name in columns[:_NAMED]]
    short = [
        name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}\N{HORIZONTAL ELLIPSIS}"
        for name in names
    ]
    more = len(columns) - _NAMED
    return ", ".join(short) + (f" and {more} more" if more > 0 else "")


def json_lines(path: Path, table: Table) -> list[bytes]:
    """Each row as a line of JSON with its newline; a file of JSON lines gives its own bytes.

    A value that JSON cannot hold becomes a text.

    Args:
        path: the file that the table was read from.

    Raises:
        DataError: the file changed since.
    """
    if kind_of(path) != ".jsonl":
        return [_json_line(row) for row in table.rows]
    data = path.read_bytes()
    if hashlib.sha256(data).digest() != table.source:
        raise DataError("the data file changes while it is read", file=path, remedy="try again")
    return [line.removesuffix(b"\n") + b"\n" for line in lines_in(io.BytesIO(data), path)]


def _json_line(row: Row) -> bytes:
    written = {column: _written(row, column) for column in row}
    return msgspec.json.encode(written, enc_hook=str) + b"\n"


def _written(row: Row, column: str) -> object:
    try:
        return row[column]
    except DataError:
        if isinstance(row, GuardedRow):
            return row.as_text(column)
        raise


def _source(path: Path) -> bytes:
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    combined = hashlib.sha256()
    for part in sorted(path.glob("*.arrow")):
        with part.open("rb") as file:
            combined.update(hashlib.file_digest(file, "sha256").digest())
    return combined.digest()


_READERS: dict[str, Callable[[Path, OnWrongRow], Table]] = {
    ".jsonl": json_line_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    FOLDER: folder_rows,
}
