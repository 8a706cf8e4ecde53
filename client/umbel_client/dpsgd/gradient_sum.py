"""The sum of a batch's clipped gradients: what a step of DP-SGD is made of, in every mode.

Its steps have the numbers of `umbel_client.dpsgd.private_step`: the gradient of each record (1),
the mean and the clipping of each unit (2), and the sum over physical batches and copies of the
model (3). A subclass says in which numbers a physical batch is summed, and adds the noise.

This module is part of the core of the privacy guarantee. Never add or change here:

- A gradient, norm or count that is returned, logged or shown before the noise is added.
- A norm over the parameters of one device alone: a record has one norm, and one factor of clipping,
  over everything that is trained.
- A copy of the model with other values, or one that was not shown to give a record the same bits
  (`umbel_client.training.bit_test`): which copy computes a record follows from the other records.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from umbel_client.data.tokens import Ints
from umbel_client.dpsgd.fused import NotSeparate
from umbel_client.dpsgd.step_noise import by_device
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.physical_batches import compute_parts
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_client.tasks.task import Task

Clipping = Callable[[torch.Tensor, float], torch.Tensor]
"""(norms float64[n], clip norm) -> factors float64[n] that bring no norm above the clip norm."""


def flat(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Scales longer gradients to the clip norm (Abadi et al. 2016, section 3.1)."""
    return clip_norm / norms.clamp(min=clip_norm)


def automatic(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Scales all to nearly the clip norm: AUTO-S (Bu et al. 2023, section 4) with gamma = 0.01."""
    return clip_norm / (norms + 0.01)


CLIPPINGS: dict[str, Clipping] = {"flat": flat, "automatic": automatic}
"""The rules of clipping by their names in a plan."""


Gradients = Mapping[torch.device, list[torch.Tensor]]
"""For each parameter of each device float32[n, elements], on that device; n is the same for all."""


class GradientSum(ABC):
    """Steps 2 and 3: clips the gradients of units, and sums them over physical batches and copies.

    A subclass says in `_part` how the units of one physical batch are summed.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        clip_norm: float,
        clipping: Clipping,
        copies: Sequence[Sequence[torch.nn.Parameter]],
        dtype: torch.dtype,
    ) -> None:
        """Sums the gradients of these parameters, in their order; each stays on its device.

        Args:
            clip_norm: largest contribution of one unit, in the Euclidean norm.
            copies: the same parameters in other copies of the model, each on a device of its own.
            dtype: of the sums.

        Raises:
            RuntimeError: two copies are on one device.
        """
        self.parameters = list(parameters)
        self._clip_norm = clip_norm
        self._clipping = clipping
        self._copies = [by_device(own) for own in (self.parameters, *copies)]
        self._sums: dict[torch.device, torch.Tensor] = {}
        for copy in self._copies:
            if not self._sums.keys().isdisjoint(copy):
                raise RuntimeError("two copies of a model are on one device")
            for device, own in copy.items():
                size = sum(parameter.numel() for parameter in own)
                self._sums[device] = torch.zeros(size, device=device, dtype=dtype)

    def accumulate(
        self,
        records: int,
        units: Ints | None = None,
        *,
        rows: int | None = None,
        copy: int = 0,
    ) -> None:
        """Adds one physical batch's clipped gradients to the sum of a copy, and clears them.

        Copies may do so at the same time: each has its own gradients, and its own sum.

        Args:
            records: number of records that the losses were summed over.
            units: int64[records], the unit of each record, any numbers; None: each record is a
                unit.
            rows: number of rows that the backward pass was over; those after the records only fill
                a shape, and their gradients are dropped. None: as many as records.
            copy: the copy that has computed it; 0: the one whose parameters are trained.

        Raises:
            ModelError: the parameters do not hold one gradient for each record.
        """
        # 2. One gradient for each record, or none is added.
        gradients = {
            device: [
                taken[:records]
                for taken in take_gradients(parameters, records if rows is None else rows)
            ]
            for device, parameters in self._copies[copy].items()
        }
        # 3. The sum over physical batches; `_part` is step 2 and this batch's part of step 3.
        sums = self._part(gradients, units)
        # All of them are there, and to add them takes no memory: of a part that runs out of it, and
        # is computed again, nothing was added. What fails here all the same ends the round.
        try:
            for device, total in sums.items():
                self._sums[device] += total
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError("gradients were added on some devices only") from error

    def discard(self) -> None:
        """Drops the gradients of backward passes that did not end; the sums stay as they are."""
        for copy in self._copies:
            for parameters in copy.values():
                for parameter in parameters:
                    holder: Any = parameter
                    holder.grad_sample = None

    @abstractmethod
    def _part(self, gradients: Gradients, units: Ints | None) -> dict[torch.device, torch.Tensor]:
        """The sum of one physical batch, [trained elements] of each device, there."""

    def _sum_copies(self) -> None:
        """Step 3: adds the sums of the copies to the first one's, in their order."""
        for copy in self._copies[1:]:
            for device, first in zip(copy, self._copies[0], strict=True):
                self._sums[first] += self._sums[device].to(first)
                self._sums[device].zero_()


