"""A model that is put together tensor by tensor is the one that was loaded whole."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import plan_for, save_bert, save_decoder

from umbel_client.models import adapted_model
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters import merge
from umbel_client.models.adapters.folder import write_adapter
from umbel_client.models.adapters.merge import merge_adapter
from umbel_client.models.base import folder as base_folder
from umbel_client.models.base import weights
from umbel_client.models.base.folder import BaseContent, read_base
from umbel_client.models.base.placement import Placement, Quantisation
from umbel_client.models.base.precision import Precision
from umbel_client.models.base.weights import Place
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, Task, Tensor, TrainingPlan

torch.set_num_threads(1)

LABELS = Classification(labels=("a", "b"))
STOCK = Classification(labels=("a", "b"), head="stock")
LM = CausalLm()
WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
TARGETS = {"gpt2": ("c_attn",), "phi3": ("qkv_proj",)}


OUTPUTS = {
    "llama-both": ("lm_head.weight", 1),
    "llama-unequal": ("lm_head.weight", 2),
    "llama-renamed": ("model_lm_head.weight", 1),
    "llama-zero": ("model_lm_head.weight", 0),
}
"""An output layer beside the embedding that the configuration ties to it: its name, and its values
in those of the embedding. Transformers finds it by any character after the prefix."""


def saved(folder: Path, kind: str) -> Path:
    """A random model in bfloat16, which is how most are published."""
    if kind.startswith("bert"):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        save_bert(folder, [f"w{number}" for number in range(9)], **sizes)
    else:
        save_decoder(folder, kind.split("-")[0], tie_word_embeddings="-" in kind)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    if kind in OUTPUTS:
        name, factor = OUTPUTS[kind]
        tensors[name] = tensors[EMBEDDING] * factor
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def plan_of(folder: Path, kind: str, task: Task) -> TrainingPlan:
    return plan_for(folder, task, {"target_modules": TARGETS[kind]} if kind in TARGETS else {})


def whole(folder: Path, task: Task, placement: Placement) -> BaseContent:
    """Reads a model without places: everything float32, to be lowered and quantised afterwards."""
    return read_base(folder)


def content_of(model: AdaptedModel) -> dict[str, Any]:
    """Every tensor of a model but the random ones, its type, and what shares memory with it."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, tensor in named:
        if "lora_" in name or name.startswith("head.") or ".classifier." in name:
            continue
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
        shared = first.setdefault(id(tensor), name)
        state = getattr(tensor, "quant_state", None)
        scales = [] if state is None else [state.absmax.tolist(), state.state2.absmax.tolist()]
        found[name] = (str(tensor.dtype), bits, shared, tensor.requires_grad, scales)
    found["outputs"] = (model.frozen_output, model._plain_output)
    found["layers"] = [type(module).__name__ for module in model.modules()]
    return found


