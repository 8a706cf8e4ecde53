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
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from umbel_client.data.records import load_records
from umbel_client.data.tables import json_lines, read_table, require_columns
from umbel_common.errors import DataError
from umbel_common.plans.plan import Classification

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
    """What is wrong with a file of which every column is asked for."""

    def read() -> list[dict[str, object]]:
        table = read_table(path)
        require_columns(path, table, *table.columns)
        return [dict(row) for row in table.rows]

    with pytest.raises(DataError) as caught:
        read()
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
        (b'{"text": NaN,}', "JSON is malformed: invalid character (byte 9)"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "values within values without end"),
        (b'{"text": "\\ud83d"}', "half a character (U+D83D)"),
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
    parquet(tmp_path / "empty" / "part-0.parquet", ROWS)
    assert refused(tmp_path / "empty").remedy == "give one file: part-0.parquet"
    Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "rowless"))
    assert refused(tmp_path / "rowless").message == "the data file holds no record"
    several = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)})
    several.save_to_disk(str(tmp_path / "several"))
    error = refused(tmp_path / "several")
    assert (error.found, error.accepted) == ("train, test", "the folder of one of them")
    assert read_table(tmp_path / "several" / "train").columns == ("text", "label")


def test_what_the_disk_refuses_is_an_error_with_the_file(tmp_path: Path) -> None:
    error = refused(tmp_path / ("x" * 300 + ".jsonl"))
    assert error.found == "File name too long"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.jsonl", "no such file in"),
        ("nowhere.jsonl", "which has a.jsonl, b.csv"),
        ("no/such/folder/a.jsonl", "/no is not there"),
        ("a.jsonl/b.jsonl", "a.jsonl is a file and no folder"),
        ("link.jsonl", "a link to gone.jsonl, which is not there"),
        ("pipe.jsonl", "a pipe, a socket or a device"),
        ("plain", "no data set; in the folder: notes.txt"),
        ("half", "a data set without dataset_info.json; in the folder: data-00000-of-00001.arrow"),
        ("damaged", "a data set with a file that is damaged"),
        ("partless", "a data set whose file data-00000-of-00001.arrow cannot be read"),
    ],
)
def test_what_is_no_file_of_records_is_named_for_what_it_is(
    tmp_path: Path, name: str, words: str
) -> None:
    """Not by the class of an error, which means nothing to who reads it."""
    jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").touch()
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "notes.txt").touch()
    for one, file, data in (
        ("half", "dataset_info.json", None),
        ("damaged", "state.json", "{"),
        ("partless", "data-00000-of-00001.arrow", None),
    ):
        if one == name:
            folder(tmp_path / one, ROWS)
            broken = tmp_path / one / file
            broken.unlink() if data is None else broken.write_text(data)
    error = refused(tmp_path / name)
    assert words in str(error.found)
    assert "FileNotFoundError" not in error.diagnostics()
    assert ".jsonl, .csv, .parquet" in str(error.accepted)
    assert "save_to_disk" in str(error.accepted)


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


def test_what_json_cannot_hold_is_written_as_text(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "scan": Image()})
    rows = {"text": ["a"], "scan": [PIL.Image.new("L", (2, 2))]}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "a"))
    (line,) = json_lines(tmp_path / "a", read_table(tmp_path / "a"))
    assert list(json.loads(line)) == ["text", "scan"]


def beyond(path: Path, values: pa.Array) -> Path:
    texts = [f"t{n}" for n in range(len(values))]
    pq.write_table(pa.table({"text": texts, "label": list("ab"), "other": values}), path)
    return path


