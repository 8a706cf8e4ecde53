"""A random causal language model with a chat template, small enough for tests that really train."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from umbel_client.models.adapters.lora import plan_lora
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    CausalLm,
    NoPrivacy,
    Training,
    TrainingPlan,
)
from umbel_host.files.model_digest import folder_digest

WORDS = tuple(f"w{number}" for number in range(20))
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def save_llama(path: Path) -> Path:
    """Saves the model and its tokenizer, whose words stand between spaces; returns `path`."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    special = ("<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>")
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


def causal_plan(folder: Path, task: CausalLm | None = None, **parts: Any) -> TrainingPlan:
    """A plan of two rounds without privacy; keyword arguments replace its parts."""
    task = task or CausalLm(max_tokens=32)
    fields: dict[str, Any] = {
        "federation": "f",
        "job": "j",
        "model": BaseModel(name="tiny", digest=folder_digest(folder)),
        "task": task,
        "lora": plan_lora(
            folder,
            task,
            rank=2,
            alpha=4.0,
            target_modules=("q_proj", "v_proj"),
            layers=None,
            method="both",
            seed=5,
        ),
        "training": Training(
            rounds=2,
            local_steps=2,
            expected_batch_size=4,
            optimizer=Adam(adapter_learning_rate=0.05),
        ),
        "privacy": NoPrivacy(),
        "aggregation": Aggregation(threshold=2, clip_range=1.0, step=1e-6),
    }
    return TrainingPlan(**{**fields, **parts})
