"""Fine-tuning without a federation: train, classify, generate, export, by their commands."""

import json
import re
import shutil
import stat
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import warm_python
from support.small_models import one_round, plan_for, save_decoder
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from umbel_client.cli import doctor
from umbel_client.cli.command import app
from umbel_client.cli.finetune import _loaded
from umbel_client.data.conversations import Turn, read_questions
from umbel_client.data.tables import read_table
from umbel_client.models.adapters.folder import read_adapter
from umbel_client.site.config import load_config
from umbel_common.errors import DataError, ModelError, StorageError
from umbel_common.plans.plan import (
    Adam,
    CausalLm,
    Classification,
    NoPrivacy,
    Training,
    TrainingPlan,
)
from umbel_common.plans.plan_file import plan_to_json

torch.set_num_threads(1)

CONFIG = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"

[data]
path = "data.jsonl"
public_size = {size}

[model]
path = "{model}"

[policy]
"""
PAIRS = [{"prompt": f"say {word}", "completion": word} for word in ("yes", "no", "so")] * 4
TEXTS = [{"text": f"w{index} w{index + 1}", "label": "ab"[index % 2]} for index in range(12)]
LM = CausalLm(max_tokens=96)
LABELLED = Classification(labels=("a", "b"), max_tokens=16)


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"))


class Site:
    """A folder with client.toml, plan.json and data."""

    def __init__(self, folder: Path, model: Path, plan: TrainingPlan, rows: list[Any]) -> None:
        self.folder, self.model, self.plan = folder, model, plan
        self.config = folder / "client.toml"
        self.config.write_text(CONFIG.format(model=model, size=len(rows)))
        (folder / "plan.json").write_text(plan_to_json(plan))
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(self, name: str = "alone", *more: object) -> Path:
        out = self.folder / name
        command(
            *("train", "--local", "--plan", self.folder / "plan.json"),
            *("--out", out, "--config", self.config, *more),
        )
        return out

    def run(self, name: str, *more: object) -> list[dict[str, Any]]:
        text = command(name, "--config", self.config, *more)
        return [json.loads(line) for line in text.splitlines()]


def answering_site(folder: Path, llama: Path) -> Site:
    training = Training(
        rounds=2,
        local_steps=40,
        expected_batch_size=len(PAIRS),
        optimizer=Adam(adapter_learning_rate=0.02),
    )
    plan = plan_for(llama, LM, lora={"rank": 8}, training=training, privacy=NoPrivacy())
    return Site(folder, llama, plan, PAIRS)


def labelling_site(folder: Path, model: Path) -> Site:
    # Every record in each batch: noise for that is calibrated at once.
    plan = plan_for(model, LABELLED, training=one_round(12, steps=3))
    return Site(folder, model, plan, TEXTS)


@pytest.fixture
def answering(tmp_path: Path, llama: Path) -> Site:
    return answering_site(tmp_path, llama)


@pytest.fixture
def labelling(tmp_path: Path, tiny_model: Path) -> Site:
    return labelling_site(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """The adapter that the site `answering` trains; nobody changes it."""
    return answering_site(tmp_path_factory.mktemp("answering"), llama).train()


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The adapter that the site `labelling` trains; nobody changes it."""
    return labelling_site(tmp_path_factory.mktemp("labelling"), tiny_model).train()


def test_an_adapter_trained_alone_answers_and_is_private(answering: Site, answers: Path) -> None:
    folder = answers
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "treat it as the data" in (folder / "README.md").read_text().replace("\n", " ")
    assert not (folder.parent / "state").exists()  # no ledger, no journal
    asked = ("generate", "--adapter", folder, "--prompt", "say yes", "--prompt", "say no")
    found = answering.run(*asked, "--max-new-tokens", 5)
    assert [row["prompt"] for row in found] == ["say yes", "say no"]
    assert [row["answer"] for row in found] == ["yes", "no"]
    base = answering.run(*asked, "--max-new-tokens", 5, "--base")
    assert [row["answer"] for row in base] != ["yes", "no"]


def test_questions_come_from_a_file_too(answering: Site, answers: Path) -> None:
    file = answering.folder / "data.jsonl"
    found = answering.run("generate", "--adapter", answers, "--input", file, "--max-new-tokens", 3)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in PAIRS]


