"""`umbel-client data check`: what people are told of their records, and what stops them."""

import functools
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.data_commands import (
    KINDS,
    PAIRS,
    TEXTS,
    command,
    config_file,
    plan_file,
    refused,
    shown,
    written,
)
from support.small_models import CHATML, save_bert, save_decoder
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_client.data.chat import tokenise_answers
from umbel_client.data.records import load_records
from umbel_client.data.tokens import load_tokenizer
from umbel_client.models.base.skeleton import skeleton
from umbel_common.errors import ConfigError, DataError, ModelError
from umbel_common.plans.plan import CausalLm, Classification


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run where no client.toml is."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["secret", *map(str, range(20))]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return save_bert(tmp_path_factory.mktemp("bert"), words, max_position_embeddings=64, **sizes)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_checked_without_anything_else(tmp_path: Path, name: str) -> None:
    found = shown("check", written(tmp_path / name, PAIRS), "--unit", "patient")
    assert (found["format"], found["records"]) == ("prompt-completion", "20")
    assert found["units"].startswith("5; records of each: 4 to 4")
    assert found["repeated"] == "no record"
    found = shown("check", written(tmp_path / f"b{name}", TEXTS))
    assert (found["format"], found["labels"]) == ("classification", "a 10, b 10")


def test_client_toml_says_where_records_are_and_what_they_are(tmp_path: Path, bert: Path) -> None:
    rows = [{"note": row["text"], "organ": row["label"], "who": row["patient"]} for row in TEXTS]
    file = written(tmp_path / "a.csv", rows)
    data = (
        'text_column = "note"\nlabel_column = "organ"\nunit_column = "who"\n'
        "max_records_per_unit = 3"
    )
    config = config_file(tmp_path, file, bert, data, ("a", "b"))
    found = shown("check", "--config", config)
    assert found["file"] == str(file)
    assert found["left out"] == "5 records past 3 of a unit"
    error = refused(
        DataError,
        *("check", "--config", config_file(tmp_path, file, bert, data, ("a", "c"))),
    )
    assert (error.field, error.found, error.accepted) == ("organ, row 2", "'b'", "a, c")