UNUSABLE = {
    "a date": pa.array([-1_000_000, 0], pa.int32()).cast(pa.date32()),
    "a moment": pa.array([10**12, 0], pa.timestamp("s")),
    "a zone": pa.array([10**9, 0], pa.timestamp("s", tz="Mars/Olympus")),
    "bytes": pa.array([b"\xff\x00", b""]),
    "an image": pa.array([{"bytes": b"\x89PNG", "path": None}, None]),
    "not a number": pa.array([float("nan"), 1.0]),
    "a text of bytes": pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(bytes(4) + b"\1\0\0\0" * 2), pa.py_buffer(b"\xe4")]
    ),
    "times": pa.array([1, 2], pa.duration("ns")),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_column_that_nobody_asks_for_does_not_matter(tmp_path: Path, name: str) -> None:
    """Its values are written as texts where a file is divided."""
    path = beyond(tmp_path / "a.parquet", UNUSABLE[name])
    records = load_records(path, Classification(labels=("a", "b")))
    assert records.texts == ["t0", "t1"]
    lines = json_lines(path, read_table(path))
    assert [json.loads(line)["text"] for line in lines] == ["t0", "t1"]


@pytest.mark.parametrize("name", ["a date", "a moment", "a zone", "a text of bytes"])
def test_a_value_that_cannot_be_used_is_named_where_it_is_asked_for(
    tmp_path: Path, name: str
) -> None:
    path = beyond(tmp_path / "a.parquet", UNUSABLE[name])
    with pytest.raises(DataError, match="row 1"):
        load_records(path, Classification(labels=("a", "b")), text_column="other")


TEXT_FILES = {
    "not a number": (".jsonl", b'{"text": "t", "label": "a", "other": [NaN, -Infinity]}\n'),
    "half a character": (".jsonl", b'{"text": "t", "label": "a", "other": "\\ud83d"}\n'),
    "Latin-1": (".jsonl", b'{"text": "t", "label": "a", "other": "\xe4"}\n'),
    "Latin-1 in CSV": (".csv", b"text,label,other\nt,a,\xe4\n"),
    "a zero byte": (".csv", b"text,label,other\nt,a,x\0x\n"),
    "names without a name": (".csv", b"text,label,,\nt,a,,\n"),
    "a column twice": (".csv", b"text,label,x,x\nt,a,1,2\n"),
    "digits": (".jsonl", b'{"text": "t", "label": "a", "other": ' + b"9" * 5000 + b"}\n"),
    "CR alone": (".csv", b"text,label\rt,a\r"),
    "CR alone in JSON": (".jsonl", b'{"text": "t", "label": "a"}\r'),
    "upper case": (".CSV", b"text,label\nt,a\n"),
}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_what_other_programs_write_is_read(tmp_path: Path, name: str) -> None:
    suffix, content = TEXT_FILES[name]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert load_records(path, Classification(labels=("a", "b"))).texts == ["t"]
    (line,) = json_lines(path, read_table(path))
    (tmp_path / "again.jsonl").write_bytes(line)
    again = read_table(tmp_path / "again.jsonl")
    assert again.rows[0]["text"] == "t"
    assert len(again.columns) == len(read_table(path).columns)


