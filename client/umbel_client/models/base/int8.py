"""A frozen base model in eight bits: each row of a weight has a scale of its own.

Only the weights are held in eight bits. They are turned back for each product, so a record's values
decide nothing, unlike in LLM.int8 (Dettmers et al. 2022), which treats large values of a batch by
themselves. Each site decides for itself. The adapter, its per-record gradients, clipping and noise
are float32 as always; gradients are those of a slightly different base model.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from umbel_client.models.base.nf4 import layers_to_quantise

_LARGEST = 127


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight is one of `eight_bits`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `nn.Linear`; computed in the precision of autocast, or else of the inputs."""
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]  # torch
            input, self.weight, scale_of(self.weight), self.bias
        )
        return product


def quantise(base: PreTrainedModel) -> None:
    """Replaces the same layers as `nf4.quantise` by layers of eight bits.

    Weights that were quantised while they were read are taken as they are.
    """
    for parent, name, layer in layers_to_quantise(base):
        replacement = Int8Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        weight: Any = layer.weight
        if scale_of(weight) is None:
            weight = eight_bits(weight.detach(), weight.device)
        replacement.weight = weight
        replacement.bias = layer.bias
        setattr(parent, name, replacement)
    base.requires_grad_(False)


def eight_bits(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A weight in eight bits on a device, int8[out, in], from its values, float32[out, in].

    The scale of its rows is an attribute of it; see `scale_of`.
    """
    largest = values.abs().amax(1, keepdim=True)
    # A row that is not finite has no finite scale, and shows in what it computes.
    scale = torch.where(largest == 0, 1.0, largest / _LARGEST)
    rounded = (values / scale).round_().to(torch.int8)
    weight: Any = nn.Parameter(rounded.to(device), requires_grad=False)
    weight.row_scale = scale.to(device)
    quantised: torch.Tensor = weight
    return quantised


def scale_of(weight: torch.Tensor) -> torch.Tensor | None:
    """The scale of each row, float32[out, 1]; None: the weight is not one of `eight_bits`."""
    return getattr(weight, "row_scale", None)


class _Product(torch.autograd.Function):
    """Turns the weight back in each pass: autograd would keep it for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        device = inputs.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        )
        ctx.weight, ctx.scale, ctx.inputs_dtype = weight, scale, inputs.dtype
        cast = None if bias is None else bias.to(dtype)
        return nn.functional.linear(inputs.to(dtype), _whole(weight, scale, dtype), cast)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        weight = _whole(ctx.weight, ctx.scale, gradient.dtype)
        return (gradient @ weight).to(ctx.inputs_dtype), None, None, None


def _whole(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight in a precision, [out, in]: rounded once."""
    return (weight.data * scale).to(dtype)
