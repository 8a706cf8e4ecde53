"""A plan that is made without the packages that load a model is the one that is made with them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.small_models import DECODERS, FUSED, save_decoder
from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaForMaskedLM

from umbel_client.planning.draft import make_plan
from umbel_client.planning.draft_file import Draft, read_draft
from umbel_client.planning.untried import untried_plan
from umbel_common.errors import ModelError, PlanError
from umbel_common.plans.plan import CausalLm, Classification, Task

DRAFT = """
federation = "clinics"
job = "triage"
seed = 5
model = { name = "tiny", path = "model" }
task = { task = "classification", labels = ["a", "b"], max_tokens = 16 }
lora = { rank = 2, alpha = 4.0, target_modules = ["query"], method = "ffa" }
privacy = { mode = "local", epsilon = 3.0, delta = 1e-4, clip_norm = 1.0 }
aggregation = { threshold = 3, clip_range = 1.0, step = 1e-6 }

[training]
rounds = 2
local_steps = 1
expected_batch_size = 8
optimizer = { optimizer = "sgd", adapter_learning_rate = 0.1, head_learning_rate = 0.1 }
"""
CLASSES = Classification(labels=("a", "b"), max_tokens=16)
ANSWERS = CausalLm(template="plain", max_tokens=16)


def drafted(folder: Path, model: Path, task: Task, **lora: Any) -> Draft:
    (folder / "draft.toml").write_text(DRAFT)
    draft = read_draft(folder / "draft.toml")
    return msgspec.structs.replace(
        draft,
        model=msgspec.structs.replace(draft.model, path=str(model)),
        task=task,
        lora=msgspec.structs.replace(draft.lora, **lora),
    )


def same(folder: Path, model: Path, task: Task, **lora: Any) -> None:
    draft = drafted(folder, model, task, **lora)
    assert untried_plan(draft, folder) == make_plan(draft, folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder") / "model", "qwen3")


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["dense"], "rank": 3},
        {"target_modules": ["attention.output.dense"]},
        {"target_modules": "all-linear", "scaling": "rank-stabilised"},
        {"target_modules": ["key"], "layers": (1,)},
        {"target_modules": []},
    ],
)
def test_of_an_encoder(tmp_path: Path, tiny_model: Path, lora: dict[str, Any]) -> None:
    targets = lora["target_modules"]
    lora["target_modules"] = targets if isinstance(targets, str) else tuple(targets)
    same(tmp_path, tiny_model, CLASSES, **lora)


def test_of_a_decoder(tmp_path: Path, decoder: Path) -> None:
    same(tmp_path, decoder, ANSWERS, target_modules="all-linear")
    same(tmp_path, decoder, ANSWERS, target_modules=("q_proj", "down_proj"), layers=(0,))
    same(tmp_path, decoder, CLASSES, target_modules=("q_proj", "v_proj"))


def with_tokenizer_of(model: Path, other: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((other / name).read_bytes())
    return model


@pytest.mark.full
@pytest.mark.parametrize("kind", [*DECODERS, *FUSED])
def test_of_each_decoder(tmp_path: Path, kind: str) -> None:
    model = save_decoder(tmp_path / "model", kind)
    same(tmp_path, model, ANSWERS, target_modules="all-linear")
    last = make_plan(drafted(tmp_path, model, ANSWERS, target_modules="all-linear"), tmp_path)
    same(tmp_path, model, CLASSES, target_modules=last.lora.target_modules)


@pytest.mark.full
def test_of_other_encoders(tmp_path: Path, tiny_model: Path) -> None:
    torch.manual_seed(1)
    small: dict[str, Any] = {"vocab_size": 60, "max_position_embeddings": 20}
    roberta = RobertaConfig(
        **small, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    RobertaForMaskedLM(roberta).save_pretrained(tmp_path / "roberta")
    distil = DistilBertConfig(**small, dim=16, n_layers=2, n_heads=2, hidden_dim=8)
    DistilBertModel(distil).save_pretrained(tmp_path / "distil")
    for name in ("roberta", "distil"):
        model = with_tokenizer_of(tmp_path / name, tiny_model)
        same(tmp_path, model, CLASSES, target_modules="all-linear")
    longer = msgspec.structs.replace(CLASSES, max_tokens=19)
    for make in (untried_plan, make_plan):
        # RoBERTa never reads the first two of its positions.
        with pytest.raises(ModelError, match="longer texts"):
            make(drafted(tmp_path, tmp_path / "roberta", longer, target_modules=("key",)), tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lora": {"target_modules": ("q_proj",)}}, ModelError, "query"),
        ({"lora": {"target_modules": ("word_embeddings",)}}, ModelError, "query"),
        ({"lora": {"target_modules": ("query",), "layers": (7,)}}, ModelError, "in layer 7"),
        ({"lora": {"use_dora": True}}, PlanError, "accepted: false"),
        ({"task": {"max_tokens": 4000}}, ModelError, "longer texts"),
        ({"task": {"head": "stock"}}, ModelError, "evaluation.python"),
        ({"task": {"labels": ("flu", "Flu ")}}, PlanError, "alike"),
        ({"lora": {"target_modules": ("query",), "layers": ()}}, PlanError, "in no layer"),
    ],
)
def test_what_does_not_fit_is_refused_as_it_is_with_the_model(
    tmp_path: Path, tiny_model: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    task = msgspec.structs.replace(CLASSES, **change.get("task", {}))
    with pytest.raises(error) as caught:
        untried_plan(drafted(tmp_path, tiny_model, task, **change.get("lora", {})), tmp_path)
    assert words in str(caught.value)


def test_an_unknown_architecture_is_not_guessed(tmp_path: Path, decoder: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in decoder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    with pytest.raises(ModelError, match="needs the packages") as caught:
        untried_plan(drafted(tmp_path, model, ANSWERS), tmp_path)
    assert caught.value.found == "mixtral"
    (model / "config.json").write_text(json.dumps(config))
    save_file(
        {"x": next(iter(load_file(decoder / "model.safetensors").values()))},
        model / "model.safetensors",
    )
    with pytest.raises(ModelError, match="no linear layer"):
        untried_plan(drafted(tmp_path, model, ANSWERS), tmp_path)


WITHOUT = """
import runpy, sys
for name in ("torch", "transformers", "peft", "opacus", "datasets", "pyarrow"):
    sys.modules[name] = None
sys.argv = ["drafting", *sys.argv[1:]]
runpy.run_module("umbel_client.drafting", run_name="__main__")
"""


def test_it_needs_nothing_that_an_operator_does_not_install(
    tmp_path: Path, tiny_model: Path
) -> None:
    path = tmp_path / "draft.toml"
    path.write_text(DRAFT.replace('path = "model"', f'path = "{tiny_model}"'))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["not_tried"] is True
    path.write_text(DRAFT.replace("rounds = 2", "round = 2"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 10
    assert "round" in done.stderr