QUESTIONS: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "messages": (
        [
            {"messages": [{"role": "user", "content": "say yes"}]},
            {
                "messages": [
                    {"role": "user", "content": "say no"},
                    {"role": "assistant", "content": "n"},
                ]
            },
        ],
        ["say yes", "say no"],
    ),
    "turns": (
        [{"prompt": [{"role": role, "content": "say yes"} for role in ("system", "user")]}],
        [[{"role": role, "content": "say yes"} for role in ("system", "user")]],
    ),
    "instruction": ([{"instruction": "say", "input": "yes"}, {"instruction": "say no"}], None),
    "text": (
        [{"text": "<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\nn<|im_end|>\n"}],
        ["<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\nn<|im_end|>\n"],
    ),
    "prompt before others": ([{"text": "a passage", "prompt": "say yes"}], ["say yes"]),
}


def test_questions_come_in_every_format(answering: Site, answers: Path) -> None:
    """Up to their answer, which a row may have or lack."""
    file = answering.folder / "questions.jsonl"
    asked = ("generate", "--adapter", answers, "--input", file, "--max-new-tokens", 3)
    for name, (rows, shown) in QUESTIONS.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = answering.run(*asked)
        assert [row["prompt"] for row in found] == (shown or ["say\n\nyes", "say no"]), name
        if name in ("messages", "text", "prompt before others"):
            assert found[0]["answer"] == "yes", name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "has no questions"),
        ({"prompt": " "}, "row 1 has an empty prompt"),
        ({"prompt": None}, "row 1 has an empty prompt"),
        ({"messages": []}, "row 1 has no messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "row 1 has nothing to answer"),
        ({"messages": [{"role": "user", "content": " "}]}, "row 1 has an empty message"),
        ({"instruction": 5}, "row 1 has no instruction"),
    ],
)
def test_a_row_without_a_question_is_named(tmp_path: Path, row: Any, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_questions(file, read_table(file), LM, "auto")
    assert caught.value.file == file


def test_a_plain_plan_takes_plain_questions(tmp_path: Path) -> None:
    file, plain = tmp_path / "a.jsonl", CausalLm(template="plain")
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    assert read_questions(file, read_table(file), plain, "auto") == [(Turn("user", "a"),)]
    turns = [{"role": role, "content": "a"} for role in ("system", "user")]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="takes a template"):
        read_questions(file, read_table(file), plain, "auto")


@pytest.mark.parametrize("name", ["generate", "classify"])
@pytest.mark.parametrize(
    ("text", "found"),
    [("", "an empty text"), (" \n", "an empty text"), ("a\udc80", "a character that is not UTF-8")],
)
def test_a_text_of_the_command_line_is_a_text(
    answering: Site, name: str, text: str, found: str
) -> None:
    option = "--prompt" if name == "generate" else "--text"
    arguments = ("--adapter", "alone", option, "a", option, text, "--config", answering.config)
    error = refused(DataError, name, *arguments)
    assert (error.field, error.found) == (f"{option}, number 2", found)


def test_a_file_without_the_column_of_texts_is_named(labelling: Site) -> None:
    file = labelling.folder / "other.jsonl"
    file.write_text('{"sentence": "w1"}\n')
    arguments = ("--adapter", "alone", "--input", file, "--config", labelling.config)
    error = refused(DataError, "classify", *arguments)
    assert (error.message, error.field) == ("a column is missing", "text")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--seed", -1),
        ("--seed", 2**63),
        ("--temperature", "nan"),
        ("--temperature", -1),
        ("--temperature", 1e-9),
        ("--temperature", "inf"),
        ("--max-new-tokens", 0),
        ("--max-new-tokens", 10**9),
        ("--input", "also-a-file.jsonl"),
    ],
)
def test_a_word_out_of_range_is_a_wrong_command_line(answering: Site, wrong: Any) -> None:
    asked = ("generate", "--adapter", "alone", "--prompt", "a", "--config", answering.config)
    done = CliRunner().invoke(app, [str(one) for one in (*asked, *wrong)])
    assert done.exit_code == 2


def test_the_largest_seed_is_one(answering: Site, answers: Path) -> None:
    asked = ("generate", "--adapter", answers, "--prompt", "a", "--temperature", 0.001)
    assert len(answering.run(*asked, "--max-new-tokens", 1, "--seed", 2**63 - 1)) == 1