def test_client_toml_of_this_folder_is_taken(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file(tmp_path, written(tmp_path / "a.jsonl", TEXTS), bert)
    monkeypatch.chdir(tmp_path)
    assert shown("check")["records"] == "20"
    assert shown("stats")["tokens"].startswith("4 to 4")


def test_without_a_file_and_client_toml_the_latter_is_asked_for() -> None:
    for name in ("check", "stats"):
        assert str(refused(ConfigError, name).file) == "client.toml"


def test_what_stands_there_twice_is_told_by_its_row(tmp_path: Path) -> None:
    again = [
        {**TEXTS[3], "text": " secret \t3"},
        {**TEXTS[4], "label": "b"},
        {**TEXTS[5], "patient": 9},
    ]
    file = written(tmp_path / "a.jsonl", [*TEXTS, *again])
    lines = command("check", file, "--unit", "patient").splitlines()
    assert "repeated  3 records: rows 21, 22, 23" in lines
    assert "          2 units have a record that another has too" in lines
    assert "          with another label: 1 record: row 22" in lines


def test_only_the_first_of_many_rows_are_told(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [PAIRS[0]] * 15)
    rows = ", ".join(map(str, range(2, 12)))
    assert shown("check", file)["repeated"] == f"14 records: rows {rows} and 4 more"


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_row_stops_the_check(tmp_path: Path, name: str) -> None:
    rows = [PAIRS[0], {**PAIRS[1], "completion": " "}, {**PAIRS[2], "prompt": ""}, PAIRS[3]]
    error = refused(DataError, "check", written(tmp_path / name, rows))
    assert error.message == "row 2 has an empty completion"


@pytest.mark.parametrize("name", KINDS)
def test_every_wrong_row_can_be_named_at_once(tmp_path: Path, name: str) -> None:
    rows = [PAIRS[0], {**PAIRS[1], "completion": " "}, {**PAIRS[2], "prompt": ""}, PAIRS[3]]
    file = written(tmp_path / name, rows)
    done = CliRunner().invoke(app, ["data", "check", str(file), "--all"])
    assert isinstance(done.exception, DataError)
    assert done.exception.message == "rows of a data file are no records: 2"
    assert done.stderr.splitlines() == [
        "row 2 has an empty completion (completion, row 2): found an empty text;"
        " accepted: a text that is not empty",
        "row 3 has an empty prompt (prompt, row 3): found an empty text;"
        " accepted: a text that is not empty",
    ]
    assert shown("check", written(tmp_path / f"good{name}", PAIRS), "--all")["records"] == "20"


def test_a_column_that_is_missing_is_named_once(tmp_path: Path, bert: Path) -> None:
    file = written(tmp_path / "a.jsonl", PAIRS)
    error = refused(DataError, "check", file, "--all", "--unit", "person")
    assert (error.message, error.field) == ("a column is missing", "person")
    config = config_file(tmp_path, file, bert, 'format = "instruction"')
    error = refused(DataError, "check", "--all", "--config", config)
    assert (error.message, error.field) == ("a column is missing", "instruction")


def test_wrong_rows_are_named_up_to_a_hundred(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [PAIRS[0], *[{**PAIRS[0], "prompt": ""}] * 101])
    done = CliRunner().invoke(app, ["data", "check", str(file), "--all"])
    assert isinstance(done.exception, DataError)
    assert done.exception.message == "rows of a data file are no records: 100 or more"
    assert len(done.stderr.splitlines()) == 100


@pytest.mark.parametrize("name", KINDS)
def test_labels_beside_a_plans_and_rows_without_a_unit_are_named(
    tmp_path: Path, bert: Path, name: str
) -> None:
    file = written(tmp_path / name, [*TEXTS, {**TEXTS[0], "label": "c"}])
    plan = plan_file(tmp_path, bert, Classification(labels=("a", "b")))
    error = refused(DataError, "check", file, "--plan", plan)
    assert (error.field, error.accepted) == ("label, row 21", "a, b")
    file = written(tmp_path / f"unit{name}", [*PAIRS, {**PAIRS[0], "patient": ""}])
    error = refused(DataError, "check", file, "--unit", "patient")
    assert error.message == "row 21 does not say whose record it is"


@pytest.mark.parametrize("name", KINDS)
def test_formats_that_mix_are_named(tmp_path: Path, name: str) -> None:
    mixed = [
        {"prompt": "secret", "completion": "x", "text": None},
        {"prompt": None, "completion": None, "text": "secret"},
    ]
    error = refused(DataError, "check", written(tmp_path / name, mixed))
    assert error.message == "row 2 is of another format than the rows before it"


def test_a_byte_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "secret \xe4"}\n')
    error = refused(DataError, "check", file)
    assert (error.field, error.found) == ("line 2", "byte 0xe4")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a"], "a data file has one label only: there is nothing to tell apart"),
        (["a", " "], "row 2 has no label"),
        (["a", "secret" * 40], "row 2 has no label"),
        (["a", 1.5], "row 2 has no label"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path: Path, labels: list[Any], message: str) -> None:
    file = written(tmp_path / "a.jsonl", [{"text": "secret", "label": x} for x in labels])
    assert refused(DataError, "check", file).message == message


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["flu", "flu ", "b"], "'flu' and 'flu ' differ only in spaces"),
        (["Flu", "flu", "b"], "'Flu' and 'flu' differ only in upper and lower case"),
        (["1", "1.0", "b"], "'1' and '1.0' differ only in how the same number is written"),
        (["u\u0308", "\u00fc", "b"], "'u\\u0308' and '\u00fc' differ only in how its accents"),
    ],
)
def test_labels_that_look_alike_are_told(tmp_path: Path, labels: list[str], told: str) -> None:
    rows = [{"text": f"secret {n}", "label": label} for n, label in enumerate(labels)]
    found = shown("check", written(tmp_path / "a.jsonl", rows))
    assert "labels look alike" in found["look"]
    assert told in found["look"]


