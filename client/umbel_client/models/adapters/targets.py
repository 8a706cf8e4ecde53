"""Which layers an adapter is on: what the names and numbers of a draft or plan mean in a model.

A name means every linear layer whose name ends with it, in the part of the model that reads text: a
vision tower beside it sees no record. A number means a place in the model's list of layers,
wherever that list lies. What is asked for and not found is an error, never a smaller adapter.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from umbel_client.models.base import int8, nf4
from umbel_client.models.base.layers import output_layer
from umbel_client.models.base.skeleton import skeleton
from umbel_common.errors import ModelError
from umbel_common.plans.plan import Lora, Task

LINEAR = (nn.Linear, Conv1D, int8.Int8Linear)
"""Layers that take an adapter; Conv1D is GPT-2's linear layer, its weight stored as [in, out]."""
HEAD = "classifier"
"""The module of a stock head. It is trained as a whole, so it has no adapter."""


def adapted_layers(folder: Path, base: PreTrainedModel, lora: Lora) -> dict[str, nn.Module]:
    """The linear layers that have an adapter, by name.

    Args:
        folder: the model's, for errors.

    Raises:
        ModelError: a target is not there, in one of the layers asked for; or it is no linear layer,
            the output layer or the head; or modules share it.
    """
    lists = layer_lists(base)
    if lora.layers == ():
        raise ModelError(
            "an adapter is asked for in no layer",
            file=folder,
            field="lora.layers",
            found="an empty list",
            accepted="numbers of layers; leave lora.layers out for all layers",
        )
    chosen: dict[str, nn.Module] = {}
    for target in lora.target_modules:
        found = _modules_named(base, target)
        for layer in [None] if lora.layers is None else lora.layers:
            matches = [name for name in found if layer in (None, layer_of(name, lists))]
            # The head is trained whole: a name that it has too means the layers below it.
            below = [name for name in matches if not _in_head(name)]
            if not matches:
                raise _no_target(folder, base, target, layer, _absence(lists, found, layer))
            for name in below or matches:
                kind = _unfit(base, name, found[name])
                if kind is not None:
                    raise _no_target(folder, base, target, layer, f"{name}: {kind}")
                chosen[name] = found[name]
    _require_own(folder, base, chosen)
    return chosen


def all_linear(folder: Path, task: Task) -> tuple[str, ...]:
    """Names of all linear layers that may have an adapter, for `target_modules`.

    Raises:
        ModelError: the configuration is missing or of an unknown architecture; or the model has no
            list of layers with linear layers in it.
    """
    base = skeleton(folder, task)
    lists = layer_lists(base)
    wanted = [name for name in _adaptable(base) if layer_of(name, lists) is not None]
    if not wanted:
        raise ModelError(
            "a base model has no layers with linear layers in them",
            file=folder,
            field="lora.target_modules",
            found=type(base).__name__,
            accepted="names of its linear layers" if _adaptable(base) else None,
            remedy="use another base model, or name the layers in lora.target_modules",
        )
    towers = _towers(base)
    every = [name for name in _named(base) if not _below(name, towers)]
    return _names(wanted, every, _adaptable(base))


def names_for_peft(base: PreTrainedModel, wanted: Collection[str]) -> tuple[str, ...]:
    """The shortest names by which PEFT, which knows names alone, finds exactly the `wanted` layers.

    With a tower beside them, many of them are whole names.
    """
    return _names(wanted, _named(base), wanted)


def mean_the_same_to_peft(base: PreTrainedModel, targets: Collection[str]) -> bool:
    """Whether PEFT would find no module by these names that cannot be adapted."""
    adaptable = _adaptable(base)
    return all(
        name in adaptable
        for name in _named(base)
        if any(_ends_with(name, target) for target in targets)
    )


def _named(base: PreTrainedModel) -> list[str]:
    return [name for name, _ in base.named_modules() if not _in_head(name)]


def _names(
    wanted: Collection[str], every: Collection[str], allowed: Collection[str]
) -> tuple[str, ...]:
    """The shortest ends of the `wanted` names with which no name of `every` ends but `allowed`."""
    fits: dict[str, bool] = {}
    names = set()
    for name in wanted:
        parts = name.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        for end in ends:
            if end not in fits:
                fits[end] = all(one in allowed for one in every if _ends_with(one, end))
        names.add(next((end for end in ends if fits[end]), name))
    return tuple(sorted(names))


