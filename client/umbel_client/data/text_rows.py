"""Rows of files of texts: JSON lines and CSV."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from umbel_client.data.kinds import require_utf_8, separator_error
from umbel_client.data.rows import (
    GuardedRow,
    OnWrongRow,
    Row,
    Table,
    different,
    malformed,
    not_utf_8,
    table_of,
)
from umbel_common.errors import DataError
from umbel_common.plans.alike import shown
from umbel_common.single_keys import Twice, may_repeat, object_of, twice_in

_OBJECT = 'one JSON object on each line, such as {"text": "...", "label": "..."}'
_SPREAD = "write one object a line: jq -c '.[]' FILE does it for a list, jq -c . FILE for objects"
_PIECE = 1 << 17
_LONGEST_KEY = 40
"""Characters of a key that an error shows."""
_MOST_DIGITS = 4000
"""Digits of the longest whole number that Python reads as one."""


def json_line_rows(path: Path, on_wrong_row: OnWrongRow) -> Table:
    """The rows of a file of JSON lines; see `tables.read_table`."""
    rows: list[Row] = []
    numbers: list[int] = []
    for number, line in enumerate(lines_of(path), start=1):
        try:
            rows.append(_object(path, number, line))
        except DataError as error:
            on_wrong_row(number, error)
        else:
            numbers.append(number)
    if may_repeat(partial(_pieces, path), rows):
        _require_single_keys(path, rows, numbers)
    columns = dict.fromkeys(column for row in rows for column in row)
    return table_of(tuple(columns), rows, numbers)


def _pieces(path: Path, before: int) -> Iterator[memoryview]:
    """A file in pieces that a processor's cache holds, each after the last bytes of the one before.

    Args:
        before: how many of them.
    """
    view = memoryview(bytearray(before + _PIECE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(view[before:]):
            yield view[: before + size]
            view[:before] = bytes(view[size : size + before])


def _require_single_keys(path: Path, rows: list[Row], numbers: list[int]) -> None:
    """Puts a row that refuses what a key of it is twice in the place of each row that has one."""
    indices = {number: index for index, number in enumerate(numbers)}
    for number, line in enumerate(lines_of(path), start=1):
        index = indices.get(number)
        if index is None or isinstance(rows[index], _Doubtful):
            continue
        row = _lenient(path, number, line, "")
        if isinstance(row, _Doubtful) and row.repeats():
            rows[index] = row


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, without a byte-order mark. Old programs end them with CR alone."""
    with path.open("rb") as file:
        yield from lines_in(file, path)


