"""Cross entropy of a language model's next tokens, without keeping logits over the vocabulary.

The output layer is frozen, so logits are needed for two things only: the loss, and its gradient by
the hidden state. Both are computed a few tokens at a time (Hsu et al. 2024, "Liger Kernel",
FusedLinearCrossEntropy), and no logits are kept for the backward pass. PyTorch's own
`linear_cross_entropy` (2.13) rounds losses to bfloat16, and takes five times as long on a CPU.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Bytes of the logits that exist at once. On a CPU it is below malloc's mmap threshold: larger
blocks are returned to the kernel, and cleared again at each step."""


def token_losses(hidden: torch.Tensor, layer: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """float32[m]: -log of the probability that the output layer gives each target.

    Args:
        hidden: float32[m, hidden size]; may need a gradient.
        layer: hidden states -> logits over the vocabulary; frozen.
        targets: int64[m].
    """
    if type(layer) is not nn.Linear:
        # Packed weights, or a layer of an architecture's own: autograd knows its gradient.
        return cross_entropy(layer(hidden).float(), targets, reduction="none")
    assert not layer.weight.requires_grad
    losses: torch.Tensor = _Losses.apply(hidden, layer, targets)  # type: ignore[no-untyped-call]
    return losses


class _Losses(torch.autograd.Function):
    """Computes the gradient together with the loss, while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, layer: nn.Linear, targets: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        for part in _parts(len(hidden), layer.out_features, hidden.device):
            logits = layer(hidden[part]).float()
            norms = logits.logsumexp(-1, keepdim=True)
            chosen = targets[part, None]
            losses[part] = (norms - logits.gather(1, chosen))[:, 0]
            if gradient is not None:
                # d loss / d logits: the probabilities, less one at the target.
                slope = logits.sub_(norms).exp_()
                slope.scatter_add_(1, chosen, -torch.ones_like(norms))
                gradient[part] = slope.to(layer.weight.dtype) @ layer.weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator renames
        ctx: Any, slope: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope[:, None], None, None


def _parts(count: int, vocabulary: int, device: torch.device) -> list[slice]:
    rows = max(1, _BYTES.get(device.type, _BYTES["cpu"]) // (4 * vocabulary))
    return [slice(start, start + rows) for start in range(0, count, rows)]
