"""Records: read from the three kinds of file, and refused with the row that is wrong."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from datasets import Dataset

from umbel_client.data.records import Record, load_records
from umbel_common.errors import DataError
from umbel_common.plans.alike import alike
from umbel_common.plans.plan import Classification

TASK = Classification(labels=("heart", "lung"))
ROWS = [
    {"text": "mitral stenosis", "label": "heart", "ward": 3},
    {"text": "asthma, severe", "label": "lung", "ward": 4},
]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(folder: Path, kind: str) -> Path:
    path = folder / f"records.{kind}"
    if kind == "jsonl":
        return jsonl(path, ROWS)
    table = Dataset.from_list(ROWS)
    table.to_csv(path) if kind == "csv" else table.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_each_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    records = load_records(written(tmp_path, kind), TASK)
    assert records.records == (
        Record(text="mitral stenosis", label=0),
        Record(text="asthma, severe", label=1),
    )


def test_a_csv_file_keeps_its_texts_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "codes.csv"
    path.write_text('label,text,other\n0,NA,\n1,"0012, ""x""",5\n', encoding="utf-8-sig")
    records = load_records(path, Classification(labels=("0", "1")))
    assert records.texts == ["NA", '0012, "x"']
    assert records.labels == [0, 1]


def test_labels_may_be_whole_numbers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 0}])
    assert load_records(path, Classification(labels=("0", "1"))).labels == [1, 0]


def test_columns_are_the_sites_own(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"note": "x", "organ": "lung", "text": 5}])
    records = load_records(path, TASK, text_column="note", label_column="organ")
    assert records.records == (Record(text="x", label=1),)


def test_the_digest_is_of_the_file_whatever_its_columns_are_called(
    tmp_path: Path,
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"a": "x", "b": "y", "label": "heart"}])
    digests = {
        load_records(path, Classification(labels=labels), text_column=column).digest()
        for labels in (("heart", "lung"), ("lung", "heart"))
        for column in ("a", "b")
    }
    assert len(digests) == 1
    other = jsonl(tmp_path / "b.jsonl", [{"a": "x", "b": "z", "label": "heart"}])
    assert load_records(other, TASK, text_column="a").digest() not in digests


@pytest.mark.parametrize(
    ("row", "field", "found"),
    [
        ({"text": "", "label": "lung"}, "text, row 2", "an empty text"),
        ({"text": " \t", "label": "lung"}, "text, row 2", "an empty text"),
        ({"text": None, "label": "lung"}, "text, row 2", "NoneType"),
        ({"label": "lung"}, "text, row 2", "NoneType"),
        ({"text": "secret", "label": "liver"}, "label, row 2", "'liver'"),
        ({"text": "secret", "label": None}, "label, row 2", "None"),
        ({"text": float("nan"), "label": "lung"}, "text, row 2", "float"),
        ({"text": "secret", "label": float("nan")}, "label, row 2", "nan"),
        ({"text": "\ud83d", "label": "lung"}, "text, row 2", "half a character (U+D83D)"),
        ({"text": "secret", "label": "\ud83d"}, "label, row 2", "half a character (U+D83D)"),
        ({"text": "secret", "label": "lung" * 60}, "label, row 2", "240 characters"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, field: str, found: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(DataError) as caught:
        load_records(path, TASK)
    assert (caught.value.field, caught.value.found) == (field, found)
    assert caught.value.file == path
    assert "secret" not in caught.value.diagnostics()


def test_a_column_of_numbers_is_not_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": 12, "label": "lung"}])
    with pytest.raises(DataError) as caught:
        load_records(path, TASK)
    assert (caught.value.field, caught.value.found) == ("text, row 1", "int")


def test_texts_mixed_with_numbers_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], {"text": 12, "label": "lung"}])
    with pytest.raises(DataError):
        load_records(path, TASK)


def test_a_missing_column_is_named_beside_those_there_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"txt": "x", "label": "lung"}])
    with pytest.raises(DataError) as caught:
        load_records(path, TASK)
    assert (caught.value.field, caught.value.found) == ("text", "txt, label")


def test_a_bad_row_and_a_missing_column_are_named_by_the_sites_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"note": "x", "organ": "liver"}, {"note": "", "organ": 1}])
    for columns, field in (
        ({"text_column": "note", "label_column": "organ"}, "organ, row 1"),
        ({"text_column": "note"}, "label"),
        ({"label_column": "organ"}, "text"),
    ):
        with pytest.raises(DataError) as caught:
            load_records(path, TASK, **columns)
        assert caught.value.field == field


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="no record"):
        load_records(tmp_path / name, TASK)