def test_columns_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,text,x,x (2)\n1,t,2,3\n")
    table = read_table(tmp_path / "a.csv")
    assert dict(table.rows[0]) == {"x": "1", "text": "t", "x (3)": "2", "x (2)": "3"}
    names = ["x", "text", "x"]
    pq.write_table(pa.table([["1"], ["t"], ["2"]], names=names), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert dict(table.rows[0]) == {"x": "1", "text": "t", "x (2)": "2"}


@pytest.mark.parametrize(
    ("name", "content", "found", "what_to_do"),
    [
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "UTF-16", "iconv"),
        ("a.csv", "text,label\na,b\n".encode("utf-16-be"), "UTF-16", "iconv"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16", "iconv"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "UTF-16", "iconv"),
        ("a.csv", b"text;label\na;b\n", "semicolons", "comma delimited"),
        ("a.csv", b"id;text, free;label\n1;a;b\n", "semicolons", "comma delimited"),
        ("a.csv", b"text\tlabel\na\tb\n", "tabs", "comma delimited"),
        ("a.csv", b"PK\x03\x04xlsx", "spreadsheet", "CSV"),
        ("a.csv", b"\x1f\x8b\x08", "gzip", "unpack"),
        ("a.jsonl", b'[\n{"text": "a"}\n]\n', "truncated", "one object a line"),
        ("a.jsonl", b'[{"text": "a"}]', "list", "one object a line"),
        ("a.parquet", b"text,label\n", "no Parquet file", "again"),
        ("a.csv", b"# export\na,b\n", "2 fields under 1 column ", "line 1"),
        ("a.csv", b"text,label\na,b,\n", "3 fields under 2 columns", "ends of the lines"),
        ("a.csv", b"text,label\na b, c,d\n", "3 fields under 2 columns", "quotation marks"),
        ("a.csv", b"text,label\na\n", "1 field under 2 columns", "empty ones too"),
        ("a.csv", b'text,label\n"a "b" c",d\n', "within a text", "write two"),
        ("a.jsonl", b"PAR1data", "Parquet", ".parquet"),
        ("a.tsv", b"text\tlabel\n", ".tsv", "tabs"),
        ("a.xlsx", b"PK", ".xlsx", "spreadsheet"),
        ("a.json", b"[]", ".json", "one object a line"),
        ("a.ndjson", b"{}", ".ndjson", "rename"),
        ("a.csv.gz", b"\x1f", ".gz", "unpack"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(
    tmp_path: Path, name: str, content: bytes, found: str, what_to_do: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert found in str(error.found)
    assert what_to_do in str(error.remedy)


def test_rows_that_cannot_be_parsed_are_left_to_the_caller(tmp_path: Path) -> None:
    wrong: dict[int, DataError] = {}
    (tmp_path / "a.csv").write_text('text,label\na,b\nc\n"x\ny",b\nc,"d"e\nf,"g\n')
    table = read_table(tmp_path / "a.csv", wrong.__setitem__)
    assert (list(table.numbers), list(wrong)) == ([1, 3], [2, 4, 5])
    assert [str(error.found)[-8:] for error in wrong.values()] == [
        "(line 3)",
        "(line 6)",
        "(line 7)",
    ]
    wrong.clear()
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[]\n\n{"a": 2}\n{')
    table = read_table(tmp_path / "a.jsonl", wrong.__setitem__)
    assert (list(table.numbers), list(wrong)) == ([1, 4], [2, 3, 5])


@pytest.mark.parametrize("columns", [["text", "labels"], ["text", " label"], ["text", "Label"]])
def test_a_column_that_comes_near_is_named(tmp_path: Path, columns: list[str]) -> None:
    rows = [dict.fromkeys(columns, "a")]
    with pytest.raises(DataError) as caught:
        load_records(jsonl(tmp_path / "a.jsonl", rows), Classification(labels=("a", "b")))
    assert f"{columns[1]!r} comes near" in str(caught.value.remedy)


def test_a_text_in_place_of_a_header_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{'a private note ' * 9},flu\nb,c\n")
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / "a.csv", Classification(labels=("a", "b")))
    assert len(caught.value.diagnostics()) < 400


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_the_format_that_a_data_set_remembers_does_not_matter(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "t", "label": 1, "length": 6}]
    Dataset.from_list(rows).with_format(kind, columns=["label"]).save_to_disk(str(tmp_path / "a"))
    records = load_records(tmp_path / "a", Classification(labels=("0", "1")))
    assert (records.texts, records.labels) == (["t"], [1])


def test_a_class_is_its_name(tmp_path: Path) -> None:
    """Another site may number the same names in another way."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["flu", "cough"])})
    rows = {"text": list("abcd"), "label": [0, 1, -1, None]}
    found = Dataset.from_dict(rows, features=features)
    found.save_to_disk(str(tmp_path / "a"))
    found.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "a", tmp_path / "a.parquet"):
        assert [row["label"] for row in read_table(path).rows] == ["flu", "cough", None, None]