def layer_lists(base: PreTrainedModel) -> list[str]:
    """Names of the lists of layers in the part of a model that reads text.

    A list of layers is a `ModuleList` with linear layers in it, and not a part of another one. Most
    models have one; some number the parts of a layer in a list each.
    """
    towers = _towers(base)
    lists: list[str] = []
    for name, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or _below(name, [*lists, *towers]):
            continue
        if any(is_linear(part) for part in module.modules()):
            lists.append(name)
    return lists


def layer_of(name: str, lists: Collection[str]) -> int | None:
    """Index of the layer that a module is part of; None: it is in none of the lists."""
    for one in lists:
        if name.startswith(f"{one}."):
            return int(name.removeprefix(f"{one}.").split(".")[0])
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not, that computes by its own forward."""
    known = isinstance(module, LINEAR) or type(module).__name__ == nf4.KIND
    # The last one is a part of torch's attention, which reads the weight and calls nothing.
    return known and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _adaptable(base: PreTrainedModel) -> dict[str, nn.Module]:
    towers = _towers(base)
    return {
        name: module
        for name, module in base.named_modules()
        if is_linear(module) and _unfit(base, name, module) is None and not _below(name, towers)
    }


def _unfit(base: PreTrainedModel, name: str, module: nn.Module) -> str | None:
    """What a module is, where it cannot have an adapter; None: it can."""
    if not is_linear(module):
        return type(module).__name__
    if _is_output(base, module):
        return "the output layer"
    return "the head" if _in_head(name) else None


def _is_output(base: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a module is a language model's output layer.

    It sees the tokens of all records in one list, and often shares its weight with the embeddings:
    a record has no gradient of its own there.
    """
    return module is output_layer(base)


def _in_head(name: str) -> bool:
    return name == HEAD or name.startswith(f"{HEAD}.")


def _towers(base: PreTrainedModel) -> list[str]:
    """Names of the models within a model that read no text, such as a vision tower."""
    try:
        text = base.config.get_text_config()
    except ValueError:
        # It has two, and each reads text.
        return []
    readers = {type(base.config), type(text)}
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) not in readers
    ]


def _below(name: str, owners: Collection[str]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def _ends_with(name: str, target: str) -> bool:
    """Whether PEFT takes a name for a target."""
    return name == target or name.endswith(f".{target}")


def _modules_named(base: PreTrainedModel, target: str) -> dict[str, nn.Module]:
    towers = _towers(base)
    return {
        name: module
        for name, module in base.named_modules()
        if _ends_with(name, target) and not _below(name, towers)
    }


def _require_own(folder: Path, base: PreTrainedModel, chosen: Mapping[str, nn.Module]) -> None:
    """Refuses a layer that two modules have: PEFT would replace it in one of them alone."""
    places: dict[int, set[tuple[int, str]]] = {id(module): set() for module in chosen.values()}
    for name, module in base.named_modules(remove_duplicate=False):
        if id(module) in places:
            parent, _, last = name.rpartition(".")
            places[id(module)].add((id(base.get_submodule(parent)), last))
    for name, module in chosen.items():
        if len(places[id(module)]) > 1:
            raise ModelError(
                "modules of a base model share a linear layer, and an adapter would be in one of"
                " them alone",
                file=folder,
                field=f"lora.target_modules: {name}",
                remedy="leave this layer out of lora.target_modules, or use another base model",
            )


def _absence(lists: Collection[str], found: Collection[str], layer: int | None) -> str:
    if layer is None or not found:
        return "no module of that name"
    if not lists:
        return "the model has no list of layers"
    return "no module of that name in this layer"


def _no_target(
    folder: Path, base: PreTrainedModel, target: str, layer: int | None, found: str
) -> ModelError:
    adaptable, lists = _adaptable(base), layer_lists(base)
    kinds = {name.rpartition(".")[2] for name in adaptable}
    layers = sorted(set(_numbers(adaptable, lists)))
    return ModelError(
        "an adapter's target is not a linear layer of the base model",
        file=folder,
        field=f"lora.target_modules: {target}" + ("" if layer is None else f" in layer {layer}"),
        found=found if layer is None or layer in layers else f"no layer {layer}",
        accepted=f"linear layers {', '.join(sorted(kinds))} in "
        + (f"layers {layers}" if layers else "all layers: leave lora.layers out"),
    )


def _numbers(names: Collection[str], lists: Collection[str]) -> Iterator[int]:
    for name in names:
        layer = layer_of(name, lists)
        if layer is not None:
            yield layer