def test_units_that_look_alike_and_those_of_nobody_are_told(tmp_path: Path) -> None:
    names = ["p1", "P1", "p 2", "p  2", "unknown", "unknown", "p3"]
    rows = [{**row, "patient": name} for row, name in zip(PAIRS, names, strict=False)]
    text = command("check", written(tmp_path / "a.csv", rows), "--unit", "patient")
    assert "'p1' and 'P1' differ only in upper and lower case" in text
    assert "'p 2' and 'p  2' differ only in spaces" in text
    assert "the unit 'unknown' has 2 records" in text


def test_texts_that_look_alike_are_told(tmp_path: Path) -> None:
    same = [" secret  3", "s\u00adecret 3", "SECRET 3", "\uff53ecret 3", "secr\u0117t 3"]
    rows = [*TEXTS, *[{**TEXTS[3], "text": text} for text in [*same, "secre\u0307t 3"]]]
    lines = shown("check", written(tmp_path / "a.jsonl", rows))
    assert lines["repeated"] == "3 records: rows 21, 22, 26"
    assert lines["alike"].startswith("2 records: rows 23, 24, but for case")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (("text", "labels"), "'labels' comes near it"),
        (("text", " label"), "' label' comes near it"),
        (("text", "LABEL", "Labels"), "'LABEL' and 'Labels' come near it"),
        (("text", "category"), "found text, category; read as whole texts"),
    ],
)
def test_texts_beside_other_columns_are_told_to_have_no_label(
    tmp_path: Path, columns: tuple[str, ...], told: str
) -> None:
    rows = [dict.fromkeys(columns, f"secret {n}") for n in range(4)]
    found = shown("check", written(tmp_path / "a.csv", rows))
    assert found["format"] == "text"
    assert "no column `label`" in found["look"]
    assert told in found["look"]


def test_texts_alone_are_told_nothing(tmp_path: Path) -> None:
    rows = [{"text": f"secret {n}", "patient": n} for n in range(4)]
    assert "look" not in shown("check", written(tmp_path / "a.csv", rows), "--unit", "patient")


def test_labels_without_a_record_and_records_without_a_label_are_counted(
    tmp_path: Path, bert: Path
) -> None:
    file = written(tmp_path / "a.csv", TEXTS)
    plan = plan_file(tmp_path, bert, Classification(labels=("a", "b", "c", "d")))
    found = shown("check", file, "--plan", plan)
    assert found["look"] == "2 of 4 labels have no record here: 'c', 'd'"
    plan = plan_file(tmp_path, bert, Classification(labels=("a", "B")))
    error = refused(DataError, "check", file, "--plan", plan)
    assert "labels of rows that the plan lacks: 'b' 10" in str(error.remedy)
    assert "'B' and 'b' differ only in upper and lower case" in str(error.remedy)


def test_a_public_size_far_off_is_told_of_the_sites_own_file(tmp_path: Path, bert: Path) -> None:
    file = written(tmp_path / "a.csv", TEXTS)
    config = config_file(tmp_path, file, bert)
    assert "public_size is 100, and there are 20" in shown("check", "--config", config)["look"]
    other = written(tmp_path / "b.csv", TEXTS)
    assert "look" not in shown("check", other, "--config", config)


def test_a_site_of_one_label_names_the_others(tmp_path: Path, bert: Path) -> None:
    file = written(tmp_path / "a.csv", [{**row, "label": "a"} for row in TEXTS])
    error = refused(DataError, "check", file)
    assert "labels = [" in str(error.remedy)
    config = config_file(tmp_path, file, bert, labels=("a", "b"))
    found = shown("check", "--config", config)
    assert found["labels"] == "a 20"
    assert "1 of 2 labels have no record here: 'b'" in command("check", "--config", config)


