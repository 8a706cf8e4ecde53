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
from typing import Literal, Protocol, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from umbel_client.models.base import int8, nf4
from umbel_client.models.base.precision import Precision
from umbel_client.models.base.weights import Place
from umbel_common.plans.plan import Classification, Task

Quantisation: TypeAlias = Literal["none", "int8", "nf4"]
Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Form: TypeAlias = tuple[torch.dtype, Change | None]
"""The type of a parameter, and what makes it of its float32 values; see `Place`."""

HOST = torch.device("cpu")


class Placement(Protocol):
    """Says for each parameter of a model how it is held."""

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        ...

    def forms(self, empty: PreTrainedModel, task: Task) -> Mapping[str, Form]:
        """Forms by the names of parameters. Those without one are float32."""
        ...


@dataclass(frozen=True)
class AsComputed:
    """A frozen base model as it computes: see `lower_precision` and `quantise`."""

    device: torch.device = HOST
    precision: Precision = "float32"
    quantisation: Quantisation = "none"

    def forms(self, empty: PreTrainedModel, task: Task) -> Mapping[str, Form]:
        """See `Placement`. A stock head is trained, so it stays float32."""
        trained = isinstance(task, Classification) and task.head == "stock"
        owners = [
            (name, module)
            for name, module in empty.named_modules()
            if type(module) is nn.Linear and not (trained and name.split(".")[0] == "classifier")
        ]
        forms: dict[str, Form] = {}
        quantised: set[int] = set()
        if self.quantisation != "none":
            quantised = {id(layer) for _, _, layer in nf4.layers_to_quantise(empty)}
        for name, layer in owners:
            if id(layer) in quantised:
                forms[f"{name}.weight"] = (torch.float32, self._quantised)
            elif self.precision == "bfloat16":
                forms |= {
                    f"{name}.{part}": (torch.bfloat16, None) for part, _ in layer.named_parameters()
                }
        return forms

    def _quantised(self, values: torch.Tensor) -> torch.Tensor:
        quantised = int8.eight_bits if self.quantisation == "int8" else nf4.four_bits
        return quantised(values, self.device)


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
    shared: dict[int, Form] = {}
    for parameter, form in placement.forms(empty, task).items():
        shared[id(parameters[parameter])] = form
    places = {}
    for name, parameter in found.items():
        empty_one = parameters[parameter]
        dtype, change = shared.get(id(empty_one), (torch.float32, None))
        plain = placement.device == HOST and dtype == torch.float32 and change is None
        fits = shapes[name] == tuple(empty_one.shape) and empty_one.numel() > 0
        if fits and not plain and takers[id(empty_one)] == 1:
            places[name] = Place(parameter, shapes[name], placement.device, dtype, change)
    return places


def _meant(empty: PreTrainedModel, name: str, parameters: Mapping[str, object]) -> Iterator[str]:
    """The parameters that a tensor's name may stand for: with the body's prefix, or without it."""
    prefix = f"{empty.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in parameters:
            yield candidate
