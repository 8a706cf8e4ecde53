"""Merges an adapter into its base model, for tools that cannot use adapters.

Each adapted weight is merged and rounded as soon as it is read, so the model is held once, in the
precision in which it is written.
"""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from umbel_client.models.adapters.folder import folder_mode, read_to_export
from umbel_client.models.adapters.lora import attach, fill, fold, require_tensors
from umbel_client.models.base.folder import BaseContent, build_base, empty_base, read_base
from umbel_client.models.base.placement import HOST, Change, Form
from umbel_client.models.base.skeleton import quietly
from umbel_common.adapters.peft_folder import (
    HEAD_FILE,
    PEFT_PREFIX,
    TASK_FILE,
    tensor_files,
    text_files,
)
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.errors import ModelError, StorageError
from umbel_common.plans.plan import Classification, Lora, Task, TrainingPlan
from umbel_host.files import tensor_file
from umbel_host.files.model_digest import require_digest
from umbel_host.files.model_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_FILES,
    parsed_json,
)
from umbel_host.files.output import require_new


@dataclass(frozen=True)
class _Merged:
    """A base model in the precision in which it is written, with the adapter in its weights."""

    dtype: torch.dtype
    lora: Lora
    values: Mapping[str, torch.Tensor]
    """The adapter's tensors by the plan's names, on the device that computes the sums."""

    device = HOST

    def layer_devices(self, empty: PreTrainedModel, task: Task) -> tuple[torch.device, ...]:
        """See `Placement`."""
        return ()

    def forms(self, empty: PreTrainedModel, task: Task) -> Mapping[str, Form]:
        """See `Placement`."""
        forms: dict[str, Form] = {
            name: (self.dtype, None) for name, _ in empty.named_parameters(remove_duplicate=False)
        }
        for name in self.adapted() & forms.keys():
            layer = empty.get_submodule(name.removesuffix(".weight"))
            turned = type(layer) is Conv1D
            if self._fits(name, empty.get_parameter(name).shape, turned=turned):
                forms[name] = (self.dtype, self._merge(name, turned=turned))
        return forms

    def _fits(self, name: str, shape: tuple[int, ...], *, turned: bool) -> bool:
        """Whether the plan's tensors are a weight's: a plan that lies is refused later, and must
        not choose the size of the product before."""
        layer = f"{PEFT_PREFIX}{name.removesuffix('.weight')}"
        first, second = (self.values.get(f"{layer}.{part}.weight") for part in ("lora_A", "lora_B"))
        if first is None or second is None or len(shape) != 2:
            return False
        outputs, inputs = reversed(shape) if turned else shape
        rank = self.lora.rank
        return first.shape == (rank, inputs) and second.shape == (outputs, rank)

    def adapted(self) -> set[str]:
        """Names of the weights that the adapter changes."""
        end = ".lora_A.weight"
        return {
            f"{tensor.name.removeprefix(PEFT_PREFIX).removesuffix(end)}.weight"
            for tensor in self.lora.tensors
            if tensor.role == "lora_A"
        }

    def _merge(self, name: str, *, turned: bool) -> Change:
        layer = f"{PEFT_PREFIX}{name.removesuffix('.weight')}"

        def merge(weight: torch.Tensor) -> torch.Tensor:
            # As PEFT computes it, to the bit.
            first, second = (self.values[f"{layer}.{part}.weight"] for part in ("lora_A", "lora_B"))
            product = second @ first
            rank = self.lora.rank if self.lora.scaling == "standard" else math.sqrt(self.lora.rank)
            there = weight.to(product.device)
            there += (product.T if turned else product) * (self.lora.alpha / rank)
            return there.to(self.dtype).to(HOST)

        return merge