def test_rows_of_every_kind_of_fault_are_counted_together(tmp_path: Path) -> None:
    """Those that cannot be parsed, those without a text, and those without a label."""
    good = '{"text": "secret", "label": "a"}\n{"text": "secret", "label": "b"}\n'
    bad = '{\n[1]\n\n{"text": ""}\n{"text": "secret", "label": 1.5}\n'
    bad += '{"text": "\\ud83d", "label": "a"}\n'
    (tmp_path / "a.jsonl").write_text(good + bad)
    (tmp_path / "a.csv").write_text('text,label\nsecret,a\n"secret,b\nc,d,e\n')
    for name, numbers in (("a.jsonl", [3, 4, 5, 6, 7, 8]), ("a.csv", [2])):
        done = CliRunner().invoke(app, ["data", "check", str(tmp_path / name), "--all"])
        assert isinstance(done.exception, DataError)
        rows = [int(line.split()[1]) for line in done.stderr.splitlines()]
        assert rows == numbers
        assert "secret" not in done.stderr


def test_formats_that_mix_are_counted_too(tmp_path: Path) -> None:
    rows = [PAIRS[0], {"text": "secret"}, PAIRS[1], {"text": "secret"}]
    done = CliRunner().invoke(
        app, ["data", "check", str(written(tmp_path / "a.jsonl", rows)), "--all"]
    )
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["2", "4"]


def test_a_plan_is_met(tmp_path: Path, llama: Path) -> None:
    file = written(tmp_path / "a.jsonl", PAIRS)
    plan = plan_file(tmp_path, llama, CausalLm(max_tokens=128))
    found = shown("check", file, "--plan", plan, "--model", llama)
    assert found["plan"] == "j: causal-lm: answers, chat template, up to 128 tokens"
    assert found["too long"] == "0 records cut after 128 tokens"
    found = shown("check", file, "--plan", plan)
    assert found["too long"] == "not counted: give --model, or a client.toml"


@pytest.mark.parametrize("name", KINDS)
def test_records_too_long_for_a_plan_are_named(tmp_path: Path, llama: Path, name: str) -> None:
    rows = [{**row, "completion": "x" * 90} if n in (3, 7) else row for n, row in enumerate(PAIRS)]
    file = written(tmp_path / name, rows)
    plan = plan_file(tmp_path, llama, CausalLm(max_tokens=64))
    error = refused(DataError, "check", file, "--plan", plan, "--model", llama)
    assert error.message == "2 records are longer than the plan allows"
    assert (error.field, error.accepted) == ("rows 4, 8", "at most task.max_tokens = 64")
    assert error.found == "up to 119 tokens"
    plan = plan_file(tmp_path, llama, CausalLm(max_tokens=64, too_long="truncate"))
    found = shown("check", file, "--plan", plan, "--model", llama)
    assert found["too long"] == "2 records cut after 64 tokens"


def test_a_prompt_that_leaves_no_answer_is_named(tmp_path: Path, llama: Path) -> None:
    file = written(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "y" * 90, "completion": "x"}])
    plan = plan_file(tmp_path, llama, CausalLm(max_tokens=64, too_long="truncate"))
    error = refused(DataError, "check", file, "--plan", plan, "--model", llama)
    assert error.message == "row 21 is left with nothing of an answer"