def clip_factors(
    gradients: Gradients, units: Ints | None, clip_norm: float, clipping: Clipping
) -> tuple[Gradients, torch.Tensor]:
    """The gradient of each unit, and the factor that brings it to the clip norm at most.

    Args:
        gradients: of the records; may be changed.
        units: int64[n], the unit of each record, any numbers; None: each record is a unit.
        clip_norm: largest contribution of one unit, in the Euclidean norm.
        clipping: the rule of clipping.

    Returns:
        For each parameter of each device float32[units, elements], and the factors
        float64[units], on the first device.
    """
    norms = _finite_norms(gradients)
    if units is not None:
        gradients = {there: _unit_means(rows, units) for there, rows in gradients.items()}
        norms = _finite_norms(gradients)
    return gradients, clipping(norms, clip_norm)


def _finite_norms(gradients: Gradients) -> torch.Tensor:
    """Norm of each row over the parameters of all devices, float64[n], on the first device.

    Rows without a finite norm become zero, on every device.

    In float32 the norm of a long tensor comes out too small, and the clipped gradient too long: by
    0.8 % for ten million equal elements.

    A gradient that overflowed has no direction to clip. Its NaN would pass through clipping and
    noise, and tell that the record is there.
    """
    parts = [
        torch.stack([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in there])
        for there in gradients.values()
    ]
    every = torch.cat([part.to(parts[0].device) for part in parts])
    norms: torch.Tensor = torch.linalg.vector_norm(every, dim=0)
    # The sum is finite only if all norms are.
    if not math.isfinite(norms.sum()):
        finite = torch.isfinite(norms)
        for device, there in gradients.items():
            broken = ~finite.to(device)
            for rows in there:
                rows[broken] = 0
        norms[~finite] = 0
    return norms


def _unit_means(gradients: list[torch.Tensor], units: Ints) -> list[torch.Tensor]:
    """float32[n, elements] -> float32[units, elements]."""
    _, numbers, counts = np.unique(units, return_inverse=True, return_counts=True)
    device = gradients[0].device
    index = torch.from_numpy(numbers).to(device)
    shares = torch.from_numpy((1.0 / counts).astype(np.float32)).to(device)[index].unsqueeze(1)
    return [
        rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, index, rows * shares)
        for rows in gradients
    ]


def take_gradients(parameters: list[torch.nn.Parameter], records: int) -> list[torch.Tensor]:
    """Takes the gradients off the parameters: for each parameter float32[records, elements].

    A list of gradients would come from two passes that were mixed, and another length from tokens
    that were taken for records. The gradients become float32: norms of bfloat16 gradients would be
    bfloat16 too, and the clipping not exact.

    Raises:
        ModelError: the parameters do not hold one gradient for each record.
    """
    taken = []
    for parameter in parameters:
        holder: Any = parameter
        gradients = getattr(holder, "grad_sample", None)
        if not isinstance(gradients, torch.Tensor) or len(gradients) != records:
            shape = tuple(gradients.shape) if isinstance(gradients, torch.Tensor) else None
            raise NotSeparate(parameter, found=shape, accepted=(records, *parameter.shape))
        taken.append(gradients.float().view(records, -1))
        holder.grad_sample = None
    return taken


def sum_batch(
    task: Task,
    model: AdaptedModel,
    data: PreparedData,
    chosen: Ints,
    total: GradientSum,
    limit: BatchLimit,
    units: Ints | None = None,
) -> None:
    """Steps 1 to 3: adds the clipped gradients of the chosen records to a sum.

    Args:
        chosen: indices of the batch's records, int64[n].
        limit: the number of records computed at once; lowered where memory runs out.
        units: int64[records of the data], the unit of each record; None: each record is a unit.

    Raises:
        ModelError: a unit's records are in several physical batches.
    """

    def compute(copy: int, part: Part) -> None:
        # 1. Each record's gradient.
        with torch.enable_grad():
            losses = task.losses(model.copies[copy], task.batch(data, part))
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch
        # 2. Clipped, and 3. added to the sum.
        own = None if units is None else units[part.records]
        total.accumulate(len(part), own, rows=part.rows, copy=copy)

    on_each = [partial(compute, copy) for copy in range(len(model.copies))]
    compute_parts(data, chosen, limit, units, compute=on_each, discard=total.discard, private=True)
