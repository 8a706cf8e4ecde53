"""`umbel-client data stats` and `split`: records in figures, and in parts."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.data_commands import KINDS, PAIRS, TEXTS, command, config_file, refused, shown, written
from support.small_models import save_decoder
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_client.data.chat import tokenise_answers
from umbel_client.data.records import load_records
from umbel_common.errors import DataError, ModelError
from umbel_common.plans.plan import CausalLm, Classification


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run where no client.toml is."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"))


def stats(*arguments: object) -> Any:
    return json.loads(command("stats", *arguments, "--json"))


def test_tokens_are_those_that_training_sees(tmp_path: Path, llama: Path) -> None:
    file = written(tmp_path / "a.jsonl", PAIRS)
    task = CausalLm(max_tokens=512)
    tokens, _ = tokenise_answers(load_records(file, task), llama, task)
    found = stats(file, "--model", llama, "--unit", "patient")
    lengths = sorted(tokens.lengths.tolist())
    assert found["tokens"] == {
        "least": lengths[0],
        "median": lengths[9],
        "percentile_95": lengths[18],
        "most": lengths[-1],
    }
    assert found["units"] == 5
    assert found["records_per_unit"] == dict.fromkeys(found["tokens"], 4)
    for cut in found["cuts"]:
        assert cut["longer"] == sum(length > cut["max_tokens"] for length in lengths)
    assert [cut["max_tokens"] for cut in found["cuts"]] == [32, 64]
    assert found["cuts"][-1]["longer"] == 0


def test_answers_that_a_cut_leaves_nothing_of_are_counted(tmp_path: Path, llama: Path) -> None:
    file = written(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "y" * 100, "completion": "x"}])
    at = {cut["max_tokens"]: cut for cut in stats(file, "--model", llama)["cuts"]}
    assert (at[64]["longer"], at[64]["unanswered"]) == (1, 1)
    assert (at[128]["longer"], at[128]["unanswered"]) == (0, 0)
    assert shown("stats", file, "--model", llama)["at 64"] == (
        "1 record cut, 1 of them to no answer"
    )


def test_pairs_and_texts_are_counted_without_a_chat_template(tmp_path: Path) -> None:
    bare = save_decoder(tmp_path / "bare", chat_template=None)
    file = written(tmp_path / "a.jsonl", [{"prompt": "abc", "completion": "de"}])
    assert stats(file, "--model", bare)["tokens"]["most"] == 6
    file = written(tmp_path / "b.jsonl", [{"text": "abcde"}])
    assert stats(file, "--model", bare)["tokens"]["most"] == 6
    turns = [{"role": role, "content": "secret"} for role in ("user", "assistant")] * 2
    file = written(tmp_path / "c.jsonl", [{"messages": turns}])
    error = refused(ModelError, "stats", file, "--model", bare)
    assert error.message == "the base model's tokenizer has no chat template"


def test_without_a_model_no_token_is_counted(tmp_path: Path) -> None:
    found = stats(written(tmp_path / "a.csv", TEXTS))
    assert (found["tokens"], found["cuts"], found["units"]) == (None, None, None)
    assert found["labels"] == {"a": 10, "b": 10}


def test_many_labels_are_shown_in_part(tmp_path: Path) -> None:
    rows = [{"text": str(n), "label": f"label {n:02}"} for n in range(15)]
    text = shown("stats", written(tmp_path / "a.csv", rows))["labels"]
    assert text.startswith("label 00 1, ")
    assert text.endswith("label 09 1 and 5 more")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("by", ["record", "patient"])
def test_parts_can_be_read_again(tmp_path: Path, name: str, by: str) -> None:
    out = tmp_path / "out"
    shares = ("--shares", "0.6,0.2,0.2")
    file = written(tmp_path / name, TEXTS)
    found = shown("split", file, "--out", out, "--by", by, *shares)
    of_units = {"record": ("", ""), "patient": (", 3 units", ", 1 units")}[by]
    assert found["train"] == f"12 records{of_units[0]}, 60.0 %"
    assert found["test"] == f"4 records{of_units[1]}, 20.0 %"
    task = Classification(labels=("a", "b"))
    parts = [load_records(out / f"{n}.jsonl", task) for n in ("train", "validation", "test")]
    whole = load_records(file, task)
    assert sorted(text for part in parts for text in part.texts) == sorted(whole.texts)


@pytest.mark.parametrize("name", KINDS)
def test_a_patient_is_in_one_part_only(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name, TEXTS)
    command("split", file, "--out", tmp_path / "out", "--by", "patient", "--shares", "0.6,0.2,0.2")
    seen: list[set[object]] = []
    for part in ("train", "validation", "test"):
        lines = (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()
        seen.append({json.loads(line)["patient"] for line in lines})
    assert sum(map(len, seen)) == len(set().union(*seen)) == 5


def test_the_seed_decides(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", TEXTS)
    texts = []
    for number, seed in enumerate((4, 4, 5)):
        out = tmp_path / f"out{number}"
        command("split", file, "--out", out, "--by", "record", "--seed", seed)
        texts.append([(out / name).read_text() for name in sorted(os.listdir(out))])
    assert texts[0] == texts[1] != texts[2]


def test_by_record_forgets_the_units_of_client_toml(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", TEXTS)
    config = config_file(tmp_path, file, tmp_path, 'unit_column = "patient"')
    arguments = ("split", "--out", tmp_path / "out", "--config", config)
    found = shown(*arguments, "--by", "record")
    assert found["groups"] == "20 that stay together, the largest of 1 record"


def test_groups_too_large_for_the_shares_are_told(tmp_path: Path) -> None:
    rows = [*PAIRS, {**PAIRS[0], "patient": "p1"}, {**PAIRS[0], "patient": "p2"}]
    file = written(tmp_path / "a.jsonl", rows)
    arguments = ("split", file, "--by", "patient", "--shares", "0.6,0.4,0", "--out")
    text = command(*arguments, tmp_path / "a")
    assert "3 that stay together, the largest of 14 records" in text
    assert "see --repeated leave-out" in text
    text = command(*arguments, tmp_path / "b", "--repeated", "leave-out")
    assert "5 that stay together, the largest of 5 records" in text
    assert "--repeated" not in text


@pytest.mark.parametrize("shares", ["0.8,0.2", "0.8,0.1,0.2", "1.2,-0.1,-0.1", "a,b,c", "nan,0,1"])
def test_shares_that_are_none_are_refused(tmp_path: Path, shares: str) -> None:
    file = written(tmp_path / "a.jsonl", TEXTS)
    arguments = ("data", "split", file, "--out", tmp_path / "o", "--by", "record")
    done = CliRunner().invoke(app, [*map(str, arguments), "--shares", shares])
    assert done.exit_code == 2
    assert not (tmp_path / "o").exists()


def test_a_file_with_a_wrong_row_is_not_split(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [*PAIRS, {**PAIRS[0], "completion": ""}])
    error = refused(DataError, "split", file, "--out", tmp_path / "out", "--by", "record")
    assert error.field == "completion, row 21"
    error = refused(DataError, "split", file, "--out", tmp_path / "out", "--by", "person")
    assert error.field == "person"
    assert not (tmp_path / "out").exists()