@pytest.mark.parametrize(
    ("template", "too_long", "loss_on"),
    [
        ("chat", "refuse", "answer"),
        ("plain", "truncate", "all"),
        # The others take a second each.
        *(
            pytest.param(*rules, marks=pytest.mark.full)
            for rules in product(("chat", "plain"), ("refuse", "truncate"), ("answer", "all"))
            if rules not in (("chat", "refuse", "answer"), ("plain", "truncate", "all"))
        ),
    ],
)
def test_the_check_refuses_what_training_would(
    tmp_path: Path,
    llama: Path,
    template: Any,
    too_long: Any,
    loss_on: Any,
    replace_everywhere: Callable[[object, object], None],
) -> None:
    """At every length, of prompt and answer, around the plan's."""
    # One model for all lengths: it is loaded once.
    replace_everywhere(load_tokenizer, functools.cache(load_tokenizer))
    replace_everywhere(skeleton, functools.cache(skeleton))
    task = CausalLm(max_tokens=32, template=template, too_long=too_long, loss_on=loss_on)
    plan = plan_file(tmp_path, llama, task)
    ends = set()
    for prompt, answer in [(p, a) for p in range(1, 36, 2) for a in (1, 2, 9, 17)]:
        row = {"prompt": "y" * prompt, "completion": "x" * answer}
        file = written(tmp_path / "a.jsonl", [row])
        try:
            tokenise_answers(load_records(file, task), llama, task)
        except DataError:
            refused(DataError, "check", file, "--plan", plan, "--model", llama)
            ends.add("refused")
        else:
            command("check", file, "--plan", plan, "--model", llama)
            ends.add("taken")
    if (too_long, loss_on) != ("truncate", "all"):
        assert ends == {"refused", "taken"}


def test_a_text_of_one_token_leaves_nothing_to_learn(tmp_path: Path, llama: Path) -> None:
    task = CausalLm(max_tokens=32, loss_on="all")
    file = written(tmp_path / "a.jsonl", [{"text": "xy"}, {"text": "x"}])
    with pytest.raises(DataError, match="row 2"):
        tokenise_answers(load_records(file, task), llama, task)
    plan = plan_file(tmp_path, llama, task)
    error = refused(DataError, "check", file, "--plan", plan, "--model", llama)
    assert error.message == "row 2 is left with nothing of an answer"


def test_texts_of_a_classification_are_cut(tmp_path: Path, bert: Path) -> None:
    rows = [*TEXTS, {**TEXTS[0], "text": "secret " * 40}]
    file = written(tmp_path / "a.jsonl", rows)
    plan = plan_file(tmp_path, bert, Classification(labels=("a", "b"), max_tokens=32))
    found = shown("check", file, "--plan", plan, "--model", bert)
    assert found["too long"] == "1 record cut after 32 tokens"


def test_a_plan_longer_than_the_models_context_is_refused(tmp_path: Path, bert: Path) -> None:
    file = written(tmp_path / "a.jsonl", TEXTS)
    plan = plan_file(tmp_path, bert, Classification(labels=("a", "b"), max_tokens=128))
    error = refused(ModelError, "check", file, "--plan", plan, "--model", bert)
    assert (error.field, error.accepted) == ("task.max_tokens", "at most 64")


def test_a_missing_chat_template_is_named(tmp_path: Path, llama: Path) -> None:
    bare = save_decoder(tmp_path / "bare", chat_template=None)
    file = written(tmp_path / "a.jsonl", PAIRS)
    plan = plan_file(tmp_path, llama, CausalLm(max_tokens=128))
    error = refused(ModelError, "check", file, "--plan", plan, "--model", bare)
    assert error.message == "the base model's tokenizer has no chat template"


def test_what_a_template_refuses_is_named_by_its_row(tmp_path: Path, llama: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model = save_decoder(tmp_path / "strict", chat_template=strict + CHATML)
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    system = [{"role": "system", "content": "secret"}, *turns]
    file = written(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": system}])
    plan = plan_file(tmp_path, llama, CausalLm(max_tokens=128))
    for arguments in (("check", file, "--plan", plan), ("stats", file)):
        error = refused(DataError, *arguments, "--model", model)
        assert error.message == "row 2 cannot be rendered by the chat template"
        assert error.file == file
