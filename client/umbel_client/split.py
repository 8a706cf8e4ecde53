"""Runs the lower or the upper layers of a BERT-family encoder alone, through the model's own code.

Such a model has `embeddings` and `encoder.layer`. For the time of a call its list of layers is
replaced by a part of it, and, for the upper part, its embeddings by a module that passes on what it
is given. So attention masks, poolers and heads stay those of Transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

TOLERANCE = 1e-4
"""Largest difference of a split forward pass from a whole one, relative to its largest value."""


class _Given(nn.Module):
    """Stands in for the embeddings above the split."""

    def forward(self, inputs_embeds: torch.Tensor, **_unused: Any) -> torch.Tensor:
        return inputs_embeds


def body_of(base: PreTrainedModel) -> Any:
    """The encoder without a task's head."""
    return getattr(base, base.base_model_prefix, base)


def layers_of(base: PreTrainedModel) -> nn.ModuleList | None:
    """The encoder's layers, or None if it is not built like BERT."""
    body = body_of(base)
    layers = getattr(getattr(body, "encoder", None), "layer", None)
    has_embeddings = isinstance(getattr(body, "embeddings", None), nn.Module)
    return layers if has_embeddings and isinstance(layers, nn.ModuleList) else None


@contextmanager
def lower_part(base: PreTrainedModel, depth: int) -> Iterator[None]:
    """The encoder ends below layer `depth`."""
    body = body_of(base)
    layers = body.encoder.layer
    body.encoder.layer = layers[:depth]
    try:
        yield
    finally:
        body.encoder.layer = layers


@contextmanager
def upper_part(base: PreTrainedModel, depth: int) -> Iterator[None]:
    """The encoder starts with layer `depth` and is given `inputs_embeds`, the output below it."""
    body = body_of(base)
    layers, embeddings = body.encoder.layer, body.embeddings
    body.encoder.layer, body.embeddings = layers[depth:], _Given()
    try:
        yield
    finally:
        body.encoder.layer, body.embeddings = layers, embeddings


@torch.no_grad()
def splits(base: PreTrainedModel, depth: int) -> bool:
    """Whether the two parts, one after the other, give what the whole model gives.

    Tried on two made-up records, one of them padded: an architecture whose layers pass more than
    hidden states to each other is found out here, not in training.
    """
    if layers_of(base) is None:
        return False
    device = base.device
    ids = torch.arange(5, 19, device=device).reshape(2, 7) % base.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    try:
        whole = base(input_ids=ids, attention_mask=mask)[0]
        with lower_part(base, depth):
            hidden = body_of(base)(input_ids=ids, attention_mask=mask)[0]
        with upper_part(base, depth):
            parts = base(inputs_embeds=hidden, attention_mask=mask)[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    if whole.dim() == 3:
        whole, parts = whole * mask[..., None], parts * mask[..., None]
    return bool((whole - parts).abs().max() <= TOLERANCE * whole.abs().max())
