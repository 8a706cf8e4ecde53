"""Which format a file has, and what its rows say: from every kind of file."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from umbel_client.data.conversations import (
    Conversation,
    Passage,
    Turn,
    format_of,
    read_conversations,
)
from umbel_client.data.tables import read_table
from umbel_common.errors import DataError
from umbel_common.plans.figures import Format
from umbel_common.plans.plan import CausalLm

TASK = CausalLm(loss_on="all")
USER, ANSWER = Turn("user", "What?"), Turn("assistant", "Ulcer.")
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "Ulcer."},
]
ROWS: dict[Format, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "prompt-completion": {"prompt": "What?", "completion": "Ulcer."},
    "instruction": {"instruction": "What?", "output": "Ulcer."},
    "text": {"text": "Ulcer."},
}
EVERY_KIND = ("jsonl", "csv", "parquet", "folder")


def written(folder: Path, kind: str, *rows: dict[str, Any]) -> Path:
    """The rows in a file of this kind; a column that a row lacks is empty there."""
    path = folder / f"records.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    columns = list(dict.fromkeys(column for row in rows for column in row))
    full = [{column: row.get(column) for column in columns} for row in rows]
    if kind == "csv":
        cells = [
            {c: json.dumps(v) if isinstance(v, list) else v for c, v in r.items()} for r in full
        ]
        Dataset.from_list(cells).to_csv(path)
    elif kind == "parquet":
        Dataset.from_list(full).to_parquet(path)
    else:
        Dataset.from_list(full).save_to_disk(str(path))
    return path


def read(path: Path, record_format: Format = "auto", task: CausalLm = TASK) -> list[Any]:
    return read_conversations(path, read_table(path), task, record_format)


def refused(path: Path, record_format: Format = "auto", task: CausalLm = TASK) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, record_format, task)
    assert caught.value.file == path
    return caught.value


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("name", ROWS)
def test_columns_say_the_format(tmp_path: Path, name: Format, kind: str) -> None:
    path = written(tmp_path, kind, ROWS[name], {**ROWS[name], "ward": "3"})
    assert format_of(path, read_table(path)) == name
    expected = Passage("Ulcer.") if name == "text" else Conversation((USER, ANSWER))
    assert read(path) == [expected, expected]


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("first", ROWS)
def test_a_row_of_another_format_is_named(tmp_path: Path, first: Format, kind: str) -> None:
    for second in ROWS:
        if second != first:
            error = refused(written(tmp_path, kind, ROWS[first], ROWS[first], ROWS[second]))
            assert error.message == "row 3 is of another format than the rows before it"
            assert (error.accepted, error.found) == (first, second)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_first_row_of_no_format_is_named(tmp_path: Path, kind: str) -> None:
    rows = ({"ward": "3"}, ROWS["text"], ROWS["prompt-completion"])
    error = refused(written(tmp_path, kind, *rows))
    assert (error.message, error.found) == ("row 1 is of no format", "no format")
    assert error.accepted == "prompt-completion, text"


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_rows_of_two_formats_at_once_need_a_choice(tmp_path: Path, kind: str) -> None:
    both = {**ROWS["prompt-completion"], **ROWS["text"]}
    error = refused(written(tmp_path, kind, both, both))
    assert (error.field, error.found) == ("data.format", "prompt-completion, text")
    assert read(written(tmp_path, kind, both), "text") == [Passage("Ulcer.")]


def test_a_chosen_format_needs_its_columns(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "jsonl", ROWS["instruction"]), "prompt-completion")
    assert (error.field, error.found) == ("prompt", "instruction, output")
    assert error.accepted == "for data.format prompt-completion: prompt, completion"


def test_columns_of_no_format_are_named_beside_those_of_every_format(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "csv", {"question": "a", "answer": "b"}))
    assert error.found == "question, answer"
    assert str(error.accepted).startswith("messages: messages; prompt-completion: prompt, comp")


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("prompt-completion", "completion", "has an empty completion"),
        ("prompt-completion", "prompt", "has an empty prompt"),
        ("instruction", "output", "has an empty output"),
        ("instruction", "instruction", "has no instruction"),
        ("text", "text", "has no text"),
    ],
)
@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_text_is_named(
    tmp_path: Path, kind: str, name: Format, column: str, message: str, empty: str | None
) -> None:
    error = refused(written(tmp_path, kind, ROWS[name], {**ROWS[name], column: empty}))
    assert (error.message, error.field) == (f"row 2 {message}", f"{column}, row 2")
    assert error.found == ("NoneType" if empty is None and kind != "csv" else "an empty text")


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (TURNS[:1], "does not end with an answer"),
        (TURNS[1:], "has nothing to answer"),
        ([*TURNS[:1], {"role": "assistant", "content": " "}], "has an empty answer"),
        ([{"role": "user", "content": ""}, *TURNS[1:]], "has an empty message"),
        ([{"role": "doctor", "content": "x"}, *TURNS[1:]], "has a malformed message"),
    ],
)
def test_a_bad_conversation_is_named(
    tmp_path: Path, kind: str, turns: list[Any], message: str
) -> None:
    error = refused(written(tmp_path, kind, ROWS["messages"], {"messages": turns}))
    assert (error.message, error.field) == (f"row 2 {message}", "messages, row 2")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (TURNS[:1], TURNS[:1], "does not end with an answer"),
        (TURNS[:1], [{"role": "assistant", "content": ""}], "has an empty answer"),
        (TURNS[:1], [], "has no messages"),
        ([], TURNS[1:], "has no messages"),
    ],
)
def test_a_bad_pair_of_lists_is_named(
    tmp_path: Path, kind: str, prompt: list[Any], completion: list[Any], message: str
) -> None:
    rows = [
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": prompt, "completion": completion},
    ]
    assert refused(written(tmp_path, kind, *rows)).message == f"row 2 {message}"


def test_a_prompt_of_turns_may_have_a_text_for_its_answer(tmp_path: Path) -> None:
    row = {"prompt": TURNS[:1], "completion": "Ulcer."}
    assert read(written(tmp_path, "jsonl", row)) == [Conversation((USER, ANSWER))]


def test_an_input_follows_its_instruction_and_an_empty_one_is_none(tmp_path: Path) -> None:
    rows = ({**ROWS["instruction"], "input": more} for more in ("Pain.", "", None))
    found = read(written(tmp_path, "jsonl", *rows))
    assert [record.turns[0].content for record in found] == ["What?\n\nPain.", "What?", "What?"]
    error = refused(written(tmp_path, "jsonl", {**ROWS["instruction"], "input": 5}))
    assert (error.field, error.found) == ("input, row 1", "int")


def test_a_plain_template_takes_no_conversation(tmp_path: Path) -> None:
    plain = CausalLm(template="plain")
    rows = [ROWS["messages"], {"messages": [*TURNS, *TURNS]}]
    error = refused(written(tmp_path, "jsonl", *rows), task=plain)
    assert error.message == "row 2 is a conversation, which takes a template"
    assert error.found == "user, assistant, user, assistant"
    error = refused(written(tmp_path, "csv", ROWS["text"]), task=plain)
    assert error.message == "row 1 has no answer of its own"


def test_errors_do_not_tell_what_records_say(tmp_path: Path) -> None:
    secret = {"role": "user", "content": "secret"}
    for turns in (
        [secret],
        [secret, secret],
        [secret, {"role": "assistant", "content": ""}],
        [secret, {"role": "nurse", "content": "secret"}],
        [secret, {"role": "assistant", "content": {"secret": 1}}],
    ):
        error = refused(written(tmp_path, "jsonl", {"messages": turns}))
        assert "secret" not in error.diagnostics()
