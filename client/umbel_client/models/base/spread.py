"""A base model on several devices: its layers in their order, and all else on the first device.

Each part computes where its weights are. What goes into a part is copied to its device before, and
its gradient is copied back: no bit changes on the way. So a record's results are those of one
device.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import permutations
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from umbel_client.models.base.layers import all_layers, without_layers
from umbel_common.errors import ModelError

_Copies: TypeAlias = MutableMapping[torch.Tensor, tuple[int, torch.Tensor]]
"""Copies on one device, by what was copied, with the version that it had; as long as it lives."""

_COPIED = 1 << 16
"""Numbers that are copied to see whether they arrive: 256 KiB."""


def balanced(
    empty: PreTrainedModel, held: Mapping[int, float], devices: Sequence[torch.device]
) -> tuple[torch.device, ...]:
    """A device for each layer, so that all devices hold about as many bytes.

    A layer goes to the device in whose share its middle byte lies. The first share begins with all
    that is outside of the layers.

    Args:
        empty: the model, with or without weights.
        held: the bytes of each parameter, by `id`.

    Raises:
        ModelError: there are no such layers, or fewer than devices; or parts share a weight.
    """
    layers = all_layers(empty)
    if layers is None:
        raise _not_spread(empty, "no list of layers that is known", "one device")
    if len(layers) < len(devices):
        found = f"{len(layers)} layers, and {len(devices)} devices"
        raise _not_spread(empty, found, "at most one device for each layer")
    parts = [{id(parameter) for parameter in layer.parameters()} for layer in layers]
    with without_layers(empty):
        outer = {id(parameter) for parameter in empty.parameters()}
    if len(outer.union(*parts)) < sum(map(len, (outer, *parts))):
        raise _not_spread(empty, "layers that share a weight", "one device")
    start, *sizes = (sum(held[one] for one in part) for part in (outer, *parts))
    share = (start + sum(sizes)) / len(devices)
    chosen = []
    for size in sizes:
        chosen.append(devices[min(int((start + size / 2) / share), len(devices) - 1)])
        start += size
    return tuple(chosen)


def _not_spread(empty: PreTrainedModel, found: str, accepted: str) -> ModelError:
    return ModelError(
        "a base model cannot be spread over several devices",
        field="model.device",
        found=f"{type(empty).__name__}: {found}",
        accepted=accepted,
    )


def require_exact_copies(devices: Sequence[torch.device]) -> None:
    """Copies numbers from each device to each other one, as layers pass them on.

    Raises:
        ModelError: other numbers arrive, as on machines whose GPUs only seem to reach each other.
    """
    numbers = torch.arange(_COPIED, dtype=torch.int32)
    for source, to in permutations(devices, 2):
        if not torch.equal(numbers.to(source).to(to).cpu(), numbers):
            raise ModelError(
                "a copy from one device to another changes what it copies",
                field="model.device",
                found=f"{source} to {to}",
                accepted="the same numbers on both",
                remedy="use one of them alone, or look for the machine's settings of peer-to-peer"
                " access and IOMMU",
            )


def pass_between_devices(base: PreTrainedModel) -> None:
    """Lets each part of a model find its inputs on its own device; for one device, does nothing."""
    layers = all_layers(base)
    if layers is None or len({parameter.device for parameter in base.parameters()}) == 1:
        return
    parts = [(layer, next(layer.parameters()).device) for layer in layers]
    parts += [(module, base.device) for module in _beside(base, layers)]
    copies: dict[torch.device, _Copies] = {}
    for module, device in parts:
        there = copies.setdefault(device, WeakTensorKeyDictionary())
        take = partial(_with_inputs_there, device, there)
        module.register_forward_pre_hook(take, with_kwargs=True)


def _beside(module: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The largest modules without layers in them."""
    for child in module.children():
        if all(part is not layers for part in child.modules()):
            yield child
        elif child is not layers:
            yield from _beside(child, layers)


def _with_inputs_there(
    device: torch.device,
    copies: _Copies,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    there = partial(_there, device, copies)
    return tuple(map(there, args)), {name: there(value) for name, value in kwargs.items()}


def _there(device: torch.device, copies: _Copies, value: Any) -> Any:
    """A module's input, with its tensors on a device.

    Args:
        copies: of tensors that each layer gets again, such as masks: one copy serves all layers of
            a device, for as long as the tensor itself lives and is not changed.
    """
    if isinstance(value, tuple | list):
        return type(value)(_there(device, copies, one) for one in value)
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    if value.requires_grad:
        return value.to(device)
    if value not in copies or copies[value][0] != value._version:
        copies[value] = (value._version, value.to(device))
    return copies[value][1]
