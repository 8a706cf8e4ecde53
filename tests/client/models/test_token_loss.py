"""The loss of a language model's tokens, a few at a time."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from umbel_client.models import token_loss
from umbel_client.models.token_loss import token_losses

VOCABULARY, WIDTH = 50, 6


def frozen(*, bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    layer.requires_grad_(False)
    return layer


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_loss._BYTES, "cpu", 3 * 4 * VOCABULARY)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_losses_and_gradients_are_those_of_all_logits_at_once(count: int, bias: bool) -> None:
    layer = frozen(bias=bias)
    hidden = torch.randn(count, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (count,))
    slopes = torch.randn(count)
    found: list[Any] = []
    for losses in (
        token_losses(hidden, layer, targets),
        cross_entropy(layer(hidden), targets, reduction="none"),
    ):
        (gradient,) = torch.autograd.grad(losses, hidden, slopes)
        found.append((losses.detach(), gradient))
    (losses, gradient), (expected, expected_gradient) = found
    assert torch.allclose(losses, expected, atol=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)


def test_the_gradient_is_the_losss_own_in_double_precision() -> None:
    layer = frozen().double()
    hidden = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (4,))
    slope = torch.autograd.grad(token_losses(hidden, layer, targets).sum(), hidden)[0]
    step = 1e-2
    for row in range(4):
        for column in range(WIDTH):
            moved = torch.zeros_like(hidden)
            moved[row, column] = step
            with torch.no_grad():
                above = token_losses(hidden + moved, layer, targets).sum()
                below = token_losses(hidden - moved, layer, targets).sum()
            assert float((above - below) / (2 * step)) == pytest.approx(
                float(slope[row, column]), abs=2e-4
            )


def test_logits_far_apart_give_a_finite_loss() -> None:
    layer = frozen()
    hidden = torch.full((2, WIDTH), 1e4, requires_grad=True)
    losses = token_losses(hidden, layer, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    kept: list[torch.Size] = []
    hidden = torch.randn(10, WIDTH, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_losses(hidden, frozen(), torch.zeros(10, dtype=torch.int64))
    assert kept == [(10, WIDTH)]