def merge_adapter(
    adapter: Path,
    base: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"],
    device: torch.device = HOST,
) -> None:
    """Writes W + scaling B A in place of each adapted W, as safetensors that Transformers loads.

    The sum is float32, and rounded once to `dtype`. Scaling and places are the plan's. If the
    adapter has no release, only the owner can read the folder.

    Args:
        adapter: the folder that `write_adapter` wrote.
        base: the folder of exactly the base model that the adapter's plan names.
        out: the new folder; it appears complete or not at all.
        device: where the sums are computed, one weight after the other.

    Raises:
        ModelError: the adapter is not Umbel's, its folder holds a link, or the base model is
            another one, or shares an adapted weight among its layers.
        PlanError: the adapter's plan is malformed.
        StorageError: `out` exists, or the disk does not take it.
    """
    plan, vector, release = read_to_export(adapter)
    require_new(out)
    model, content = _merged(base, plan, vector, getattr(torch, dtype), device)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=folder_mode(release), parents=True)
        _take_settings(model, content, plan.task)
        with quietly():
            model.save_pretrained(partial)
        # Not a part of the base model that was agreed on, but of what its owner took from it.
        settings = base / GENERATION_FILE
        if settings.is_file():
            (partial / GENERATION_FILE).write_bytes(settings.read_bytes())
        for name in TOKENIZER_FILES:
            if name in content.texts:
                (partial / name).write_bytes(content.texts[name])
        (partial / TASK_FILE).write_text(text_files(plan)[TASK_FILE], encoding="utf-8")
        head = tensor_files(plan, vector).get(HEAD_FILE)
        if head is not None:
            tensor_file.write(partial / HEAD_FILE, head, {"format": "pt"})
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise StorageError("a model cannot be stored", file=out, found=error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_settings(model: PreTrainedModel, content: BaseContent, task: Task) -> None:
    """Gives the configuration what programs read of it: names of labels, and the base's cache."""
    if isinstance(task, Classification):
        model.config.id2label = dict(enumerate(task.labels))
        model.config.label2id = {label: index for index, label in enumerate(task.labels)}
    else:
        settings = parsed_json(content.folder, CONFIG_FILE, content.texts[CONFIG_FILE])
        model.config.use_cache = settings.get("use_cache", True)


def _merged(
    base: Path, plan: TrainingPlan, vector: Vector, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, BaseContent]:
    """The model with the adapter in its weights, and what was read of its folder."""
    values = {
        name: torch.from_numpy(np.array(value)).to(device)
        for name, value in unflatten(vector, plan.lora.tensors).items()
    }
    placement = _Merged(dtype, plan.lora, values)
    content = read_base(base, plan.task, placement)
    require_digest(base, content.digest, plan.model)
    empty = empty_base(content, plan.task)
    _require_own(base, empty, placement.adapted())
    model: Any = build_base(content, plan.task)
    parameters, _head = attach(base, empty, plan.task, plan.lora)
    require_tensors(base, parameters, plan.lora)
    if not _in_place(model, content, placement.adapted()):
        # Transformers makes a parameter of several tensors, and each is merged after that.
        del model
        content = read_base(base)
        require_digest(base, content.digest, plan.model)
        model = build_base(content, plan.task)
        parameters, _head = attach(base, model, plan.task, plan.lora)
        fill(parameters, vector, plan.lora)
        fold(model)
    else:
        _fill_head(model, plan.lora, values)
    return model.to(dtype), content


def _require_own(folder: Path, empty: PreTrainedModel, adapted: set[str]) -> None:
    """Refuses to merge into a weight that another layer has too: its output would change as well.

    Raises:
        ModelError: names the weights.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and not adapted.isdisjoint(shared):
            raise ModelError(
                "layers of a base model share a weight, and an adapter cannot be merged into it",
                file=folder,
                found=", ".join(shared[:3]),
                accepted="each adapted weight in one layer",
                remedy="use the adapter as it is, without --merge",
            )


def _in_place(model: PreTrainedModel, content: BaseContent, adapted: set[str]) -> bool:
    """Whether each adapted weight of the model is the one that was merged as it was read."""
    merged = {
        place.parameter: content.tensors[name].data_ptr()
        for name, place in content.places.items()
        if name in content.tensors
    }
    return all(model.get_parameter(name).data_ptr() == merged.get(name) for name in adapted)


@torch.no_grad()
def _fill_head(model: PreTrainedModel, lora: Lora, values: Mapping[str, torch.Tensor]) -> None:
    """Takes a stock head, which is part of the model; any other is a file of its own."""
    for tensor in lora.tensors:
        if tensor.role == "head" and tensor.name.startswith(PEFT_PREFIX):
            name = tensor.name.removeprefix(PEFT_PREFIX)
            model.get_parameter(name).copy_(values[tensor.name])
