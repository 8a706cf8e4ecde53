"""Which layers a draft means: all that it names, in every architecture, or a refusal."""

from pathlib import Path

import pytest
import torch
from support.architectures import DECODERS, ENCODERS, WORDS, save_architecture
from torch import nn
from transformers import AutoModelForCausalLM, BertTokenizerFast, DeepseekV3Config

from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.adapters.targets import adapted_layers, all_linear
from umbel_client.models.base.skeleton import skeleton
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, Lora, Task

POOLED = Classification(labels=("a", "b"), max_tokens=16)
STOCK = Classification(labels=("a", "b"), max_tokens=16, head="stock")
LANGUAGE = CausalLm(max_tokens=16, template="plain")

WITH_STOCK_HEADS = ("Bert", "Roberta", "XLMRoberta", "DistilBert", "Electra", "MPNet", "ModernBert")
ALWAYS = [
    ("Roberta", STOCK),
    ("ModernBert", POOLED),
    ("Llama", POOLED),
    ("GPT2", LANGUAGE),
]
EVERY = [
    *((kind, POOLED) for kind in (*ENCODERS, *DECODERS)),
    *((kind, LANGUAGE) for kind in DECODERS),
    *((kind, STOCK) for kind in WITH_STOCK_HEADS),
]


def lora_of(folder: Path, task: Task, targets: tuple[str, ...], *layers: int) -> Lora:
    return plan_lora(
        folder,
        task,
        rank=2,
        alpha=4.0,
        target_modules=targets,
        layers=layers or None,
        method="both",
        seed=1,
    )


def adapted(lora: Lora) -> set[str]:
    end = ".lora_A.weight"
    return {
        tensor.name.removeprefix("base_model.model.").removesuffix(end)
        for tensor in lora.tensors
        if tensor.name.endswith(end)
    }


def linear_layers(folder: Path, task: Task, layer: str = "") -> set[str]:
    """Told from the model alone: what computes a product in the layers that have a number."""
    return {
        name
        for name, module in skeleton(folder, task).named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and any(part.isdecimal() and layer in ("", part) for part in name.split("."))
    }


@pytest.mark.parametrize(
    ("kind", "task"),
    [*ALWAYS, *(pytest.param(*one, marks=pytest.mark.full) for one in EVERY if one not in ALWAYS)],
)
def test_all_linear_layers_have_an_adapter_in_all_layers_or_in_one(
    tmp_path: Path, kind: str, task: Task
) -> None:
    folder = save_architecture(tmp_path / "m", kind, causal=task == LANGUAGE)
    names = all_linear(folder, task)
    wanted = linear_layers(folder, task)
    assert len(wanted) >= 4
    assert adapted(lora_of(folder, task, names)) - wanted <= {"bert.pooler.dense"}
    assert wanted <= adapted(lora_of(folder, task, names))
    assert adapted(lora_of(folder, task, names, 1)) == linear_layers(folder, task, "1")
    # Each of the names alone, too: none means nothing.
    assert all(adapted(lora_of(folder, task, (name,), 0)) for name in names)


def test_a_tower_that_reads_no_text_has_no_adapter_and_peft_finds_the_same(tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "m", "Gemma3", causal=True)
    base = skeleton(folder, LANGUAGE)
    in_tower = {name for name, _ in base.named_modules() if name.endswith("encoder.layers.0")}
    assert in_tower
    for targets in (all_linear(folder, LANGUAGE), ("q_proj",)):
        for layers in ((), (0,)):
            lora = lora_of(folder, LANGUAGE, targets, *layers)
            found = adapted(lora)
            assert len(found) == len(targets) * (1 if layers else 2)
            assert all(".language_model.layers." in name for name in found)
            # By names alone, as PEFT reads them.
            names = [name for name, _ in base.named_modules()]
            ends = tuple(f".{target}" for target in lora.target_modules)
            assert {name for name in names if f".{name}".endswith(ends)} == found


@pytest.mark.parametrize(
    ("kind", "targets", "layers", "field", "found"),
    [
        ("Llama", ("q_proj",), (0, 2), "q_proj in layer 2", "no layer 2"),
        ("GPT2", ("c_attn",), (5,), "c_attn in layer 5", "no layer 5"),
        ("Llama", ("q_proj", "query"), (), "query", "no module of that name"),
        ("Llama", ("embed_tokens",), (), "embed_tokens", "embed_tokens: Embedding"),
        ("Bert", ("pooler.dense",), (), "pooler.dense", "no module of that name"),
    ],
)
def test_what_is_asked_and_not_there_is_refused_by_name(
    tmp_path: Path,
    kind: str,
    targets: tuple[str, ...],
    layers: tuple[int, ...],
    field: str,
    found: str,
) -> None:
    folder = save_architecture(tmp_path / "m", kind)
    with pytest.raises(ModelError, match="not a linear layer") as caught:
        lora_of(folder, POOLED, targets, *layers)
    assert caught.value.field == f"lora.target_modules: {field}"
    assert caught.value.found == found


def test_a_target_that_some_layers_lack_is_refused_where_they_are_asked_for(
    tmp_path: Path,
) -> None:
    """As in models with attention in every other layer."""
    folder = save_architecture(tmp_path / "m", "Llama")
    base = skeleton(folder, POOLED)
    layers = base.get_submodule("layers")
    layers[1].self_attn.q_proj = nn.Identity()
    lora = Lora(
        rank=2,
        alpha=4.0,
        target_modules=("q_proj",),
        layers=(0, 1),
        method="both",
        seed=1,
        tensors=(),
    )
    with pytest.raises(ModelError, match="q_proj: Identity") as caught:
        adapted_layers(folder, base, lora)
    assert caught.value.field == "lora.target_modules: q_proj in layer 1"
    del layers[1].self_attn.q_proj
    with pytest.raises(ModelError, match="no module of that name in this layer"):
        adapted_layers(folder, base, lora)


def test_no_layers_and_no_names_are_no_adapter(tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "m", "Llama")
    with pytest.raises(ModelError, match="no layer") as caught:
        plan_lora(
            folder,
            POOLED,
            rank=2,
            alpha=4.0,
            target_modules=("q_proj",),
            layers=(),
            method="both",
            seed=1,
        )
    assert caught.value.field == "lora.layers"


def test_a_layer_that_two_modules_share_is_refused(tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "m", "Llama")
    base = skeleton(folder, POOLED)
    layers = base.get_submodule("layers")
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    lora = Lora(
        rank=2,
        alpha=4.0,
        target_modules=("q_proj",),
        layers=None,
        method="both",
        seed=1,
        tensors=(),
    )
    with pytest.raises(ModelError, match="share a linear layer"):
        adapted_layers(folder, base, lora)


def test_what_peft_refuses_or_puts_elsewhere_is_told_with_the_names_that_are_left(
    tmp_path: Path,
) -> None:
    folder = save_architecture(tmp_path / "mamba", "Mamba", causal=True)
    with pytest.raises(ModelError, match="PEFT does not put") as caught:
        lora_of(folder, LANGUAGE, all_linear(folder, LANGUAGE))
    assert '["dt_proj", "in_proj", "x_proj"]' in str(caught.value.remedy)
    experts = experts_beside_a_layer(tmp_path / "experts")
    with pytest.raises(ModelError, match="PEFT") as caught:
        lora_of(experts, LANGUAGE, all_linear(experts, LANGUAGE))
    assert str(caught.value.remedy).startswith("leave")


def experts_beside_a_layer(folder: Path) -> Path:
    """A mixture of experts with a layer that is named as its experts were."""
    torch.manual_seed(1)
    config = DeepseekV3Config(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder
