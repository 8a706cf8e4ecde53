"""A base model with made-up weights of the right shapes, to try what no weight decides."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from umbel_client.models.base.folder import BaseContent, build_base
from umbel_client.models.base.skeleton import building
from umbel_client.models.base.weights import opened_weights
from umbel_common.plans.plan import Task
from umbel_host.files.model_digest import shards_of, weights_of
from umbel_host.files.model_folder import read_texts


def made_up_base(folder: Path, task: Task, depth: int | None = None) -> PreTrainedModel:
    """The model with made-up weights of the shapes that its files have.

    Weights share their memory: together they take about that of the largest one.

    Args:
        depth: number of layers; None: all of them.

    Raises:
        ModelError: see `build_base`.
    """
    texts = read_texts(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for file in shards_of(folder, texts, weights_of(folder)):
        with opened_weights(folder / file) as shard:
            for name, shape in shard.shapes.items():
                if shard.are_numbers[name]:
                    shapes[name] = shape
                else:
                    tensors[name] = torch.zeros((), dtype=torch.int64).expand(shape)
    with building(folder):
        tensors |= _made_up(shapes)
    return build_base(BaseContent(folder, texts, tensors, {}), task, depth)


_LARGEST = 1 << 28
"""Number of elements above which a made-up weight, mostly an embedding, has rows that overlap."""


def _made_up(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Float32 tensors with values as a fresh model has them, by name."""
    random = torch.Generator().manual_seed(0)
    sizes: dict[int, int] = {}
    for shape in shapes.values():
        size = math.prod(shape)
        if len(shape) > 1 and size <= _LARGEST:
            sizes[math.prod(shape[1:])] = max(sizes.get(math.prod(shape[1:]), 0), size)
    # All matrices with as many inputs are parts of one vector; each begins at another place.
    vectors = {
        inputs: torch.randn(size + len(shapes), generator=random) / math.sqrt(inputs or 1)
        for inputs, size in sizes.items()
    }
    made: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        size, inputs = math.prod(shape), math.prod(shape[1:])
        if len(shape) < 2:
            small = 0.02 * torch.randn(shape, generator=random)
            # The weight of a norm, as a rule.
            made[name] = 1 + small if name.endswith("weight") else small
        elif size <= _LARGEST:
            made[name] = vectors[inputs][number : number + size].view(shape)
        else:
            values = torch.randn(sum(shape), generator=random) / math.sqrt(inputs)
            made[name] = values.as_strided(shape, [1] * len(shape))
    return made