def lines_in(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """As `lines_of`, of an open file.

    Args:
        path: the file's, for errors.
    """
    first = file.readline().removeprefix(b"\xef\xbb\xbf")
    require_utf_8(path, first)
    if not first.endswith(b"\n") and b"\r" in first.strip():
        yield from first.removesuffix(b"\r").split(b"\r")
        return
    yield first
    yield from file


def _object(path: Path, number: int, line: bytes) -> Row:
    if not line.strip():
        raise malformed(path, number, "an empty line")
    row: object
    try:
        row = msgspec.json.decode(line)
    except RecursionError:
        raise malformed(path, number, "values within values without end") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        row = _lenient(path, number, line, str(error))
    if not isinstance(row, Mapping):
        spread = _SPREAD if isinstance(row, list) and number == 1 else None
        raise malformed(path, number, f"{type(row).__name__}, not an object", spread, _OBJECT)
    return row


def _lenient(path: Path, number: int, line: bytes, problem: str) -> object:
    """Reads a line as other programs write it: with NaN, half characters, or bytes that are not
    UTF-8. They matter where a column with them is asked for."""
    try:
        row = json.loads(
            line.decode("utf-8", "surrogateescape"), object_pairs_hook=object_of, parse_int=_whole
        )
    except (ValueError, RecursionError):
        spread = number == 1 and line.strip() in (b"[", b"{", b"[{")
        if "truncated" in problem:
            problem = "the JSON does not end on its line (truncated)"
        raise malformed(path, number, problem, _SPREAD if spread else None, _OBJECT) from None
    return _Doubtful(path, number, number, row) if isinstance(row, dict) else row


def _whole(digits: str) -> object:
    return int(digits) if len(digits) <= _MOST_DIGITS else digits


class _Doubtful(GuardedRow):
    """A row of a file with something that is no text. It is refused where it is asked for."""

    def __init__(self, path: Path, number: int, line: int, values: dict[str, Any]) -> None:
        self._path = path
        self._number = number
        self._line = line
        self._values = values

    def __getitem__(self, column: str) -> object:
        value = self._values[column]
        own = self._values.keys_twice if isinstance(self._values, Twice) else ()
        key = next(twice_in(value), column if column in own else None)
        if key is not None:
            raise self._twice(column, key)
        for text in _texts(value):
            sign = next((sign for sign in text if _is_no_text(sign)), None)
            if sign is not None:
                raise self._error(column, sign)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def as_text(self, column: str) -> str:
        """See `GuardedRow`."""
        return (
            str(self._values[column])
            .encode("utf-8", "surrogateescape")
            .decode("utf-8", "backslashreplace")
        )

    def repeats(self) -> bool:
        """Whether an object of the row has a key twice."""
        return any(True for _ in twice_in(self._values))

    def _twice(self, column: str, key: str) -> DataError:
        return DataError(
            f"row {self._number} has a key twice in one object",
            file=self._path,
            field=f"{column}, row {self._number}",
            found=f"{shown(key[:_LONGEST_KEY])}, twice",
            accepted="each key once",
            remedy="remove one of the two: programs do not agree on which of them counts",
        )

    def _error(self, column: str, sign: str) -> DataError:
        if "\udc80" <= sign <= "\udcff":
            return not_utf_8(self._path, f"line {self._line}", ord(sign) - 0xDC00)
        zero = sign == "\0"
        return DataError(
            f"row {self._number} cannot be read",
            file=self._path,
            field=f"{column}, row {self._number}",
            found="a byte 0x00" if zero else f"half a character (U+{ord(sign):04X})",
            accepted="whole characters",
            remedy="write the file again: a damaged file, or one in UTF-16, has such bytes"
            if zero
            else "cut the text at another place: it was cut inside a character such as an emoji",
        )


def _is_no_text(sign: str) -> bool:
    return sign == "\0" or "\ud800" <= sign <= "\udfff"


def _escaped(text: str) -> bool:
    """Whether a byte of a text was none of UTF-8."""
    return any("\udc80" <= sign <= "\udcff" for sign in text)


def _texts(value: object) -> Iterator[str]:
    """Every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _texts(part)


def csv_rows(path: Path, on_wrong_row: OnWrongRow) -> Table:
    """The rows of a CSV file; see `tables.read_table`.

    Every value is a text: a reader that guesses would make numbers of codes, and drop NA.
    """
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    require_utf_8(path, data)
    text = data.decode("utf-8", "surrogateescape")
    doubtful = "\0" in text or (not text.isascii() and _escaped(text))
    # Clinical notes are longer than the 128 KiB that a field may have by default.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = _header(path, reader, text)
    names = [own for own, _, _ in different(header)]
    rows: list[Row] = []
    numbers: list[int] = []
    number = 0
    while True:
        number, line = number + 1, reader.line_num + 1
        try:
            values = next(reader, None)
            if values is None:
                break
            _require_fields(path, number, line, values, header)
        except csv.Error as error:
            on_wrong_row(number, _csv_error(path, number, line, error))
        except DataError as error:
            on_wrong_row(number, error)
        else:
            row = dict(zip(names, values, strict=True))
            rows.append(_Doubtful(path, number, line, row) if doubtful else row)
            numbers.append(number)
    return table_of(header, rows, numbers)


def _header(path: Path, reader: Iterator[list[str]], text: str) -> list[str]:
    wrong = separator_error(path, text)
    if wrong is not None:
        raise wrong
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(
            "the header of a CSV file cannot be read", file=path, field="line 1", found=error
        ) from None
    for name in header:
        if _escaped(name):
            byte = next(sign for sign in name if _escaped(sign))
            raise not_utf_8(path, "line 1", ord(byte) - 0xDC00)
    if not header:
        raise DataError(
            "a CSV file has no header",
            file=path,
            field="line 1",
            found="an empty line",
            accepted="the names of the columns, such as text,label",
        )
    return header


def _require_fields(
    path: Path, number: int, line: int, values: list[str], header: list[str]
) -> None:
    if len(values) == len(header):
        return
    if not values:
        raise malformed(path, number, f"an empty line (line {line})", "remove it")
    found = f"{_count(values, 'field')} under {_count(header, 'column')} (line {line})"
    if len(values) < len(header):
        remedy = "give each line all fields, empty ones too: a,,c"
    elif not any(values[len(header) :]):
        remedy = "remove the commas at the ends of the lines"
    elif len(header) == 1:
        remedy = "see that line 1 names all columns, such as text,label"
    else:
        remedy = 'put a text with commas or line breaks between quotation marks: "a, b"'
    raise malformed(path, number, found, remedy)


def _count(values: list[str], what: str) -> str:
    return f"1 {what}" if len(values) == 1 else f"{len(values)} {what}s"


def _csv_error(path: Path, number: int, line: int, error: csv.Error) -> DataError:
    found = str(error)
    if "unexpected end" in found:
        found = "a quotation mark that nothing closes"
    elif "expected after" in found:
        found = "a quotation mark within a text that is between quotation marks"
    remedy = 'write two for each that belongs to a text: "he said ""no"""'
    return malformed(path, number, f"{found} (line {line})", remedy)
