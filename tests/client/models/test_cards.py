"""What an adapter's folder says of itself runs: the lines of its card, for each kind of model."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModelForCausalLM
from support.architectures import save_architecture
from support.chat_templates import SHAPES, save_shape
from support.small_models import CHATML, plan_for, save_decoder
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Turn
from umbel_client.data.tokens import tokenise
from umbel_client.evaluation.inference import classify_texts
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.folder import export_adapter, read_adapter, write_adapter
from umbel_client.models.adapters.merge import merge_adapter
from umbel_common.plans.plan import CausalLm, Classification, Task, TrainingPlan

LABELS = ("fracture", "fever", "cough")
TEXT = "w1 w2 w9 w4"


def adapter_of(folder: Path, base: Path, task: Task, **lora: Any) -> TrainingPlan:
    """Writes an adapter that changes what the model says."""
    plan = plan_for(base, task, lora)
    values = np.random.default_rng(3).normal(0, 0.3, plan.lora.size).astype(np.float32)
    write_adapter(folder, plan, values, None, base_model=base)
    return plan


def said_by_card(folder: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the lines of the card print."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    lines = found.group(1)
    for there, here in (
        ('"path or hub id of the base model"', repr(str(base))),
        ('folder = "."', f"folder = {str(folder)!r}"),
        ("the text to label", TEXT),
    ):
        lines = lines.replace(there, here)
    capsys.readouterr()
    with warnings.catch_warnings():
        # PEFT looks how the base model stores its weights.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        exec(compile(lines, "README.md", "exec"), {})  # our own card
    return capsys.readouterr().out.strip()


def without_padding(folder: Path) -> Path:
    """As GPT-2's tokenizer: no token fills a batch."""
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    words = BertTokenizerFast(vocab=vocabulary, pad_token=None, eos_token="[SEP]")
    assert words.pad_token is None
    words.save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    return without_padding(save_architecture(folder, "GPT2"))


def encoder(folder: Path) -> Path:
    return save_architecture(folder, "Bert")


def llama(folder: Path) -> Path:
    return save_architecture(folder, "Llama")


@pytest.mark.parametrize(
    ("build", "head", "lora"),
    [
        (encoder, "mean-pool", {"target_modules": ()}),
        (encoder, "stock", {"target_modules": ()}),
        (encoder, "stock", {"target_modules": ("query", "dense"), "layers": (1,)}),
        (gpt2, "mean-pool", {"target_modules": ("c_attn",), "layers": (0,)}),
        (llama, "mean-pool", {"target_modules": ("q_proj", "down_proj"), "layers": (1,)}),
    ],
)
def test_the_card_of_a_classification_says_what_umbel_says(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    build: Callable[[Path], Path],
    head: Any,
    lora: dict[str, Any],
) -> None:
    base, folder = build(tmp_path / "base"), tmp_path / "adapter"
    task = Classification(labels=LABELS, max_tokens=16, head=head)
    adapter_of(folder, base, task, **lora)
    plan, vector = read_adapter(folder)
    model = AdaptedModel.load(base, plan)
    model.set_vector(vector)
    (wanted,) = classify_texts(model, tokenise([TEXT], base, 16))
    assert said_by_card(folder, base, capsys) == f"['{wanted.label}']"
    is_peft = (folder / "adapter_config.json").exists()
    assert is_peft == bool(lora["target_modules"])
    # A copy is the same, and read again.
    export_adapter(folder, tmp_path / "copy")
    assert np.array_equal(read_adapter(tmp_path / "copy")[1], vector)
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_card_of_a_language_model_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: Any
) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_decoder(base, chat_template=CHATML if template == "chat" else None)
    adapter_of(folder, base, CausalLm(max_tokens=64, template=template))
    torch.manual_seed(1)
    said_by_card(folder, base, capsys)
    assert ("apply_chat_template" in (folder / "README.md").read_text()) == (template == "chat")


@pytest.mark.parametrize("name", ["phi3", "llama3", "gemma", "channels", "qwen3", "lines"])
def test_an_answer_ends_where_umbel_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Phi-3's settings of generation do not name the token that ends a turn."""
    base, folder = save_shape(tmp_path / "base", SHAPES[name]), tmp_path / "adapter"
    settings = base / "generation_config.json"
    kept = settings.read_text() if settings.exists() else None
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig.from_pretrained(base, **sizes, **heads)).save_pretrained(base)
    settings.unlink() if kept is None else settings.write_text(kept)
    task = CausalLm(max_tokens=64)
    adapter_of(folder, base, task)
    generate, given = PeftModelForCausalLM.generate, []

    def noted(self: Any, **options: Any) -> Any:
        given.append(options["eos_token_id"])
        return generate(self, **{**options, "max_new_tokens": 1})

    monkeypatch.setattr(PeftModelForCausalLM, "generate", noted)
    said_by_card(folder, base, capsys)
    chat = Chat.load(base, task)
    assert given == [sorted(chat.ends(chat.frame((Turn("user", "the question to answer"),))))]
    assert given[0]


def test_a_merged_classification_names_its_labels(tmp_path: Path) -> None:
    base, folder = encoder(tmp_path / "base"), tmp_path / "adapter"
    task = Classification(labels=LABELS, max_tokens=16, head="stock")
    for lora in ({"target_modules": ("query",)}, {"target_modules": ()}):
        plan = adapter_of(folder, base, task, **lora)
        merged = tmp_path / f"merged-{len(lora['target_modules'])}"
        merge_adapter(folder, base, merged, dtype="float32")
        model = AdaptedModel.load(base, plan)
        model.set_vector(read_adapter(folder)[1])
        (wanted,) = classify_texts(model, tokenise([TEXT], base, 16))
        (found,) = pipeline("text-classification", str(merged))(TEXT)
        assert found["label"] == wanted.label
        assert found["score"] == pytest.approx(wanted.probability, abs=1e-4)


def test_a_merged_language_model_keeps_its_settings_of_generation(tmp_path: Path) -> None:
    base, folder = save_decoder(tmp_path / "base"), tmp_path / "adapter"
    settings = '{"eos_token_id": [2, 1], "temperature": 0.7, "do_sample": true}'
    (base / "generation_config.json").write_text(settings)
    adapter_of(folder, base, CausalLm(max_tokens=64))
    merge_adapter(folder, base, tmp_path / "merged", dtype="float32")
    assert (tmp_path / "merged" / "generation_config.json").read_text() == settings
    assert '"use_cache": false' not in (tmp_path / "merged" / "config.json").read_text()
