"""Records of a causal language model: four formats, one loss; and what cannot be learned from."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from datasets import Dataset
from support.small_models import CHATML, save_decoder

from umbel_client.data.chat import IGNORED, fitting_answers, tokenise_answers
from umbel_client.data.conversations import Conversation, Turn
from umbel_client.data.records import LmRecords, Record, Records, load_records
from umbel_client.data.tokens import fitting_texts, load_tokenizer
from umbel_common.errors import DataError, ModelError
from umbel_common.plans.plan import CausalLm

TASK = CausalLm(max_tokens=128)
QUESTION, ANSWER = "What is it?\n\nAn ulcer.", "Ulcère, 5 mm."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
TEXT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "prompt-completion": {"prompt": QUESTION, "completion": ANSWER},
    "conversational": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "instruction": {"instruction": "What is it?", "input": "An ulcer.", "output": ANSWER},
    "text": {"text": TEXT},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"))


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, task: CausalLm = TASK, **columns: Any) -> LmRecords:
    return load_records(path, task, **columns)


def refused(path: Path, task: CausalLm, folder: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        tokenise_answers(read(path, task), folder, task)
    assert str(caught.value.file) == str(path)
    return caught.value


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_same_record_is_the_same_tokens_in_every_format(
    tmp_path: Path, folder: Path, name: str, loss_on: Any
) -> None:
    task = CausalLm(max_tokens=128, loss_on=loss_on)
    tokens, labels = tokenise_answers(
        read(jsonl(tmp_path / "a.jsonl", FORMATS[name]), task), folder, task
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokens.ids) == TEXT
    counted = labels[labels != IGNORED]
    assert tokenizer.decode(counted) == (f"{ANSWER}<|im_end|>" if loss_on == "answer" else TEXT)


@pytest.mark.parametrize(
    ("name", "kind"),
    # A cell of CSV holds a text; JSON is read in `messages` alone.
    [
        (name, kind)
        for name in FORMATS
        for kind in ("csv", "parquet", "folder")
        if (name, kind) != ("conversational", "csv")
    ],
)
def test_every_kind_of_file_gives_the_same_record(tmp_path: Path, name: str, kind: str) -> None:
    row, path = FORMATS[name], tmp_path / f"a.{kind}"
    if kind == "csv":
        row = {"messages": json.dumps(TURNS)} if name == "messages" else row
        Dataset.from_list([row]).to_csv(path)
    elif kind == "parquet":
        Dataset.from_list([row]).to_parquet(path)
    else:
        Dataset.from_list([row]).save_to_disk(str(path))
    expected = read(jsonl(tmp_path / "b.jsonl", FORMATS[name]))
    assert read(path).records == expected.records


def test_earlier_turns_are_context(tmp_path: Path, folder: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *TURNS, TURNS[0], TURNS[1]]
    records = read(jsonl(tmp_path / "a.jsonl", {"messages": turns}))
    tokens, labels = tokenise_answers(records, folder, CausalLm(max_tokens=512))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(labels[labels != IGNORED]) == f"{ANSWER}<|im_end|>"
    assert tokenizer.decode(tokens.ids).endswith(TEXT)


def test_a_plain_template_ends_each_answer(tmp_path: Path, folder: Path) -> None:
    task = CausalLm(max_tokens=128, template="plain")
    records = read(jsonl(tmp_path / "a.jsonl", FORMATS["prompt-completion"]), task)
    tokens, labels = tokenise_answers(records, folder, task)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokens.ids) == f"{QUESTION}{ANSWER}<|im_end|>"
    assert tokenizer.decode(labels[labels != IGNORED]) == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"prompt": "a", "completion": " "}, "completion, row 2", "has an empty completion"),
        ({"prompt": "a", "completion": None}, "completion, row 2", "has an empty completion"),
        ({"prompt": "", "completion": "b"}, "prompt, row 2", "has an empty prompt"),
        ({"prompt": "a", "completion": 5}, "completion, row 2", "has an empty completion"),
        ({"text": "a"}, "prompt, row 2", "has an empty prompt"),
    ],
)
def test_a_bad_pair_is_named(tmp_path: Path, row: object, field: str, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", FORMATS["prompt-completion"], row)
    with pytest.raises(DataError, match=f"row 2 {message}") as caught:
        read(path, record_format="prompt-completion")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (TURNS[:1], "does not end with an answer"),
        (TURNS[1:], "has nothing to answer"),
        ([TURNS[0], {"role": "assistant", "content": " "}], "has an empty answer"),
        ([{"role": "user", "content": ""}, TURNS[1]], "has an empty message"),
        ([{"role": "doctor", "content": "x"}, TURNS[1]], "has a malformed message"),
        ([{"role": "user"}, TURNS[1]], "has a malformed message"),
        ([], "has no messages"),
        ("no JSON", "has malformed messages"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path: Path, turns: object, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", FORMATS["messages"], {"messages": turns})
    with pytest.raises(DataError, match=f"row 2 {message}"):
        read(path)


def test_formats_do_not_mix(tmp_path: Path) -> None:
    rows = [FORMATS["messages"], FORMATS["messages"], FORMATS["prompt-completion"]]
    with pytest.raises(DataError, match="row 3 is of another format") as caught:
        read(jsonl(tmp_path / "a.jsonl", *rows))
    assert (caught.value.found, caught.value.accepted) == ("prompt-completion", "messages")


def test_columns_of_several_formats_need_a_choice(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {**FORMATS["text"], **FORMATS["prompt-completion"]})
    with pytest.raises(DataError, match="several formats"):
        read(path)
    assert read(path, record_format="text") == read(path, record_format="text")


def test_columns_of_no_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of no format"):
        read(jsonl(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}))


def test_a_record_that_is_too_long_is_refused_or_cut_as_planned(
    tmp_path: Path, folder: Path
) -> None:
    long = {"prompt": "a", "completion": "b" * 300}
    path = jsonl(tmp_path / "a.jsonl", FORMATS["prompt-completion"], long)
    error = refused(path, TASK, folder)
    assert (error.field, error.found) == ("row 2", "322 tokens")
    assert "is longer than the plan allows" in error.message
    task = CausalLm(max_tokens=128, too_long="truncate")
    tokens, labels = tokenise_answers(read(path, task), folder, task)
    assert tokens.lengths.max() == 128
    assert (labels[tokens.starts[1] :] != IGNORED).sum() == 128 - 20


def test_a_cut_that_would_leave_no_answer_is_refused(tmp_path: Path, folder: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a" * 300, "completion": "b"})
    error = refused(path, CausalLm(max_tokens=128, too_long="truncate"), folder)
    assert "row 1 has nothing left of its answer" in error.message


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", chat_template=None)
    path = jsonl(tmp_path / "a.jsonl", FORMATS["messages"])
    with pytest.raises(ModelError, match="no chat template"):
        tokenise_answers(read(path), folder, TASK)


def test_what_a_template_refuses_is_named_by_its_row(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    folder = save_decoder(tmp_path / "model", chat_template=strict + CHATML)
    turns = [{"role": "system", "content": "x"}, *TURNS]
    path = jsonl(tmp_path / "a.jsonl", FORMATS["messages"], {"messages": turns})
    error = refused(path, TASK, folder)
    assert "row 2 cannot be rendered" in error.message
    assert str(error.found) == "no system"


def test_a_template_that_rewrites_its_past_is_refused(tmp_path: Path) -> None:
    rewriting = "{{ messages|length }}" + CHATML
    folder = save_decoder(tmp_path / "model", chat_template=rewriting)
    error = refused(jsonl(tmp_path / "a.jsonl", FORMATS["messages"]), TASK, folder)
    assert "another prompt with its answer than without" in error.message


def test_a_text_without_an_answer_is_refused_unless_all_of_it_counts(
    tmp_path: Path, folder: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "no template here"})
    assert "row 1 has no answer" in refused(path, TASK, folder).message
    task = CausalLm(max_tokens=128, loss_on="all")
    _, labels = tokenise_answers(read(path, task), folder, task)
    assert (labels != IGNORED).all()


def test_a_plain_template_takes_pairs_alone(tmp_path: Path) -> None:
    task = CausalLm(template="plain")
    with pytest.raises(DataError, match="takes a template"):
        read(jsonl(tmp_path / "a.jsonl", {"messages": [*TURNS, *TURNS]}), task)
    with pytest.raises(DataError, match="no answer of its own"):
        read(jsonl(tmp_path / "b.jsonl", FORMATS["text"]), task)


@pytest.mark.parametrize("too_long", ["refuse", "truncate"])
def test_what_does_not_fit_is_left_out_and_changes_no_other_record(
    tmp_path: Path, too_long: Any
) -> None:
    failing = "{{ messages[0]['content'] + 1 if 'odd' in messages[0]['content'] else '' }}"
    folder = save_decoder(tmp_path / "model", chat_template=failing + CHATML)
    task = CausalLm(max_tokens=128, too_long=too_long)
    fitting: list[dict[str, Any]] = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 6)]
    misfits: list[dict[str, Any]] = [
        {"prompt": "odd", "completion": "b"},
        {"prompt": "a" * 300, "completion": "b"},
    ]
    rows = [misfits[0], *fitting[:2], misfits[1], *fitting[2:]]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    told: list[DataError] = []
    kept, tokens, labels = fitting_answers(read(path, task), folder, task, on_misfit=told.append)
    assert kept == [1, 2, 4, 5, 6]
    assert [error.field for error in told] == ["row 1", "row 4"]
    assert [str(error.file) for error in told] == [str(path)] * 2
    alone, counted = tokenise_answers(read(jsonl(path, *fitting), task), folder, task)
    assert (tokens.digest(), labels.tolist()) == (alone.digest(), counted.tolist())
    # With none that fits there is still something to train on: nothing.
    nothing = read(jsonl(path, *misfits), task)
    assert fitting_answers(nothing, folder, task, on_misfit=told.append)[0] == []


def test_a_text_on_which_the_tokenizer_fails_is_left_out(tmp_path: Path, folder: Path) -> None:
    records = read(jsonl(tmp_path / "a.jsonl", *[FORMATS["prompt-completion"]] * 3))
    broken = Conversation((Turn("user", "half an emoji \ud83d"), Turn("assistant", "b")))
    first, _, last = records.records
    records = msgspec.structs.replace(records, records=(first, broken, last))
    told: list[DataError] = []
    kept, tokens, _ = fitting_answers(records, folder, TASK, on_misfit=told.append)
    assert (kept, len(tokens)) == ([0, 2], 2)
    assert "row 2 cannot be read by the model's tokenizer" in told[0].message


def panicking(folder: Path) -> None:
    """Lets the tokenizer of a folder panic on each character from `z` on: it looks them up in a
    table that ends before them."""
    entries = [0] + [0xFF] * (ord("z") - 1)
    table = struct.pack(f"<{len(entries)}I", *entries)
    charsmap = struct.pack("<I", len(table)) + table + b"x\0"
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(charsmap).decode(),
    }
    path.write_text(json.dumps(tokenizer))


def test_a_text_on_which_the_tokenizer_panics_is_left_out(tmp_path: Path) -> None:
    """A panic is no `Exception`: it would end the trainer, with the round open."""
    folder = save_decoder(tmp_path / "model")
    panicking(folder)
    rows = [{"prompt": text, "completion": "b"} for text in ("a", "zebra", "c")]
    records = read(jsonl(tmp_path / "a.jsonl", *rows))
    told: list[DataError] = []
    kept, _, _ = fitting_answers(records, folder, TASK, on_misfit=told.append)
    assert kept == [0, 2]
    assert "row 2 cannot be read by the model's tokenizer" in told[0].message
    texts = Records(
        source=bytes(32), records=tuple(Record(text, 0) for text in ("a", "zebra", "c"))
    )
    kept, _ = fitting_texts(texts, folder, 8, vocabulary=300, on_misfit=told.append)
    assert kept == [0, 2]


def test_a_template_reads_a_clock_that_stands_still(tmp_path: Path) -> None:
    """Else a record over which it takes its time would change the tokens of the next."""
    clock = "{{ strftime_now('%H:%M:%S.%f') }}"
    folder = save_decoder(tmp_path / "model", chat_template=clock + CHATML)
    records = read(jsonl(tmp_path / "a.jsonl", *[FORMATS["prompt-completion"]] * 3))
    tokens, _ = tokenise_answers(records, folder, TASK)
    again, _ = tokenise_answers(records, folder, TASK)
    assert tokens.digest() == again.digest()
    starts = tokens.starts[:-1]
    assert len({tokens.ids[start : start + 15].tobytes() for start in starts}) == 1


def test_a_token_that_the_model_does_not_know_is_left_out(tmp_path: Path, folder: Path) -> None:
    records = read(jsonl(tmp_path / "a.jsonl", *[FORMATS["prompt-completion"]] * 2))
    tokens, _ = tokenise_answers(records, folder, TASK)
    most = int(tokens.ids.max())
    for vocabulary, kept in ((most + 1, [0, 1]), (most, [])):
        told: list[DataError] = []
        found, _, _ = fitting_answers(
            records, folder, TASK, vocabulary=vocabulary, on_misfit=told.append
        )
        assert found == kept
        assert len(told) == 2 - len(kept)


def test_a_template_is_used_as_it_is_asked_for(tmp_path: Path) -> None:
    """Named templates without a default are none; one that wants a system turn first is one."""
    named = save_decoder(tmp_path / "named", chat_template=None)
    config = json.loads((named / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": CHATML} for name in ("rag", "tools")]
    (named / "tokenizer_config.json").write_text(json.dumps(config))
    path = jsonl(tmp_path / "a.jsonl", FORMATS["messages"])
    with pytest.raises(ModelError, match="conversations alone") as caught:
        tokenise_answers(read(path), named, TASK)
    assert caught.value.found == "the templates rag, tools"
    wants = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    )
    folder = save_decoder(tmp_path / "system", chat_template=wants + CHATML)
    path = jsonl(path, {"messages": [{"role": "system", "content": "x"}, *TURNS]})
    assert len(tokenise_answers(read(path), folder, TASK)[0]) == 1


def test_errors_do_not_tell_what_records_say(tmp_path: Path, folder: Path) -> None:
    long = {"prompt": "secret", "completion": "secret" * 100}
    error = refused(jsonl(tmp_path / "a.jsonl", long), TASK, folder)
    assert "secret" not in error.diagnostics()


def test_no_record_is_dropped(tmp_path: Path, folder: Path) -> None:
    rows = [
        FORMATS["prompt-completion"],
        *({"prompt": "a", "completion": "b" * n} for n in range(1, 40)),
    ]
    tokens, _ = tokenise_answers(read(jsonl(tmp_path / "a.jsonl", *rows)), folder, TASK)
    assert len(tokens) == len(rows)
    assert np.array_equal(np.diff(tokens.lengths[1:]), np.ones(38))