def test_sampling_follows_its_seed(answering: Site, answers: Path) -> None:
    asked = ("generate", "--adapter", answers, "--prompt", "say", "--temperature", 1.5)
    seeds = [answering.run(*asked, "--max-new-tokens", 8, "--seed", seed) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_classifier_labels_texts(labelling: Site, labels: Path) -> None:
    found = labelling.run("classify", "--adapter", labels, "--text", "w1 w2", "--text", "w2 w3")
    assert {row["label"] for row in found} <= {"a", "b"}
    assert all(0.5 <= row["probability"] <= 1 for row in found)
    rows = labelling.run(
        "classify", "--adapter", labels, "--input", labelling.folder / "data.jsonl"
    )
    assert len(rows) == len(TEXTS)


def test_an_adapter_is_scored_on_held_out_records(answering: Site, answers: Path) -> None:
    general = answering.folder / "general.jsonl"
    general.write_text('{"text": "nothing of the kind"}\n')
    asked = ("evaluate", "--adapter", answers, "--json", "--general", general, "--config")
    found = json.loads(command(*asked, answering.config))
    base = json.loads(command(*asked, answering.config, "--base"))
    assert found["records"] == len(PAIRS)
    assert found["mean_loss"] < base["mean_loss"] / 2
    figures = found["figures"]
    assert (figures["exact_match"], figures["rouge_l"], figures["answers"]) == (1.0, 1.0, 12)
    assert figures["perplexity"] < base["figures"]["perplexity"]
    assert figures["general_perplexity"] > 1


def test_groups_have_an_accuracy_each(labelling: Site, labels: Path) -> None:
    rows = [{**row, "ward": "xy"[index % 2]} for index, row in enumerate(TEXTS)]
    file = labelling.folder / "held-out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--data", file, "--groups", "ward", "--config", labelling.config)
    text = command("evaluate", "--adapter", labels, *arguments)
    assert text.startswith("12 records: loss ")
    head, *rows_of_groups = [line.split() for line in text.splitlines()[2:]]
    assert head == ["group", "records", "accuracy"]
    assert sorted(row[:2] for row in rows_of_groups) == [["x", "6"], ["y", "6"]]
    accuracies = [float(row[2].removesuffix("%")) for row in rows_of_groups]
    assert accuracies == sorted(accuracies)


def test_training_stops_where_validation_gets_no_better(labelling: Site) -> None:
    """Steps this long only make it worse."""
    training = one_round(12, steps=1)
    training = type(training)(
        rounds=9,
        local_steps=1,
        expected_batch_size=12,
        optimizer=type(training.optimizer)(adapter_learning_rate=90.0, head_learning_rate=90.0),
    )
    plan = plan_for(labelling.model, LABELLED, training=training)
    (labelling.folder / "plan.json").write_text(plan_to_json(plan))
    out = labelling.folder / "stopped"
    text = command(
        *("train", "--local", "--plan", labelling.folder / "plan.json", "--out", out),
        *("--config", labelling.config, "--patience", 2),
        *("--validation", labelling.folder / "data.jsonl"),
    )
    assert "round 9" not in text
    best = int(text.split("adapter of round ")[1].split()[0])
    losses = [float(line.split()[-1]) for line in text.splitlines() if "loss" in line]
    assert len(losses) == best + 2


@pytest.mark.parametrize("scaling", ["standard", "rank-stabilised"])
def test_a_merged_model_has_the_logits_of_the_adapter(answering: Site, scaling: Any) -> None:
    plan = plan_for(
        answering.model,
        LM,
        lora={"rank": 4, "scaling": scaling},
        training=one_round(12, steps=20),
        privacy=NoPrivacy(),
    )
    (answering.folder / "plan.json").write_text(plan_to_json(plan))
    folder, out = answering.train(), answering.folder / "merged"
    command("export", "--adapter", folder, "--merge", "--out", out, "--config", answering.config)
    ids = torch.tensor([[1, 40, 41, 42, 2]])
    base = AutoModelForCausalLM.from_pretrained(answering.model, dtype=torch.float32)
    untrained = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
    assert float((merged - adapted).abs().max()) < 1e-4
    assert float((adapted - untrained).abs().max()) > 0.1
    assert (out / "tokenizer.json").is_file()


def test_a_merged_encoder_keeps_its_head_beside_it(labelling: Site, labels: Path) -> None:
    out = labelling.folder / "merged"
    command("export", "--adapter", labels, "--merge", "--out", out, "--config", labelling.config)
    AutoModel.from_pretrained(out)
    assert load_file(out / "head.safetensors")["weight"].shape == (2, 16)


