"""Fused layers whose one backward pass keeps the gradients of records apart.

This module is part of the core of the privacy guarantee. Never add a layer in which the gradient of
one record depends on another record: gradients that are not separate are refused.

The gradient of the input is computed as usual. The gradient of a weight is a batched matrix product
in place of a product over all records (Goodfellow 2015, for sequences): the same work without the
last sum.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from umbel_client.models.inputs import whole_rows
from umbel_common.errors import ModelError


@dataclass(frozen=True)
class FusedLora:
    """y = x W^T + b + scaling (x A^T) B^T, over the tensors of the model's own layer."""

    weight: torch.Tensor
    """[out, in], frozen."""
    bias: torch.Tensor | None
    A: nn.Parameter
    """[rank, in]."""
    B: nn.Parameter
    """[out, rank]."""
    scaling: float

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, ..., in] -> [n, ..., out], in the base layer's precision."""
        output: torch.Tensor = _LoraFunction.apply(inputs, self.A, self.B, self)  # type: ignore[no-untyped-call]  # torch
        return output


class NotSeparate(ModelError):
    """A parameter does not get one gradient for each record."""

    def __init__(self, parameter: object, *, found: object, accepted: object) -> None:
        super().__init__(
            "the gradients of records are not separate",
            found=found,
            accepted=accepted,
            remedy="leave this layer out of lora.target_modules, or use another base model",
        )
        self.parameter = parameter
        """`per_record_gradients` gives it its name."""


class _LoraFunction(torch.autograd.Function):
    """Leaves the gradients of records in `grad_sample` of A and B, and gives autograd none."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, A: torch.Tensor, B: torch.Tensor, layer: FusedLora
    ) -> torch.Tensor:
        dtype = _precision(inputs, layer.weight)
        x = inputs.to(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        output = nn.functional.linear(x, layer.weight.to(dtype), bias)
        hidden = (x @ A.to(dtype).t()).mul_(layer.scaling)
        output.view(-1, len(B)).addmm_(hidden.view(-1, len(A)), B.to(dtype).t())
        # What no gradient needs is not kept: with A frozen, inputs are most of the memory.
        needs_A, needs_B = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if needs_A else None, hidden if needs_B else None)
        ctx.layer, ctx.inputs_dtype = layer, inputs.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # ctx, by position
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient,) = grad_outputs
        layer: FusedLora = ctx.layer
        x, hidden = ctx.saved_tensors
        needs_inputs, needs_A, needs_B, _ = ctx.needs_input_grad
        if needs_B:
            _keep(layer.B, _by_record(gradient, hidden))
        if not needs_inputs and not needs_A:
            return None, None, None, None
        dtype, rows = gradient.dtype, gradient.reshape(-1, gradient.shape[-1])
        inner = (rows @ layer.B.to(dtype)).mul_(layer.scaling)
        if needs_A:
            _keep(layer.A, _by_record(inner.view(*gradient.shape[:-1], -1), x))
        if not needs_inputs:
            return None, None, None, None
        backward = (rows @ layer.weight.to(dtype)).addmm_(inner, layer.A.to(dtype))
        return backward.view(*gradient.shape[:-1], -1).to(ctx.inputs_dtype), None, None, None


class _LinearFunction(torch.autograd.Function):
    """y = x W^T + b; as `_LoraFunction`, for W and b."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        dtype = _precision(inputs, weight)
        x = inputs.to(dtype)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.weight, ctx.bias, ctx.inputs_dtype = weight, bias, inputs.dtype
        cast = None if bias is None else bias.to(dtype)
        return nn.functional.linear(whole_rows(x), weight.to(dtype), cast)[: len(x)]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # ctx, by position
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None]:
        (gradient,) = grad_outputs
        (x,) = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        if needs_weight:
            _keep(ctx.weight, _by_record(gradient, x))
        if needs_bias:
            _keep(ctx.bias, _tokens(gradient).sum(1))
        if not needs_inputs:
            return None, None, None
        inner = whole_rows(gradient) @ ctx.weight.to(gradient.dtype)
        return inner[: len(gradient)].to(ctx.inputs_dtype), None, None


def _by_record(gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """[n, ..., out] and [n, ..., in] -> [n, out, in]: a weight's gradient for each record."""
    return torch.bmm(_tokens(gradient).transpose(1, 2), _tokens(inputs))


def _tokens(values: torch.Tensor) -> torch.Tensor:
    """[n, ..., features] -> [n, tokens, features]; [n, features] is one token for each record."""
    return values.reshape(len(values), -1, values.shape[-1])


def _keep(parameter: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds the gradients of a layer's call to the parameter's `grad_sample`, float32[n, *shape].

    A layer may be called several times for the same records, if this is in one backward pass.

    Raises:
        ModelError: gradients of an earlier pass, or of another number of records, are there.
    """
    # Torch has no public name for the current backward pass. Forward passes cannot be counted
    # instead: gradient checkpointing repeats them within the backward pass.
    this_pass = torch._C._current_graph_task_id()
    target: Any = parameter
    held = getattr(target, "grad_sample", None)
    if held is None:
        target.grad_sample, target.grad_sample_pass = rows.float(), this_pass
    elif target.grad_sample_pass == this_pass and held.shape == rows.shape:
        held += rows
    else:
        raise NotSeparate(
            parameter,
            found=f"{len(held)} records and {len(rows)}, in one parameter",
            accepted="one backward pass a step, and the records first in each layer's input",
        )


def fused_linear(inputs: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A trained linear layer: [n, ..., in] -> [n, ..., out], in its own precision."""
    output: torch.Tensor = _LinearFunction.apply(inputs, layer.weight, layer.bias)  # type: ignore[no-untyped-call]  # torch
    return output


def _precision(inputs: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
