"""LoRA layers (Hu et al. 2021) through PEFT, and the head, by the plan's names."""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from umbel_client.models.base import int8, nf4
from umbel_client.models.base.architecture import naming_architecture
from umbel_client.models.base.folder import peft_quietly, skeleton
from umbel_client.models.base.layers import output_layer
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, Lora, Method, Scaling, Task, Tensor

PEFT_PREFIX = "base_model.model."
"""Prefix of every name that PEFT saves."""
LINEAR = (nn.Linear, Conv1D)
"""Layers that take an adapter; Conv1D is GPT-2's linear layer, its weight stored as [in, out]."""


def plan_lora(
    folder: Path,
    task: Task,
    *,
    rank: int,
    alpha: float,
    target_modules: tuple[str, ...],
    layers: tuple[int, ...] | None,
    method: Method,
    seed: int,
    scaling: Scaling = "standard",
) -> Lora:
    """The adapter of a plan, with all tensors that are trained or frozen, sorted by name.

    It needs the folder's configuration, not its weights.

    Raises:
        ModelError: a target or the head is not in the model, or is not a linear layer; or the
            architecture fails.
    """
    lora = Lora(
        rank=rank,
        alpha=alpha,
        target_modules=target_modules,
        layers=layers,
        method=method,
        seed=seed,
        tensors=(),
        scaling=scaling,
    )
    base = skeleton(folder, task)
    with naming_architecture(base):
        parameters, _head = attach(folder, base, task, lora)
    return msgspec.structs.replace(lora, tensors=tensors_of(parameters))


def attach(
    folder: Path, base: PreTrainedModel, task: Task, lora: Lora
) -> tuple[dict[str, nn.Parameter], nn.Linear | None]:
    """Puts LoRA layers into `base`, and the head on top of it.

    Returns:
        The adapter's parameters by the plan's names, sorted, and the mean-pool head on the base
        model's device (None with a stock head, which is part of `base`).

    Raises:
        ModelError: a target or the head is not in the model, or is not a linear layer.
    """
    base.requires_grad_(False)
    head_kind = task.head if isinstance(task, Classification) else "none"
    if head_kind == "stock" and not isinstance(getattr(base, "classifier", None), nn.Module):
        raise ModelError(
            "a base model has no classification head of the usual name",
            file=folder,
            field="classifier",
            found=type(base).__name__,
            accepted="task.head: mean-pool",
        )
    parameters: dict[str, nn.Parameter] = {}
    if lora.target_modules:
        check_targets(folder, base, lora)
        parameters = _attach_lora(base, task, lora)
    elif head_kind == "stock":
        classifier = base.get_submodule("classifier").requires_grad_(True)
        parameters = {
            f"{PEFT_PREFIX}classifier.{name}": parameter
            for name, parameter in classifier.named_parameters()
        }
    head = None
    if isinstance(task, Classification) and task.head == "mean-pool":
        head = nn.Linear(base.config.hidden_size, len(task.labels), device=base.device)
        parameters |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
    return dict(sorted(parameters.items())), head


def _attach_lora(base: PreTrainedModel, task: Task, lora: Lora) -> dict[str, nn.Parameter]:
    stock = isinstance(task, Classification) and task.head == "stock"
    kind = "CAUSAL_LM" if isinstance(task, CausalLm) else "FEATURE_EXTRACTION"
    config = LoraConfig(
        task_type="SEQ_CLS" if stock else kind,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        target_modules=list(lora.target_modules),
        layers_to_transform=None if lora.layers is None else list(lora.layers),
        lora_dropout=0.0,
        use_rslora=lora.scaling == "rank-stabilised",
        fan_in_fan_out=_stores_weights_turned(base, lora),
        modules_to_save=["classifier"] if stock else None,
    )
    with peft_quietly():
        adapted = get_peft_model(base, config)
    return {
        _saved_name(name): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }


def _stores_weights_turned(base: PreTrainedModel, lora: Lora) -> bool:
    """Whether the targets are Conv1D; PEFT would notice by itself, but warn."""
    found = (_modules_named(base, target) for target in lora.target_modules)
    return any(type(module) is Conv1D for modules in found for module in modules.values())


def _saved_name(live: str) -> str:
    """The name that PEFT saves a parameter by: without its adapter's name, `default`."""
    return live.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def tensors_of(parameters: Mapping[str, nn.Parameter]) -> tuple[Tensor, ...]:
    """The plan's description of an adapter's parameters."""
    tensors = []
    for name, parameter in parameters.items():
        role = next((role for role in ("lora_A", "lora_B") if f".{role}." in name), "head")
        tensors.append(
            msgspec.convert(
                {"name": name, "shape": tuple(parameter.shape), "role": role}, type=Tensor
            )
        )
    return tuple(tensors)