def test_an_exported_adapter_is_the_adapter(labelling: Site, labels: Path) -> None:
    out = labelling.folder / "copy"
    command("export", "--adapter", labels, "--out", out, "--config", labelling.config)
    assert read_adapter(out)[0] == read_adapter(labels)[0]


def refused(kind: type[Exception], *arguments: object) -> Any:
    with pytest.raises(kind) as caught:
        CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    return caught.value


def test_nothing_is_written_over(labelling: Site, labels: Path) -> None:
    folder = Path(shutil.copytree(labels, labelling.folder / "alone"))
    plan = labelling.folder / "plan.json"
    config = ("--config", labelling.config)
    for arguments in (
        ("train", "--local", "--plan", plan, "--out", folder, *config),
        ("export", "--adapter", folder, "--out", folder, *config),
        ("export", "--adapter", folder, "--merge", "--out", folder, *config),
    ):
        assert refused(StorageError, *arguments).file == folder


def test_bad_records_stop_training_before_anything_is_written(labelling: Site) -> None:
    file = labelling.folder / "data.jsonl"
    file.write_text(file.read_text() + '{"text": "w1", "label": "c"}\n')
    error = refused(
        DataError,
        "train",
        "--local",
        "--plan",
        labelling.folder / "plan.json",
        "--out",
        labelling.folder / "new",
        "--config",
        labelling.config,
    )
    assert error.field == "label, row 13"
    assert not (labelling.folder / "new").exists()


def test_an_adapter_of_another_model_is_refused(labelling: Site, llama: Path, labels: Path) -> None:
    labelling.config.write_text(CONFIG.format(model=llama, size=12))
    config = ("--config", labelling.config)
    for arguments in (
        ("classify", "--adapter", labels, "--text", "w1", *config),
        ("export", "--adapter", labels, "--merge", "--out", labelling.folder / "m", *config),
    ):
        assert refused(ModelError, *arguments).field == "model.digest"


def test_a_folder_without_an_adapter_is_named(labelling: Site) -> None:
    config = ("--config", labelling.config)
    error = refused(ModelError, "classify", "--adapter", labelling.folder, "--text", "x", *config)
    assert (error.file, error.found) == (labelling.folder, "missing")
    assert error.field == "adapter_model.safetensors"
    error = refused(ModelError, "classify", "--adapter", "nowhere", "--text", "x", *config)
    assert error.found == "no such folder"


def test_a_damaged_adapter_is_named(labelling: Site, labels: Path) -> None:
    folder = Path(shutil.copytree(labels, labelling.folder / "alone"))
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    config = ("--config", labelling.config)
    error = refused(ModelError, "classify", "--adapter", folder, "--text", "x", *config)
    assert "does not fit its plan" in error.message


def test_the_doctor_measures_the_steps_of_a_plan(labelling: Site) -> None:
    """The other checks find a site without keys or a server, and say so."""
    plan = labelling.folder / "plan.json"
    # In a process of its own: it gives its network away.
    command = ("-m", "umbel_client.cli", "doctor", "--config", labelling.config)
    done = warm_python.run(*command, "--plan", plan)
    assert done.returncode == 1, done.stderr + done.stdout
    told = done.stdout.partition("ok    plan")[2]
    assert re.search(r"\d+ records of 16 tokens, computed at once, take [\d.]+ s", told)
    assert "a step on 12 records takes about" in told
    assert "GiB of memory in use" in told


def test_the_doctor_says_that_a_plan_does_not_fit_the_model(labelling: Site, llama: Path) -> None:
    plan = labelling.folder / "other.json"
    plan.write_text(plan_to_json(plan_for(llama, LM)))
    check = partial(doctor._plan, path=plan)
    finding = doctor._tried("plan", check, load_config(labelling.config))
    assert finding.verdict is doctor.Verdict.BROKEN
    assert "not the one that the plan" in finding.text


def test_a_device_that_is_named_replaces_the_list_and_what_it_divides(tmp_path: Path) -> None:
    model = 'models/m"\ndevice = ["cuda:0", "cuda:1"]\nsplit = "records'
    (tmp_path / "client.toml").write_text(CONFIG.format(model=model, size=12))
    listed = _loaded(tmp_path / "client.toml", None).model
    assert (listed.device, listed.split) == (("cuda:0", "cuda:1"), "records")
    named = _loaded(tmp_path / "client.toml", "cuda:1").model
    assert (named.device, named.split) == ("cuda:1", "layers")
