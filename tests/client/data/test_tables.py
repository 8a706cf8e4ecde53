"""Rows of every kind of file, and what cannot be read, by the row that is wrong."""

import json
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from umbel_client.data.tables import json_lines, read_table
from umbel_common.errors import DataError

ROWS = [{"text": "Ödem", "label": "heart"}, {"text": 'a "quoted",\ncell', "label": "lung"}]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv(path: Path, rows: list[Any]) -> Path:
    Dataset.from_list(rows).to_csv(path)
    return path


def parquet(path: Path, rows: list[Any]) -> Path:
    Dataset.from_list(rows).to_parquet(path)
    return path


def folder(path: Path, rows: list[Any]) -> Path:
    Dataset.from_list(rows).save_to_disk(str(path))
    return path


KINDS: dict[str, Callable[[Path, list[Any]], Path]] = {
    "a.jsonl": jsonl,
    "a.csv": csv,
    "a.parquet": parquet,
    "a": folder,
}


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert caught.value.file == path
    return caught.value


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows_in_their_order(tmp_path: Path, name: str) -> None:
    table = read_table(KINDS[name](tmp_path / name, ROWS))
    assert table.columns == ("text", "label")
    assert [dict(row) for row in table.rows] == ROWS


@pytest.mark.parametrize("name", KINDS)
def test_the_source_is_that_of_the_content(tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    one = read_table(KINDS[name](tmp_path / name, ROWS)).source
    assert read_table(KINDS[name](tmp_path / "other" / name, ROWS)).source == one
    (tmp_path / "third").mkdir()
    changed = KINDS[name](tmp_path / "third" / name, ROWS[::-1])
    assert read_table(changed).source != one


@pytest.mark.parametrize("name", KINDS)
def test_reading_needs_nothing_but_reading(tmp_path: Path, name: str) -> None:
    """No copy of private data, not even for a moment: the times of its folder stand still."""
    path = KINDS[name](tmp_path / name, ROWS)
    before = os.stat(tmp_path).st_mtime_ns, sorted(tmp_path.rglob("*"))
    read_table(path)
    assert (os.stat(tmp_path).st_mtime_ns, sorted(tmp_path.rglob("*"))) == before


def test_json_lines_may_leave_columns_out(tmp_path: Path) -> None:
    table = read_table(jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"b": None}]))
    assert table.columns == ("a", "b")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    path = KINDS[name](tmp_path / name, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_table(path).columns == ("text", "label")


def test_a_csv_cell_may_be_longer_than_a_parser_likes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(str(read_table(tmp_path / "a.csv").rows[0]["text"])) == 200_000


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"{not json", "JSON is malformed: object keys must be strings (byte 1)"),
        (b"[1, 2]", "list, not an object"),
        (b"", "an empty line"),
        (b"  ", "an empty line"),
        (b'{"text": NaN}', "JSON is malformed: invalid character (byte 9)"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "values within values without end"),
        (b'{"text": "\\udc00"}', "JSON is malformed: invalid utf-16 surrogate pair"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes, found: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + line + b"\n")
    error = refused(tmp_path / "a.jsonl")
    assert error.message == "row 2 cannot be read"
    assert str(error.found).startswith(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b\nc\n", "row 2 cannot be read"),
        ("text,label\na,b\nc,d,e\n", "row 2 cannot be read"),
        ('text,label\na,b\n"c,d\n', "row 2 cannot be read"),
        ('text,label\na,b\nc,"d"e\n', "row 2 cannot be read"),
        ("text,label,text\na,b,c\n", "a data file names a column twice"),
    ],
)
def test_a_bad_row_of_csv_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert refused(tmp_path / "a.csv").message == message


def latin_1(path: Path) -> Path:
    """Two rows, the second of which is not UTF-8."""
    if path.suffix in (".jsonl", ".csv"):
        before, after = ('{"text": "', '"}\n') if path.suffix == ".jsonl" else ("", "\n")
        head = "" if path.suffix == ".jsonl" else "text\n"
        path.write_bytes(f"{head}{before}a{after}{before}\xe4{after}".encode("latin-1"))
        return path
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2)))
    array = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xe4")])
    table = pa.table({"text": array})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        Dataset(table).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", KINDS)
def test_a_byte_that_is_not_utf_8_is_named_with_its_row(tmp_path: Path, name: str) -> None:
    error = refused(latin_1(tmp_path / name))
    line = {"a.jsonl": "line 2", "a.csv": "line 3"}.get(name, "row 2")
    assert (error.field, error.found, error.accepted) == (line, "byte 0xe4", "UTF-8")


def test_a_parquet_file_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").message == "a data file names a column twice"


def test_a_torn_parquet_file_cannot_be_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(path).message == "the data file cannot be read"


def test_a_folder_must_be_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").message == "the data file cannot be read"
    several = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)})
    several.save_to_disk(str(tmp_path / "several"))
    error = refused(tmp_path / "several")
    assert (error.found, error.accepted) == ("train, test", "the folder of one of them")
    assert read_table(tmp_path / "several" / "train").columns == ("text", "label")


def test_what_the_disk_refuses_is_an_error_with_the_file(tmp_path: Path) -> None:
    error = refused(tmp_path / ("x" * 300 + ".jsonl"))
    assert error.found == "File name too long"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = KINDS[name](tmp_path / name, ROWS)
    path.chmod(0)
    assert str(refused(path).found).startswith("Permission denied")


def test_lines_of_json_are_the_very_bytes(tmp_path: Path) -> None:
    """A number of thirty digits, the order of keys and spaces stay."""
    lines = [b'{"b":  123456789012345678901234567890, "a": 1.50}\r\n', b'{"a": "\\u00e4"}\n']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines).removesuffix(b"\n"))
    assert json_lines(path, read_table(path)) == lines


@pytest.mark.parametrize("name", KINDS)
def test_lines_of_json_say_what_the_rows_say(tmp_path: Path, name: str) -> None:
    path = KINDS[name](tmp_path / name, ROWS)
    written = tmp_path / "again.jsonl"
    written.write_bytes(b"".join(json_lines(path, read_table(path))))
    assert read_table(written).rows == ROWS


def test_lines_of_json_of_a_file_that_changed_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    table = read_table(path)
    jsonl(path, ROWS[::-1])
    with pytest.raises(DataError, match="changes while it is read"):
        json_lines(path, table)


def test_dates_become_texts(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"text": "a", "seen": date(2026, 11, 26)}])
    assert json_lines(path, read_table(path)) == [b'{"text":"a","seen":"2026-11-26"}\n']


def test_a_row_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "scan": Image()})
    rows = {"text": ["a"], "scan": [PIL.Image.new("L", (2, 2))]}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "a"))
    with pytest.raises(DataError, match="row 1 cannot be written as JSON"):
        json_lines(tmp_path / "a", read_table(tmp_path / "a"))
