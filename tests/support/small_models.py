"""Random models and plans for them, small enough for tests that really train."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    JetMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    ZambaConfig,
)

from umbel_client.models.adapters.lora import plan_lora
from umbel_common.plans.plan import (
    Aggregation,
    BaseModel,
    CausalLm,
    LocalPrivacy,
    Sgd,
    Task,
    Training,
    TrainingPlan,
)
from umbel_host.files.model_digest import folder_digest

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first tokens of every vocabulary."""


def save_bert(
    path: Path,
    words: Sequence[str],
    *,
    change: Callable[[BertModel], None] = lambda model: None,
    **config: Any,
) -> Path:
    """Saves a random BERT and its tokenizer.

    Args:
        path: folder of both; also returned.
        words: of the vocabulary, after `SPECIAL`.
        change: what is done to the weights before they are saved.
        config: of `BertConfig`; two attention heads unless it says otherwise.
    """
    torch.set_num_threads(1)
    torch.manual_seed(1)
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    model = BertModel(
        BertConfig(**{"num_attention_heads": 2, "vocab_size": len(vocabulary), **config})
    )
    with torch.no_grad():
        change(model)
    model.save_pretrained(path)
    BertTokenizerFast(vocab=vocabulary).save_pretrained(path)
    return path


def save_telling_bert(path: Path, words: Sequence[str]) -> Path:
    """Saves a model in which texts of different words have nearly orthogonal gradients: the easiest
    to audit."""

    def nothing_but_words(model: BertModel) -> None:
        model.embeddings.word_embeddings.weight[: len(SPECIAL)] = 0
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()

    return save_bert(
        path,
        words,
        change=nothing_but_words,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
    )


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of SmolLM2 and Qwen, without their default system message."""

DECODERS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gpt2": GPT2Config,
}


FUSED: dict[str, type[PreTrainedConfig]] = {"phi3": Phi3Config}
"""With one layer, `qkv_proj`, in place of three."""

SHARING: dict[str, type[PreTrainedConfig]] = {"zamba": ZambaConfig}
"""With one attention for several layers."""

EXPERTS: dict[str, type[PreTrainedConfig]] = {"mixtral": MixtralConfig, "jetmoe": JetMoeConfig}
"""Mixtures of experts, which have no place under differential privacy."""


def save_decoder(
    path: Path, kind: str = "llama", *, chat_template: str | None = CHATML, **config: Any
) -> Path:
    """Saves a random causal language model over bytes, and its tokenizer.

    Args:
        path: folder of both; also returned.
        kind: one of `DECODERS`, `FUSED`, `SHARING` or `EXPERTS`.
        config: of its configuration, beside what makes it small.
    """
    torch.set_num_threads(1)
    torch.manual_seed(1)
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    fast.chat_template = chat_template
    sizes: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": len(vocabulary)}
    model = AutoModelForCausalLM.from_config(
        {**DECODERS, **FUSED, **SHARING, **EXPERTS}[kind](**{**sizes, **config})
    )
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def plan_for(
    folder: Path, task: Task, lora: dict[str, Any] | None = None, **parts: Any
) -> TrainingPlan:
    """One step of plain gradient descent at learning rate 1 on an expected batch of one record.

    Args:
        folder: of the base model.
        lora: arguments of `plan_lora` that differ from those here.
        parts: of the plan, instead of those here.
    """
    settings: dict[str, Any] = {
        "rank": 2,
        "alpha": 4.0,
        "target_modules": ("q_proj", "v_proj")
        if isinstance(task, CausalLm)
        else ("query", "value"),
        "layers": None,
        "method": "both",
        "seed": 5,
    }
    fields: dict[str, Any] = {
        "federation": "f",
        "job": "j",
        "model": BaseModel(name="tiny", digest=folder_digest(folder)),
        "task": task,
        "lora": plan_lora(folder, task, **{**settings, **(lora or {})}),
        "training": one_round(1),
        "privacy": LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0),
        "aggregation": Aggregation(threshold=2, clip_range=1.0, step=1e-6),
    }
    return TrainingPlan(**{**fields, **parts})


def one_round(expected_batch_size: int, steps: int = 1) -> Training:
    """A round of so many steps of plain descent, at learning rate 1: its delta is their sum."""
    return Training(
        rounds=1,
        local_steps=steps,
        expected_batch_size=expected_batch_size,
        optimizer=Sgd(adapter_learning_rate=1.0, head_learning_rate=1.0),
    )
