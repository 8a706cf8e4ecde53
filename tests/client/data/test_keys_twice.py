"""A key that comes twice in one object of a record is refused where its value is asked for."""

import json
from pathlib import Path

import pytest

from umbel_client.data import text_rows
from umbel_client.data.records import load_records
from umbel_client.data.tables import read_table
from umbel_common.errors import DataError
from umbel_common.plans.plan import CausalLm, Classification

TASK = Classification(labels=("a", "b"))
TURNS = '{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}'


def written(folder: Path, *lines: str) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "x", "label": "a", "label": "b"}',
        '{"text": "x", "label": "a", "label": "a"}',
        '{"text":"x","label":"a","label":"b"}',
        '{"text" : "x", "label"\t:"a", "label"  :  "b"}',
        '{"label": "b", "text": "x", "l\\u0061bel": "a"}',
        '{"text": "he said \\"no\\": \\u0022:", "label": "a", "label": "b"}',
        '{"text": "x", "label": "a", "label": "b", "score": NaN}',
        '{"text": "x", "label": {"a": 1, "a": 2}}',
    ],
)
def test_a_label_that_comes_twice_is_refused(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, '{"text": "x", "label": "a"}', line)
    with pytest.raises(DataError) as caught:
        load_records(path, TASK)
    assert "row 2 has a key twice in one object" in str(caught.value)
    assert caught.value.field == "label, row 2"


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "x", "label": "a", "id": 1, "id": 2}',
        '{"text": "x", "label": "b", "more": {"a": 1, "a": 2}}',
    ],
)
def test_what_nobody_asks_for_does_not_matter(tmp_path: Path, line: str) -> None:
    assert len(load_records(written(tmp_path, line), TASK)) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_message_with_a_key_twice_is_refused(tmp_path: Path, name: str) -> None:
    """In CSV the messages are JSON in a text."""
    for turns, fine in (
        (TURNS, True),
        (TURNS.replace('"a"', '"he: \\"yes\\": so"'), True),
        (TURNS.replace('"q"', '"q", "content": "p"'), False),
        (TURNS.replace('"role": "assistant"', '"role": "user", "role": "assistant"'), False),
    ):
        quoted = turns.replace('"', '""')
        lines = ["messages", f'"[{quoted}]"'] if name == "a.csv" else [f'{{"messages": [{turns}]}}']
        path = written(tmp_path, *lines).rename(tmp_path / name)
        if fine:
            assert len(load_records(path, CausalLm())) == 1
            continue
        with pytest.raises(DataError, match="twice"):
            load_records(path, CausalLm())


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "plain", "label": "a"}],
        [{"text": 'a : b, "c": d\n: e', "label": ": é:"}],
        [{"messages": [{"role": "user", "content": 'so: "x" : y'}]}, {"a": {"b": {}}}],
        [{"text": "x" * 200_000 + '":', "n": 2**80, "f": 0.1}] * 3,
    ],
)
def test_a_file_without_such_a_key_is_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[object]
) -> None:
    """Texts may hold whatever looks like a key; only few files are parsed again."""
    monkeypatch.delattr(text_rows, "_require_single_keys")
    for dumped in (json.dumps, lambda row: json.dumps(row, ensure_ascii=False)):
        path = written(tmp_path, *map(dumped, rows))
        assert read_table(path).rows == rows


def test_a_key_that_ends_at_the_end_of_a_piece_is_counted(tmp_path: Path) -> None:
    """Wherever the pieces of a file end in which keys are counted."""
    for size in range(131_050, 131_075):
        path = written(tmp_path, f'{{"text": "{"x" * size}", "label": "a", "label": "b"}}')
        with pytest.raises(DataError, match="twice"):
            load_records(path, TASK)