KINDS: dict[str, Task] = {
    "bert": LABELS,
    "bert-stock": STOCK,
    "llama": LM,
    "llama-tied": LM,
    "llama-both": LM,
    "llama-unequal": LM,
    "llama-renamed": LM,
    "llama-zero": LM,
    "gpt2": LM,
    "phi3": LM,
    "mixtral": LM,
}
"""Models and their tasks."""
FORMS = [
    ("bfloat16", "none"),
    ("float32", "nf4"),
    ("bfloat16", "nf4"),
    ("float32", "none"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
]
SHORT = [("llama", *FORMS[1]), ("bert-stock", *FORMS[2]), ("llama", *FORMS[5])]


@pytest.mark.parametrize(
    ("kind", "precision", "quantisation"),
    [
        *[(kind, *FORMS[0]) for kind in KINDS],
        *SHORT,
        *[
            pytest.param(kind, *form, marks=pytest.mark.full)
            for kind in KINDS
            for form in FORMS[1:]
            if (kind, *form) not in SHORT
        ],
    ],
)
def test_what_is_put_in_its_place_is_what_was_loaded_whole(
    kind: str,
    precision: Precision,
    quantisation: Quantisation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = saved(tmp_path / "model", kind)
    plan = plan_of(folder, kind, KINDS[kind])

    def load() -> dict[str, Any]:
        loaded = AdaptedModel.load(folder, plan, precision=precision, quantisation=quantisation)
        return content_of(loaded)

    placed = load()
    monkeypatch.setattr(adapted_model, "read_base", whole)
    assert placed == load()


def test_a_tensor_is_rounded_and_quantised_as_it_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    content = read_base(folder, LM, adapted_model.AsComputed(quantisation="nf4"))
    assert content.tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    content = read_base(folder, LM, adapted_model.AsComputed(quantisation="int8"))
    assert content.tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert content.tensors["lm_head.weight"].dtype == torch.float32
    content = read_base(folder, LM, adapted_model.AsComputed(precision="bfloat16"))
    assert content.tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert content.tensors[EMBEDDING].dtype == torch.float32


def exchanged(places_of: Callable[..., dict[str, Place]]) -> Callable[..., Mapping[str, Place]]:
    """Places in which two tensors of one shape are meant for each other's parameters."""

    def found(*arguments: Any) -> Mapping[str, Place]:
        places = places_of(*arguments)
        one, two = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        places[one] = replace(places[one], parameter=two)
        places[two] = replace(places[two], parameter=one)
        return places

    return found


def test_a_parameter_that_no_single_tensor_is_for_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", "llama")
    plan = plan_of(folder, "llama", LM)
    honest = content_of(AdaptedModel.load(folder, plan, precision="bfloat16"))
    monkeypatch.setattr(base_folder, "places_of", exchanged(base_folder.places_of))
    assert content_of(AdaptedModel.load(folder, plan, precision="bfloat16")) == honest
    content = read_base(folder, LM, adapted_model.AsComputed(precision="bfloat16"))
    (folder / "vocab.txt").write_text("another file that counts")
    with pytest.raises(ModelError, match="changed while it was loaded"):
        base_folder.build_base(content, LM)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_that_change_while_they_are_read_are_refused(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that are loaded are hashed, so a mixture of two files is no model of the plan."""
    folder = saved(tmp_path / "model", "llama")
    plan = plan_of(folder, "llama", LM)
    content = (folder / WEIGHTS).read_bytes()
    fill = weights._fill
    read: list[int] = []

    def fill_and_change(*arguments: Any) -> None:
        fill(*arguments)
        read.append(1)
        if len(read) == 3:
            with (folder / WEIGHTS).open("r+b") as file:
                file.seek(len(content) // 2)
                file.write(bytes(len(content) - len(content) // 2))

    monkeypatch.setattr(weights, "_fill", fill_and_change)
    with monkeypatch.context() as removed:
        removed.setattr(adapted_model, "require_digest", lambda *_: None)
        base = AdaptedModel.load(folder, plan, precision=precision).base
        assert any(not bool(parameter.any()) for parameter in base.parameters())
    read.clear()
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match="not the one that the plan names"):
        AdaptedModel.load(folder, plan, precision=precision)


@pytest.mark.parametrize(
    ("kind", "task", "dtype"),
    [("bert", STOCK, "float32"), ("gpt2", LM, "bfloat16"), ("llama-tied", LM, "bfloat16")],
)
def test_a_weight_that_is_merged_as_it_is_read_is_what_peft_merges(
    kind: str, task: Task, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path / "model", kind)
    plan = plan_of(base, kind, task)
    vector = np.random.default_rng(0).normal(0, 0.3, plan.lora.size).astype(np.float32)
    write_adapter(tmp_path / "adapter", plan, vector, None, base_model=base)
    merge_adapter(tmp_path / "adapter", base, tmp_path / "streamed", dtype=dtype)
    # As where Transformers makes a parameter of several tensors: PEFT adds the adapter.
    monkeypatch.setattr(merge, "_in_place", lambda *_: False)
    merge_adapter(tmp_path / "adapter", base, tmp_path / "whole", dtype=dtype)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes()


def without_b(tensor: Tensor) -> tuple[Tensor, ...]:
    return () if tensor.role == "lora_B" else (tensor,)


def with_a_large_product(tensor: Tensor) -> tuple[Tensor, ...]:
    """Two small tensors whose product has 4 TB."""
    rank, large = 2, 1_000_000
    shape = (large, rank) if tensor.role == "lora_B" else (rank, large)
    return (msgspec.structs.replace(tensor, shape=shape),)


@pytest.mark.parametrize("change", [without_b, with_a_large_product])
def test_a_plan_of_other_tensors_is_refused_before_they_are_multiplied(
    change: Callable[[Tensor], tuple[Tensor, ...]], tmp_path: Path
) -> None:
    base = saved(tmp_path / "model", "llama")
    plan = plan_for(base, LM, {"layers": (0,), "target_modules": ("q_proj",)})
    tensors = tuple(new for tensor in plan.lora.tensors for new in change(tensor))
    lora = msgspec.structs.replace(plan.lora, tensors=tensors)
    plan = msgspec.structs.replace(plan, lora=lora)
    vector = np.zeros(plan.lora.size, dtype=np.float32)
    write_adapter(tmp_path / "adapter", plan, vector, None, base_model=base)
    with pytest.raises(ModelError, match="does not fit the base model"):
        merge_adapter(tmp_path / "adapter", base, tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_of_several_layers_is_not_merged(dtype: Any, tmp_path: Path) -> None:
    """In the model that was written, the adapter was in all of these layers, or in none."""
    sizes = {"attn_layer_period": 3, "attn_layer_offset": 1, "attention_head_dim": 32}
    sizes |= {"num_hidden_layers": 6, "num_key_value_heads": 2, "mamba_d_state": 4}
    base = save_decoder(tmp_path / "model", "zamba", mamba_dt_rank=4, **sizes)
    plan = plan_for(base, LM, {"target_modules": ("q_proj",), "layers": (2,)})
    vector = np.ones(plan.lora.size, dtype=np.float32)
    write_adapter(tmp_path / "adapter", plan, vector, None, base_model=base)
    with pytest.raises(ModelError, match="layers of a base model share a weight"):
        merge_adapter(tmp_path / "adapter", base, tmp_path / "out", dtype=dtype)


def test_bfloat16_and_checkpointing_go_together(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    plan = plan_of(folder, "llama", LM)
    model = AdaptedModel.load(folder, plan, precision="bfloat16", checkpointing=True)
    assert len(model._checkpointed) == 3