def test_a_csv_file_with_a_header_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(DataError):
        load_records(tmp_path / "a.csv", TASK)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"{not json\n"),
        ("a.parquet", b"not parquet"),
        ("a.csv", b"text,label\nx,lung,more,cells\n"),
        ("a.csv", b"text,label\n\xff\xfe,lung\n"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError):
        load_records(tmp_path / name, TASK)


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / "a.xlsx", TASK)
    assert caught.value.accepted == ".jsonl, .csv, .parquet, a folder that save_to_disk wrote"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_records(tmp_path / "a.jsonl", TASK)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_no_copy_stays_behind(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind)
    load_records(path, TASK)
    assert os.listdir(tmp_path) == [path.name]


def test_no_copy_stays_behind_a_file_that_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], {"text": 12, "label": "lung"}])
    with pytest.raises(DataError):
        load_records(path, TASK)
    assert os.listdir(tmp_path) == [path.name]


def test_no_copy_is_ever_made_outside_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever kills the process leaves the private cache beside the data, not in /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    (tmp_path / "data").mkdir()
    load_records(written(tmp_path / "data", "jsonl"), TASK)
    assert os.listdir(tmp_path) == ["data"]


PATIENTS = [
    {"text": "a", "label": "heart", "patient": "p1"},
    {"text": "b", "label": "lung", "patient": "p2"},
    {"text": "c", "label": "heart", "patient": " p1"},
    {"text": "d", "label": "heart", "patient": "p1"},
]


def test_records_know_their_units_and_those_past_the_bound_are_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", PATIENTS)
    records = load_records(path, TASK, unit_column="patient")
    assert records.units == (0, 1, 0, 0)
    records = load_records(path, TASK, unit_column="patient", max_records_per_unit=2)
    assert records.texts == ["a", "b", "c"]
    assert records.units == (0, 1, 0)


def test_what_a_unit_is_decides_on_the_ledger(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", PATIENTS)
    by_record = load_records(path, TASK).digest()
    by_patient = load_records(path, TASK, unit_column="patient").digest()
    fewer = load_records(path, TASK, unit_column="patient", max_records_per_unit=1).digest()
    assert by_record != by_patient == fewer


@pytest.mark.parametrize(
    "unit",
    [
        None,
        "",
        "  ",
        1.5,
        True,
        "nan",
        "None",
        "NULL",
        " n/a ",
        "<NA>",
        "p\u200b1",
        "p1\ufeff",
        "a\x00",
    ],
)
def test_a_row_that_does_not_say_whose_record_it_is_is_refused(
    tmp_path: Path, unit: object
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{**PATIENTS[0], "patient": unit}])
    with pytest.raises(DataError, match=r"row 1 does not say whose record it is"):
        load_records(path, TASK, unit_column="patient")


def test_two_ways_to_write_a_name_are_one_unit(tmp_path: Path) -> None:
    names = ["Jos\u00e9", "Jose\u0301", "Josef"]
    path = jsonl(tmp_path / "a.jsonl", [{**PATIENTS[0], "patient": name} for name in names])
    records = load_records(path, TASK, unit_column="patient")
    assert records.units == (0, 0, 1)


def test_units_that_look_alike_are_found() -> None:
    found = alike(["p1", "P1", "1", "1.0", "01", "p2", "\uff50\uff12", "1e400", "2"])
    assert found == [("p1", "P1"), ("1", "1.0"), ("1", "01"), ("p2", "\uff50\uff12")]


def test_some_records_keep_their_rows_and_units(tmp_path: Path) -> None:
    records = load_records(jsonl(tmp_path / "a.jsonl", PATIENTS), TASK, unit_column="patient")
    some = records.only([1, 3])
    assert (some.texts, some.rows, some.units, some.unit_names) == (
        ["b", "d"],
        (2, 4),
        (0, 1),
        ("p2", "p1"),
    )
    assert (len(records.only([])), records.only([]).unit_count) == (0, 0)
    assert some.digest() == records.digest()


def test_a_unit_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", PATIENTS)
    with pytest.raises(DataError, match=r"data\.unit_column"):
        load_records(path, TASK, unit_column="subject")
