"""Runs the lower or the upper layers of a model alone, through the model's own code.

Two families are known: encoders built like BERT (`embeddings`, `encoder.layer`) and decoders built
like Llama (`embed_tokens`, `layers`, `norm`). During a call, the list of layers is replaced by a
part of it. The upper part of an encoder gets embeddings that return their input, and the lower part
of a decoder gets a last norm that does nothing. So attention masks, poolers and heads stay those of
Transformers.
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
    """The model without a task's head."""
    return getattr(base, base.base_model_prefix, base)


def output_layer(base: PreTrainedModel) -> nn.Module | None:
    """The layer that makes logits of a language model's hidden states; None without one."""
    layer: nn.Module | None = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    return layer


def layers_of(base: PreTrainedModel) -> nn.ModuleList | None:
    """The model's layers, or None if it is built like neither family, or parts would not compute as
    they do in the whole."""
    # Layers with other attention windows are chosen by their number, which a part would change.
    kinds = getattr(base.config, "layer_types", None) or ["one"]
    return all_layers(base) if len(set(kinds)) == 1 or not _is_decoder(body_of(base)) else None


def all_layers(base: PreTrainedModel) -> nn.ModuleList | None:
    """The model's layers, or None if it is built like neither family."""
    body = body_of(base)
    if _is_decoder(body):
        decoders: nn.ModuleList = body.layers
        return decoders
    layers = getattr(getattr(body, "encoder", None), "layer", None)
    has_embeddings = isinstance(getattr(body, "embeddings", None), nn.Module)
    return layers if has_embeddings and isinstance(layers, nn.ModuleList) else None


def _is_decoder(body: Any) -> bool:
    parts = {"embed_tokens": nn.Embedding, "layers": nn.ModuleList, "norm": nn.Module}
    return all(isinstance(getattr(body, name, None), kind) for name, kind in parts.items())


@contextmanager
def without_layers(base: PreTrainedModel) -> Iterator[None]:
    """Within the context, the model has none of its layers."""
    body = body_of(base)
    if _is_decoder(body):
        with _replaced(body, layers=nn.ModuleList()):
            yield
    else:
        with _replaced(body.encoder, layer=nn.ModuleList()):
            yield


@contextmanager
def lower_part(base: PreTrainedModel, depth: int) -> Iterator[None]:
    """Within the context, the body ends below layer `depth`."""
    body = body_of(base)
    if _is_decoder(body):
        with _replaced(body, layers=body.layers[:depth], norm=nn.Identity()):
            yield
    else:
        with _replaced(body.encoder, layer=body.encoder.layer[:depth]):
            yield


@contextmanager
def upper_part(base: PreTrainedModel, depth: int) -> Iterator[None]:
    """Within the context, the body starts at layer `depth`, with `inputs_embeds` from below it."""
    body = body_of(base)
    if _is_decoder(body):
        with _replaced(body, layers=body.layers[depth:]):
            yield
    else:
        part = body.encoder.layer[depth:]
        with _replaced(body.encoder, layer=part), _replaced(body, embeddings=_Given()):
            yield


@contextmanager
def _replaced(owner: Any, **modules: nn.Module) -> Iterator[None]:
    former = {name: getattr(owner, name) for name in modules}
    for name, module in modules.items():
        setattr(owner, name, module)
    try:
        yield
    finally:
        for name, module in former.items():
            setattr(owner, name, module)


@torch.no_grad()
def splits(base: PreTrainedModel, depth: int) -> bool:
    """Whether the two parts, one after the other, give the output of the whole model.

    It is tried on two made-up records, one of them padded. An architecture whose layers pass more
    than hidden states to each other fails here, not in training.
    """
    if layers_of(base) is None:
        return False
    ids, mask = made_up_inputs(base)
    try:
        whole = base(input_ids=ids, attention_mask=mask)[0]
        with lower_part(base, depth):
            hidden = body_of(base)(input_ids=ids, attention_mask=mask)[0].to(ids.device)
        with upper_part(base, depth):
            parts = base(inputs_embeds=hidden, attention_mask=mask)[0].to(whole.device)
    except Exception:
        # An architecture's own code may fail in any way where it is taken apart.
        return False
    if whole.dim() == 3:
        mask = mask.to(whole.device)
        whole, parts = whole * mask[..., None], parts * mask[..., None]
    return bool((whole - parts).abs().max() <= TOLERANCE * whole.abs().max())


@torch.no_grad()
def output_is_plain(base: PreTrainedModel) -> bool:
    """Whether a language model's logits are its output layer of the last hidden state, no more.

    Then logits can be computed for the tokens that count alone.
    """
    ids, mask = made_up_inputs(base)
    whole = base(input_ids=ids, attention_mask=mask)[0]
    hidden = body_of(base)(input_ids=ids, attention_mask=mask)[0]
    layer = output_layer(base)
    if layer is None or hidden.shape[:-1] != whole.shape[:-1]:
        return False
    if hidden.shape[-1] != getattr(layer, "in_features", hidden.shape[-1]):
        return False  # what it reads is computed of the hidden state
    logits = layer(hidden)
    return bool((whole - logits).abs().max() <= TOLERANCE * whole.abs().max())


def made_up_inputs(base: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64[2, 7] each, of two made-up records, one of them padded."""
    ids = torch.arange(5, 19, device=base.device).reshape(2, 7)
    ids %= base.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask
