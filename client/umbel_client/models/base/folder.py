"""A base model with its weights, from a local folder.

What is loaded is what was hashed (`umbel_host.files.model_folder`): Transformers gets no path into
the folder. It gets the bytes of the small files in a private folder, and the weights as tensors.

Only safetensors are read, never pickles. Code in the folder is never run.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from umbel_client.models.base.attention import make_every_mask
from umbel_client.models.base.layers import all_layers, without_layers
from umbel_client.models.base.placement import AsComputed, Placement, places_of
from umbel_client.models.base.skeleton import building, empty_model, without_pooler
from umbel_client.models.base.weights import Place, WeightFile, opened_weights
from umbel_common.errors import ModelError
from umbel_common.plans.plan import Classification, Task
from umbel_host.files.model_digest import file_digest, model_digest, shards_of, weights_of
from umbel_host.files.model_folder import (
    FileDigests,
    read_texts,
    text_digest,
)


@dataclass(frozen=True)
class BaseContent:
    """The files of a base model that count, as they were read: each once, and hashed."""

    folder: Path
    texts: Mapping[str, bytes]
    """Configuration and tokenizer."""
    tensors: dict[str, torch.Tensor]
    """By their names in the files."""
    files: FileDigests
    placement: Placement = field(default_factory=AsComputed)
    """The devices of the model."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Where tensors were put while they were read, by their names in the files."""

    @property
    def digest(self) -> bytes:
        """The model's digest, of exactly what was read."""
        return model_digest(self.files)


def read_base(
    folder: Path, task: Task | None = None, placement: Placement | None = None
) -> BaseContent:
    """Reads a base model, each byte once, and puts its tensors where they compute.

    Args:
        task: what the model is for; it decides on the parameters.
        placement: without it, or without a task, all tensors stay on the CPU, of half precision as
            float32.

    Raises:
        ModelError: see `umbel_host.files.model_digest.folder_digest`.
    """
    weights = weights_of(folder)
    texts = read_texts(folder)
    files = {name: text_digest(text) for name, text in texts.items()}
    tensors: dict[str, torch.Tensor] = {}
    places: Mapping[str, Place] = {}
    with ExitStack() as stack:
        names = shards_of(folder, texts, weights)
        shards = [stack.enter_context(opened_weights(folder / name)) for name in names]
        if task is not None and placement not in (None, AsComputed()):
            places = _places(folder, texts, task, placement, shards)
        for name, shard in zip(names, shards, strict=True):
            found, files[name] = shard.read(places)
            tensors |= found
    for name in weights:
        if name not in names:
            files[name] = file_digest(folder / name)
    return BaseContent(folder, texts, tensors, files, placement or AsComputed(), places)


def _places(
    folder: Path,
    texts: Mapping[str, bytes],
    task: Task,
    placement: Placement,
    shards: Sequence[WeightFile],
) -> Mapping[str, Place]:
    shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    try:
        with building(folder):
            empty = empty_model(folder, texts, task)
        return places_of(empty, task, placement, shapes)
    except ModelError:
        # It is raised again when the model is built, after its digest was compared with a plan's.
        return {}


def empty_base(content: BaseContent, task: Task) -> PreTrainedModel:
    """The same as `skeleton` gives, from what was read."""
    with building(content.folder):
        return without_pooler(empty_model(content.folder, content.texts, task), task)


def load_base(folder: Path, task: Task) -> PreTrainedModel:
    """Reads a base model and builds it: see `read_base` and `build_base`."""
    return build_base(read_base(folder), task)


