"""The sum of a batch's clipped gradients in whole steps of a grid, for noise that sites share.

1. Average the gradients of each unit's records, and clip each unit's gradient to the clip norm.
2. Divide each unit's gradient by the grid, and round each coordinate to the nearest integer.
3. Sum the integers over all physical batches. The sum is exact, so neither the order of the units
   nor the cut of a batch changes it, and sites that share a data set sum to what one site would.

This module is part of the core of the privacy guarantee. Never add or change here:

- A sum of values before they are rounded: the sensitivity is that of rounded units
  (`umbel_client.privacy.shared_noise`), and a sum of floats has another one.
- A gradient, norm or count that is returned, logged or shown before the noise is added.
- A value above 2^24 in a product of float32, which would no longer hold every integer.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from umbel_client.data.tokens import Ints
from umbel_client.dpsgd.gradient_sum import Clipping, Gradients, GradientSum, clip_factors, flat
from umbel_common.plans.plan import MOST_STEPS


class IntegerSum(GradientSum):
    """Clips, rounds and sums the gradients of one batch, physical batch by physical batch."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        clip_norm: float,
        grid: float,
        clipping: Clipping = flat,
        copies: Sequence[Sequence[torch.nn.Parameter]] = (),
    ) -> None:
        """Sums the gradients of these parameters, in their order.

        Args:
            clip_norm, copies: see `GradientSum`.
            grid: one step, in units of the gradient.

        Raises:
            ValueError: the clip norm has more steps than `MOST_STEPS`.
            RuntimeError: two copies are on one device.
        """
        if not clip_norm / grid <= MOST_STEPS:
            raise ValueError(f"a clip norm of {clip_norm / grid:g} steps, accepted: {MOST_STEPS}")
        # float64 holds every integer up to 2^53: a sum of 2^29 units at the clip norm.
        super().__init__(
            parameters,
            clip_norm=clip_norm,
            clipping=clipping,
            copies=copies,
            dtype=torch.float64,
        )
        self._grid = grid

    def _part(self, gradients: Gradients, units: Ints | None) -> dict[torch.device, torch.Tensor]:
        # 1. The mean of each unit, and its factor of clipping.
        gradients, factors = clip_factors(gradients, units, self._clip_norm, self._clipping)
        # 2. Rounded, each unit by itself, and 3. summed.
        steps = (factors / self._grid).float().unsqueeze(1)
        return {
            device: torch.cat(
                [rows.mul_(steps.to(device)).round_().sum(0, dtype=torch.float64) for rows in there]
            )
            for device, there in gradients.items()
        }

    def values(self) -> npt.NDArray[np.int64]:
        """The sum in steps of the grid, int64[elements of all parameters], in their order."""
        self._sum_copies()
        left = {
            device: iter(torch.split(total, [one.numel() for one in self._copies[0][device]]))
            for device, total in self._sums.items()
            if device in self._copies[0]
        }
        parts = [next(left[parameter.device]).cpu().numpy() for parameter in self.parameters]
        return np.concatenate(parts).astype(np.int64)
