"""LoRA layers (Hu et al. 2021) through PEFT, and the head, by the plan's names."""

import json
from collections.abc import Collection, Mapping
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

from umbel_client.models.adapters.targets import (
    HEAD,
    adapted_layers,
    mean_the_same_to_peft,
    names_for_peft,
)
from umbel_client.models.base.architecture import naming_architecture, width_of
from umbel_client.models.base.skeleton import peft_quietly, skeleton
from umbel_common.adapters.peft_folder import PEFT_PREFIX
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.errors import ModelError, UmbelError
from umbel_common.plans.plan import CausalLm, Classification, Lora, Method, Scaling, Task, Tensor


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
        if not mean_the_same_to_peft(base, target_modules):
            names = names_for_peft(base, adapted_layers(folder, base, lora))
            lora = msgspec.structs.replace(lora, target_modules=names, layers=None)
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
    if head_kind == "stock" and not isinstance(getattr(base, HEAD, None), nn.Module):
        raise ModelError(
            "a base model has no classification head of the usual name",
            file=folder,
            field=HEAD,
            found=type(base).__name__,
            accepted="task.head: mean-pool",
        )
    parameters: dict[str, nn.Parameter] = {}
    if lora.target_modules:
        parameters = _attach_lora(folder, base, task, lora)
    elif head_kind == "stock":
        classifier = base.get_submodule(HEAD).requires_grad_(True)
        parameters = {
            f"{PEFT_PREFIX}{HEAD}.{name}": parameter
            for name, parameter in classifier.named_parameters()
        }
    head = None
    if isinstance(task, Classification) and task.head == "mean-pool":
        head = nn.Linear(width_of(base), len(task.labels), device=base.device)
        parameters |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
    return dict(sorted(parameters.items())), head


def _attach_lora(
    folder: Path, base: PreTrainedModel, task: Task, lora: Lora
) -> dict[str, nn.Parameter]:
    chosen = adapted_layers(folder, base, lora)
    stock = isinstance(task, Classification) and task.head == "stock"
    kind = "CAUSAL_LM" if isinstance(task, CausalLm) else "FEATURE_EXTRACTION"
    config = LoraConfig(
        task_type="SEQ_CLS" if stock else kind,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        # Each layer by its whole name: PEFT reads no number from `layers.0.mlp`, for one.
        target_modules=list(chosen),
        lora_dropout=0.0,
        use_rslora=lora.scaling == "rank-stabilised",
        # PEFT would notice by itself, but warn.
        fan_in_fan_out=any(type(layer) is Conv1D for layer in chosen.values()),
        modules_to_save=[HEAD] if stock else None,
    )
    try:
        with peft_quietly():
            adapted = get_peft_model(base, config)
    except UmbelError:
        raise
    except Exception as error:  # the library promises no classes of errors
        raise ModelError(
            "PEFT does not put an adapter on these layers of the base model",
            file=folder,
            field=f"lora.target_modules: {', '.join(lora.target_modules)}",
            found=error,
            remedy=without_targets(lora, [t for t in lora.target_modules if t in str(error)]),
        ) from error
    placed = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    moved = sorted(placed ^ chosen.keys())
    if moved:
        # PEFT puts adapters of a mixture of experts on parameters that are no layers.
        raise ModelError(
            "PEFT puts the adapter on other layers than the plan names",
            file=folder,
            field=f"lora.target_modules: {', '.join(lora.target_modules)}",
            found=", ".join(moved[:3]),
            accepted="linear layers outside of a mixture of experts",
            remedy=without_targets(
                lora, [t for t in lora.target_modules if any(f".{t}" in name for name in moved)]
            ),
        )
    return {
        _saved_name(name): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }


def without_targets(lora: Lora, targets: Collection[str]) -> str:
    """What to do about targets that cannot be adapted."""
    others = [target for target in lora.target_modules if target not in targets]
    if not targets or not others:
        return "name other layers in lora.target_modules, or use another base model"
    return f"leave {', '.join(targets)} out: lora.target_modules = {json.dumps(others)}"


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
