"""One run of a site's tests of its model in a process, for all tests that need a job and no more.

Each job that is opened tests its model on made-up records, and each round does so under its own
adapter. Tests that open the same tiny model under the same plan would repeat one proof a hundred
times. Here the real `self_test` and `check_round` run once for each combination of what they depend
on, and their result is remembered: the numbers of rows that give equal bits. What `check_round`
proved under one adapter is taken to hold under others. A failure is never remembered.

Tests of these two, and of attacks on what they prove, use the real ones.
"""

import inspect
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from hashlib import sha256

import torch

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.bit_test import check_round
from umbel_client.training.self_test import self_test
from umbel_common.canonical import Entropy

PARTS = tuple(
    f"umbel_client.{wing}." for wing in ("data", "dpsgd", "models", "privacy", "tasks", "training")
)
"""The modules that a private step is made of. Where a test has replaced a part of one, nothing that
was proved of the others holds."""

_proofs: dict[Hashable, tuple[int, ...]] = {}
"""For each key, the numbers of rows that a limit keeps."""


def remembered_self_test(
    model: AdaptedModel, noise_multiplier: float | None, limit: BatchLimit, *, entropy: Entropy
) -> None:
    """Takes the place of `self_test`: runs it, unless it passed in this process for the same key.

    It always runs if the result depends on something that no key names: hooks on the model, or a
    source of entropy with a state.
    """

    def prove() -> None:
        self_test(model, noise_multiplier, limit, entropy=entropy)

    if noise_multiplier is None:
        prove()
    else:
        _remembered(prove, noise_multiplier, model, limit, entropy)


def remembered_check_round(model: AdaptedModel, limit: BatchLimit, *, entropy: Entropy) -> None:
    """Takes the place of `check_round`, as `remembered_self_test` does of `self_test`."""
    trained = tuple(name for name, value in model.adapter.items() if value.requires_grad)

    def prove() -> None:
        check_round(model, limit, entropy=entropy)

    _remembered(prove, trained, model, limit, entropy)


def _remembered(
    prove: Callable[[], None],
    what: Hashable,
    model: AdaptedModel,
    limit: BatchLimit,
    entropy: Entropy,
) -> None:
    key: Hashable = None
    if _is_stateless(entropy) and not any(map(_is_changed, model.copies)):
        rows = (limit.records, limit.choices)
        key = (tuple(map(_of_model, model.copies)), what, rows, _of(entropy), _Parts())
    kept = _proofs.get(key)
    if kept is None:
        records = limit.records
        prove()
        if key is not None and limit.records == records:
            _proofs[key] = limit.choices
    else:
        limit.keep(kept)


class _Parts:
    """All that the modules of `PARTS` and their classes hold, compared object by object."""

    def __init__(self) -> None:
        # Kept, so that no other object takes the identity of one of them.
        self._held = list(_held())
        self._identities = tuple(map(id, self._held))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Parts) and self._identities == other._identities

    def __hash__(self) -> int:
        return hash(self._identities)


def _held() -> Iterator[object]:
    for name, module in sorted(sys.modules.items()):
        if name.startswith(PARTS):
            for value in list(vars(module).values()):
                yield value
                if isinstance(value, type) and value.__module__.startswith("umbel_"):
                    yield from vars(value).values()


def _is_stateless(entropy: Entropy) -> bool:
    """Whether a test that does not run leaves the source as it is."""
    if entropy is os.urandom or entropy is bytes:
        return True
    return (
        inspect.isfunction(entropy)
        and not entropy.__closure__
        and not entropy.__defaults__
        and set(entropy.__code__.co_names) <= {"bytes", "os", "urandom"}
    )


def _of(entropy: Entropy) -> Hashable:
    """A function that is made anew for each job is still the same by its code."""
    return getattr(entropy, "__code__", entropy)


def _is_changed(model: AdaptedModel) -> bool:
    """Whether somebody has put a hook or another function on the model."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in model.modules()
    )


def _of_model(model: AdaptedModel) -> Hashable:
    """The base model's weights, layers and settings, and the plan; not the adapter, which the test
    sets and restores."""
    adapter = set(map(id, model.adapter.values()))
    weights = sha256()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) not in adapter:
            weights.update(f"{name} {value.dtype} {value.shape} {value.device}".encode())
            weights.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    layers = tuple((name, type(module)) for name, module in model.named_modules())
    plan = tuple(
        getattr(model.plan, name)
        for name in model.plan.__struct_fields__
        if name not in ("federation", "job")
    )
    settings = model.base.config.to_json_string()
    machine = (torch.get_num_threads(), torch.get_default_dtype(), model.precision, model.depth)
    kind = (model.frozen_output, len(model._checkpointed))
    return (weights.digest(), layers, plan, settings, machine, kind)
