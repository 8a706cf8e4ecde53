"""Where each tensor of a base model goes while it is read: its device, and its precision there.

A model is held once, as it computes. To load it whole in float32 first would take up to four times
as much memory of the host.

The names of a file decide which parameter a tensor is meant to be. Transformers has the last word:
it loads a stand-in without memory for each tensor that has a place, and the tensor replaces its
stand-in afterwards, wherever it went (`umbel_client.models.base.folder.build_base`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from umbel_client.models.base import int8, nf4
from umbel_client.models.base.layers import all_layers
from umbel_client.models.base.precision import Precision
from umbel_client.models.base.spread import balanced
from umbel_client.models.base.weights import Place
from umbel_common.plans.plan import Classification, Task

Quantisation: TypeAlias = Literal["none", "int8", "nf4"]
Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Form: TypeAlias = tuple[torch.dtype, Change | None]
"""The type of a parameter, and what makes it of its float32 values; see `Place`."""

HOST = torch.device("cpu")

_QUANTISED = {"int8": int8.eight_bits, "nf4": nf4.four_bits}
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 4.127 / 8}
"""Bytes of a number; in four bits with the scales, which are quantised too (QLoRA, section 3)."""


class Placement(Protocol):
    """Says for each parameter of a model how it is held."""

    @property
    def device(self) -> torch.device:
        """The device of all parameters outside of the layers."""
        ...

    def layer_devices(self, empty: PreTrainedModel, task: Task) -> tuple[torch.device, ...]:
        """The device of each of the model's layers; empty: `device` for all.

        Raises:
            ModelError: the model cannot be spread over several devices.
        """
        ...

    def forms(self, empty: PreTrainedModel, task: Task) -> Mapping[str, Form]:
        """Forms by the names of parameters. Those without one are float32."""
        ...


@dataclass(frozen=True)
class AsComputed:
    """A frozen base model as it computes: see `lower_precision` and `quantise`."""

    devices: tuple[torch.device, ...] = (HOST,)
    """More than one: the layers are spread over them (`umbel_client.models.base.spread`)."""
    precision: Precision = "float32"
    quantisation: Quantisation = "none"

    @property
    def device(self) -> torch.device:
        """See `Placement`."""
        return self.devices[0]

    def layer_devices(self, empty: PreTrainedModel, task: Task) -> tuple[torch.device, ...]:
        """See `Placement`."""
        if len(self.devices) == 1:
            return ()
        kinds = self._kinds(empty, task)
        held = {
            id(parameter): parameter.numel() * _BYTES[kinds.get(name, "float32")]
            for name, parameter in empty.named_parameters()
        }
        return balanced(empty, held, self.devices)

    def forms(self, empty: PreTrainedModel, task: Task) -> Mapping[str, Form]:
        """See `Placement`. A stock head is trained, so it stays float32."""
        devices = _devices(empty, task, self)
        forms: dict[str, Form] = {}
        for name, kind in self._kinds(empty, task).items():
            if kind == "bfloat16":
                forms[name] = (torch.bfloat16, None)
            else:
                device = devices[id(empty.get_parameter(name))]
                forms[name] = (torch.float32, partial(_QUANTISED[kind], device=device))
        return forms

    def _kinds(self, empty: PreTrainedModel, task: Task) -> Mapping[str, str]:
        """How parameters are held that are not float32."""
        trained = isinstance(task, Classification) and task.head == "stock"
        owners = [
            (name, module)
            for name, module in empty.named_modules()
            if type(module) is nn.Linear and not (trained and name.split(".")[0] == "classifier")
        ]
        kinds: dict[str, str] = {}
        quantised: set[int] = set()
        if self.quantisation != "none":
            quantised = {id(layer) for _, _, layer in nf4.layers_to_quantise(empty)}
        for name, layer in owners:
            if id(layer) in quantised:
                kinds[f"{name}.weight"] = self.quantisation
            elif self.precision == "bfloat16":
                kinds |= {f"{name}.{part}": "bfloat16" for part, _ in layer.named_parameters()}
        return kinds


def _devices(empty: PreTrainedModel, task: Task, placement: Placement) -> dict[int, torch.device]:
    """The device of each parameter, by `id`."""
    found = {id(parameter): placement.device for parameter in empty.parameters()}
    layers, devices = all_layers(empty), placement.layer_devices(empty, task)
    for layer, device in zip(layers or (), devices, strict=False):
        found |= {id(parameter): device for parameter in layer.parameters()}
    return found


def places_of(
    empty: PreTrainedModel,
    task: Task,
    placement: Placement,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Place]:
    """The places of a file's tensors, by their names in the file.

    A tensor that stays as it is read has none. Nor has one of two tensors for one parameter, or for
    two that share memory: Transformers compares their values.

    Args:
        empty: the model without weights.
        shapes: of all tensors of the model's files, by their names.
    """
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    meant = {name: list(_meant(empty, name, parameters)) for name in shapes}
    found = {name: names[0] for name, names in meant.items() if names}
    takers = Counter(id(parameters[parameter]) for parameter in found.values())
    devices = _devices(empty, task, placement)
    shared: dict[int, Form] = {}
    for parameter, form in placement.forms(empty, task).items():
        shared[id(parameters[parameter])] = form
    places = {}
    for name, parameter in found.items():
        empty_one = parameters[parameter]
        dtype, change = shared.get(id(empty_one), (torch.float32, None))
        device = devices[id(empty_one)]
        plain = device == HOST and dtype == torch.float32 and change is None
        fits = shapes[name] == tuple(empty_one.shape) and empty_one.numel() > 0
        if fits and not plain and takers[id(empty_one)] == 1:
            places[name] = Place(parameter, shapes[name], device, dtype, change)
    return places


def _meant(empty: PreTrainedModel, name: str, parameters: Mapping[str, object]) -> Iterator[str]:
    """The parameters that a tensor's name may stand for: with the body's prefix, or without it."""
    prefix = f"{empty.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in parameters:
            yield candidate
