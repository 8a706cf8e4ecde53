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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from umbel_client.data.tokens import Ints
from umbel_client.dpsgd.private_step import (
    Clipping,
    Gradients,
    clip_factors,
    flat,
    take_gradients,
)
from umbel_client.dpsgd.step_noise import by_device

MOST_STEPS = 2.0**24
"""Largest clip norm in steps of the grid: float32 holds every integer up to it."""


class IntegerSum:
    """Clips, rounds and sums the gradients of one batch, physical batch by physical batch."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        clip_norm: float,
        grid: float,
        clipping: Clipping = flat,
    ) -> None:
        """Sums the gradients of these parameters, in their order.

        Args:
            clip_norm: largest contribution of one unit, in the Euclidean norm.
            grid: one step, in units of the gradient.

        Raises:
            ValueError: the clip norm has more steps than `MOST_STEPS`.
        """
        if not clip_norm / grid <= MOST_STEPS:
            raise ValueError(f"a clip norm of {clip_norm / grid:g} steps, accepted: {MOST_STEPS:g}")
        self._parameters = list(parameters)
        self._there = by_device(self._parameters)
        self._clip_norm = clip_norm
        self._grid = grid
        self._clipping = clipping
        # float64 holds every integer up to 2^53: a sum of 2^29 units at the clip norm.
        self._sums = {
            parameter: torch.zeros(parameter.numel(), dtype=torch.float64, device=parameter.device)
            for parameter in self._parameters
        }

    def accumulate(
        self, records: int, units: Ints | None = None, *, rows: int | None = None
    ) -> None:
        """Adds one physical batch to the sum, and clears its gradients.

        Args:
            records: number of records that the losses were summed over.
            units: int64[records], the unit of each record; None: each record is a unit.
            rows: number of rows that the backward pass was over; those after the records only fill
                a shape. None: as many as records.

        Raises:
            ModelError: the parameters do not hold one gradient for each record.
        """
        count = records if rows is None else rows
        taken: Gradients = {
            device: [one[:records] for one in take_gradients(parameters, count)]
            for device, parameters in self._there.items()
        }
        # 1. The mean of each unit, and its factor of clipping.
        gradients, factors = clip_factors(taken, units, self._clip_norm, self._clipping)
        # 2. Rounded, each unit by itself, and 3. summed.
        steps = (factors / self._grid).float().unsqueeze(1)
        sums = {
            parameter: rows.mul_(steps.to(device)).round_().sum(0, dtype=torch.float64)
            for device, there in gradients.items()
            for parameter, rows in zip(self._there[device], there, strict=True)
        }
        # All of them are there, and to add them takes no memory: a part that runs out of it, and is
        # computed again, has added nothing.
        for parameter, part in sums.items():
            self._sums[parameter] += part

    def discard(self) -> None:
        """Drops the gradients of a backward pass that did not end; the sum stays as it is."""
        for parameter in self._parameters:
            holder: Any = parameter
            holder.grad_sample = None

    def values(self) -> npt.NDArray[np.int64]:
        """The sum in steps of the grid, int64[elements of all parameters]."""
        return np.concatenate([one.cpu().numpy() for one in self._sums.values()]).astype(np.int64)