def require_tensors(folder: Path, parameters: Mapping[str, nn.Parameter], lora: Lora) -> None:
    """Requires that a plan's tensors are exactly those of the adapter, each once.

    Raises:
        ModelError: says which are not.
    """
    found = tensors_of(parameters)
    if sorted(lora.tensors, key=lambda tensor: tensor.name) == list(found):
        return
    here, there = set(found), set(lora.tensors)
    raise ModelError(
        "the adapter that the plan describes does not fit the base model",
        file=folder,
        field="lora.tensors",
        found=_some(here - there) or "fewer tensors, or one twice",
        accepted=_some(there - here) or "exactly the tensors of the model, each once",
    )


def _some(tensors: set[Tensor]) -> str:
    shown = sorted(f"{tensor.name} {tensor.role} {tensor.shape}" for tensor in tensors)
    return "; ".join(shown[:3])


@torch.no_grad()
def fill(parameters: Mapping[str, nn.Parameter], vector: Vector, lora: Lora) -> None:
    """Takes float32[lora.size] as the whole adapter.

    Raises:
        PlanError: the vector has another length.
    """
    for name, value in unflatten(vector, lora.tensors).items():
        parameters[name].copy_(torch.from_numpy(np.array(value)))


@torch.no_grad()
def fold(base: PreTrainedModel) -> None:
    """Adds each LoRA layer to the weight that it adapts, and takes PEFT's modules out of `base`."""
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save["default"]
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, plain)


def check_targets(folder: Path, base: PreTrainedModel, lora: Lora) -> None:
    """Requires each target, in each layer of the plan, to be a linear layer outside the head.

    Raises:
        ModelError: one is not; the error names it, and the linear layers of the model.
    """
    linear = {name for name, module in base.named_modules() if _is_linear(module)}
    for target in lora.target_modules:
        found = _modules_named(base, target)
        wanted = [None] if lora.layers is None else list(lora.layers)
        for layer in wanted:
            matches = [name for name in found if layer is None or _layer_of(name) == layer]
            if not matches:
                unnumbered = found and all(_layer_of(name) is None for name in found)
                what = "its layers have no number that PEFT can read" if unnumbered else None
                raise _no_target(folder, linear, target, layer, what or "no module of that name")
            for name in matches:
                is_output = _is_output(base, found[name])
                if name not in linear or name.startswith("classifier") or is_output:
                    kind = type(found[name]).__name__
                    if name in linear:
                        kind = "the output layer" if is_output else "the head"
                    raise _no_target(folder, linear, target, layer, f"{name}: {kind}")


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (*LINEAR, int8.Int8Linear) or type(module).__name__ == nf4.KIND


def _is_output(base: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a module is a language model's output layer.

    It sees the tokens of all records in one list, and often shares its weight with the embeddings:
    a record has no gradient of its own there.
    """
    return module is output_layer(base)


def all_linear(folder: Path, task: Task) -> tuple[str, ...]:
    """Names of all linear layers that may have an adapter, for `target_modules`.

    Raises:
        ModelError: the configuration is missing or of an unknown architecture.
    """
    base = skeleton(folder, task)
    names = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if _is_linear(module) and _layer_of(name) is not None and not _is_output(base, module)
    }
    return tuple(sorted(names))


def _modules_named(base: PreTrainedModel, target: str) -> dict[str, nn.Module]:
    """The modules that PEFT would match with a target."""
    return {
        name: module
        for name, module in base.named_modules()
        if name == target or name.endswith(f".{target}")
    }


def _layer_of(name: str) -> int | None:
    """Index of the transformer layer that a module is part of, as PEFT reads it."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _no_target(
    folder: Path, linear: set[str], target: str, layer: int | None, found: str
) -> ModelError:
    kinds = {name.rpartition(".")[2] for name in linear if not name.startswith("classifier")}
    layers = sorted({index for name in linear if (index := _layer_of(name)) is not None})
    return ModelError(
        "an adapter's target is not a linear layer of the base model",
        file=folder,
        field=f"lora.target_modules: {target}" + ("" if layer is None else f" in layer {layer}"),
        found=found,
        accepted=f"linear layers {', '.join(sorted(kinds))} in "
        + (f"layers {layers}" if layers else "all layers: leave lora.layers out"),
    )
