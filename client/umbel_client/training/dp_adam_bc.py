"""DP-AdamBC: Adam without the share of its second moment that comes from DP-SGD's noise.

Tang, Shpilevskiy and Lecuyer (2024), "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply
Bias Correction)", algorithm 1. Adam divides by the root of the mean squared gradient. Under DP-SGD
the noise's variance is most of that mean, and it is the same for every parameter, so Adam hardly
scales anything. The variance is known, and subtracting a known number is post-processing.
"""

from collections.abc import Callable
from typing import Any

import torch


class UnbiasedAdam(torch.optim.Optimizer):
    """theta -= lr m_hat / sqrt(max(v_hat - noise variance, least moment)).

    The state has the names and shapes of `torch.optim.Adam`'s. Its `exp_avg_sq` is the mean of the
    squared gradients, each less the noise's variance at its step. The paper subtracts once at the
    end, which is the same while the noise is; this is right too where a later round has other
    noise. The mean may be negative.
    """

    def __init__(
        self,
        groups: Any,
        *,
        betas: tuple[float, float],
        least_moment: float,
        noise_deviation: float,
    ) -> None:
        """Takes parameter groups with their own `lr`, as `torch.optim.Adam` does.

        Args:
            least_moment: the paper's gamma', in squared units of the gradient.
            noise_deviation: standard deviation of the noise in each element of the gradient.
        """
        super().__init__(groups, {})
        self._betas = betas
        self._least_moment = least_moment
        self._noise_variance = noise_deviation**2

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch overloads it by whether a closure is given
        self, closure: Callable[[], float] | None = None
    ) -> None:
        """Moves every parameter that has a gradient; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"])

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        steps = float(state["step"])
        beta1, beta2 = self._betas
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].lerp_(gradient.square() - self._noise_variance, 1 - beta2)
        moment = (state["exp_avg_sq"] / (1 - beta2**steps)).clamp_(min=self._least_moment)
        parameter.addcdiv_(state["exp_avg"], moment.sqrt_(), value=-rate / (1 - beta1**steps))
