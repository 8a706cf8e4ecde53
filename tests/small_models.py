"""Random models and plans for them, small enough for tests that really train."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from umbel_client.model import folder_digest, plan_lora
from umbel_common.plan import (
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Sgd,
    Training,
    TrainingPlan,
)

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


def plan_for(
    folder: Path, task: Classification, lora: dict[str, Any] | None = None, **parts: Any
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
        "target_modules": ("query", "value"),
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