def build_base(content: BaseContent, task: Task, depth: int | None = None) -> PreTrainedModel:
    """The model with its weights: frozen, in evaluation mode, on its devices.

    Parameters without a place are float32.

    Args:
        depth: number of layers that are built; None: all of them.

    Raises:
        ModelError: the weights do not load, or lack a tensor outside the head: it would be random,
            and different at each site.
    """
    folder = content.folder
    make_every_mask()
    places = content.places
    # Equal to no tensor, not even to each other: Transformers ties parameters that are equal.
    stand_ins = {
        name: torch.full((), math.nan).expand(place.shape) for name, place in places.items()
    }
    with building(folder):
        empty = empty_model(folder, content.texts, task, depth)
        model: Any = type(empty)
        base: PreTrainedModel
        # Without a path, it reads no file: also no adapter, generation settings or other weights.
        base, report = model.from_pretrained(
            None,
            config=empty.config,
            state_dict={**content.tensors, **stand_ins},
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    base.config.name_or_path = str(folder)
    _check_complete(folder, task, report)
    if not _went_to_their_places(base, empty, places, stand_ins):
        del base
        return build_base(_read_again(content), task)
    _take_places(base, content, stand_ins, content.placement.layer_devices(empty, task))
    base = without_pooler(base, task)
    _check_separable(folder, base)
    base.requires_grad_(False)
    base.train(False)
    return base


def _went_to_their_places(
    base: PreTrainedModel,
    empty: PreTrainedModel,
    places: Mapping[str, Place],
    stand_ins: Mapping[str, torch.Tensor],
) -> bool:
    """Whether Transformers took each tensor that has a place for the parameter it was meant for.

    And no other tensor for that parameter under a second name, as of an output layer that is tied
    to the embedding: Transformers would have compared it with the tensor itself.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return all(
        base.get_parameter(name).data_ptr() == stand_ins[tensor].data_ptr()
        for tensor, place in places.items()
        for name in names[id(empty.get_parameter(place.parameter))]
    )


def _read_again(content: BaseContent) -> BaseContent:
    """The same model without places: Transformers makes parameters of several of its tensors.

    Raises:
        ModelError: the folder has changed since.
    """
    content.tensors.clear()
    again = read_base(content.folder)
    if again.digest != content.digest:
        raise ModelError(
            "a base model changed while it was loaded",
            file=content.folder,
            found=again.digest.hex(),
            accepted=content.digest.hex(),
            remedy="leave the model's folder alone while it is in use, and start again",
        )
    return replace(again, placement=content.placement)


def _take_places(
    base: PreTrainedModel,
    content: BaseContent,
    stand_ins: Mapping[str, torch.Tensor],
    layer_devices: tuple[torch.device, ...],
) -> None:
    """Puts the tensors where their stand-ins are, and all others on the devices of the model."""
    names = {stand_in.data_ptr(): name for name, stand_in in stand_ins.items()}
    owners: list[tuple[nn.Module, str, str]] = []
    for module in base.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names.get(parameter.data_ptr())
            if name is not None and parameter.data_ptr() != 0:
                owners.append((module, key, name))
                setattr(module, key, None)
    _move(base, content.placement.device, layer_devices)
    made: dict[str, nn.Parameter] = {}
    for module, key, name in owners:
        # One parameter for all layers that share it.
        if name not in made:
            tensor = content.tensors[name]
            made[name] = (
                tensor
                if isinstance(tensor, nn.Parameter)
                else nn.Parameter(tensor, requires_grad=False)
            )
        setattr(module, key, made[name])


def _move(
    base: PreTrainedModel, device: torch.device, layer_devices: tuple[torch.device, ...]
) -> None:
    layers = all_layers(base) if layer_devices else None
    if layers is None:
        base.to(device)  # type: ignore[arg-type]  # wrapped by torch
        return
    with without_layers(base):
        base.to(device)  # type: ignore[arg-type]  # wrapped by torch
    for layer, there in zip(layers, layer_devices, strict=True):
        layer.to(there)


def _check_complete(folder: Path, task: Task, report: dict[str, Any]) -> None:
    stock = isinstance(task, Classification) and task.head == "stock"
    unused = "classifier." if stock else "pooler."
    differing = [name for name, *_shapes in report["mismatched_keys"]]
    absent = sorted(
        name for name in (*report["missing_keys"], *differing) if not name.startswith(unused)
    )
    if absent:
        raise ModelError(
            "the weights of a base model are incomplete: these would be random at each site",
            file=folder,
            found=f"{len(absent)} absent or of another shape: {', '.join(absent[:5])}",
            remedy="use a complete checkpoint, or the mean-pool head where a pooler is absent",
        )


def _check_separable(folder: Path, base: PreTrainedModel) -> None:
    """Refuses batch norm: frozen or not, it mixes records, which then share a gradient."""
    for name, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                "a base model mixes the records of a batch",
                file=folder,
                field=name,
                found=type(module).__name__,
                accepted="layer or group norm",
            )
