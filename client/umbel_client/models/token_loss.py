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
from torch.nn.functional import cross_entropy, pad

_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Bytes of the logits that exist at once. On a CPU it is below malloc's mmap threshold: larger
blocks are returned to the kernel, and cleared again at each step."""
_COMMON_VOCABULARY = 65_536
_MOST_ROWS = 64
"""Tokens of the last block that are computed for nothing stay few."""


def token_losses(hidden: torch.Tensor, layer: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """float32[m]: -log of the probability that the output layer gives each target.

    Args:
        hidden: float32[m, hidden size]; may need a gradient.
        layer: hidden states -> logits over the vocabulary; frozen.
        targets: int64[m].
    """
    count, rows = len(targets), _rows_at_once(layer, hidden.device)
    # In products of one shape: else how many tokens the other records have would change the bits.
    hidden = pad(hidden, (0, 0, 0, -count % rows))
    targets = pad(targets, (0, -count % rows))
    if type(layer) is not nn.Linear:
        # Packed weights, or a layer of an architecture's own: autograd knows its gradient.
        parts = [layer(part).float() for part in torch.split(hidden, rows)]
        logits = torch.cat(parts) if parts else layer(hidden).float()
        return cross_entropy(logits[:count], targets[:count], reduction="none")
    assert not layer.weight.requires_grad
    losses: torch.Tensor = _Losses.apply(hidden, layer, targets, rows)  # type: ignore[no-untyped-call]
    return losses[:count]


class _Losses(torch.autograd.Function):
    """Computes the gradient together with the loss, while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, layer: nn.Linear, targets: torch.Tensor, rows: int
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        for part in (slice(start, start + rows) for start in range(0, len(hidden), rows)):
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
    ) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope[:, None], None, None, None


def _rows_at_once(layer: nn.Module, device: torch.device) -> int:
    """A power of two, by the size of the vocabulary where it is known."""
    vocabulary = int(getattr(layer, "out_features", _COMMON_VOCABULARY))
    most = _BYTES.get(device.type, _BYTES["cpu"]) // (4 * vocabulary)
    return 1 << min(max(most, 1).bit_length() - 1, _MOST_ROWS.bit_length() - 1)
