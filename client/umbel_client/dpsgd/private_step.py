"""One step of DP-SGD (Abadi et al. 2016, algorithm 1).

1. Compute the gradient of each record, one physical batch after the other; where the model has
   copies, as many at once as there are copies. A unit lies in one physical batch (ModelError); one
   that does not fit into memory counts as zero.
2. Average the gradients of each unit's records, and clip each unit's gradient to the clip norm. One
   gradient for each record is there (ModelError).
3. Sum the clipped gradients over all physical batches, and over the copies of the model.
4. Add Gaussian noise once, with the standard deviation noise multiplier times clip norm.
5. Divide by the expected batch size, whatever the size of the batch.
6. Let the optimizer take the step, and give the copies its values.

This module is part of the core of the privacy guarantee. Never add or change here:

- A step that is skipped, or noise that is left out, because a batch is empty or small.
- Noise for each physical batch, or none for some of them: it is added once a step.
- A division by the realised size of the batch: it would tell that size.
- A gradient, norm or count that is returned, logged or shown before the noise is added.
- Noise from another source than `StepNoise`.
- A norm over the parameters of one device alone: a record has one norm, and one factor of clipping,
  over everything that is trained.
- A copy of the model with other values, or one that was not shown to give a record the same bits
  (`umbel_client.training.bit_test`): which copy computes a record follows from the other records.

Nothing here charges: the ledger has reserved the whole round before its first gradient.
"""

from collections.abc import Sequence

import torch

from umbel_client.data.tokens import Ints
from umbel_client.dpsgd.gradient_sum import (
    Clipping,
    Gradients,
    GradientSum,
    clip_factors,
    flat,
    sum_batch,
)
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import Task


class PrivateOptimizer(GradientSum):
    """Steps 2 to 6: clips and sums over physical batches, then adds noise once and moves."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise: StepNoise,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch_size: float,
        clipping: Clipping = flat,
        copies: Sequence[Sequence[torch.nn.Parameter]] = (),
    ) -> None:
        """Trains the parameters of `optimizer`.

        Args:
            noise: for these parameters; there is no other, however many copies there are.
            noise_multiplier: standard deviation of the noise in units of the clip norm.
            clip_norm, copies: see `GradientSum`.
            expected_batch_size: what the noisy sum is divided by, whatever the batch.

        Raises:
            RuntimeError: the noise is for other parameters, or two copies are on one device.
        """
        super().__init__(
            [parameter for group in optimizer.param_groups for parameter in group["params"]],
            clip_norm=clip_norm,
            clipping=clipping,
            copies=copies,
            dtype=torch.float32,
        )
        self._optimizer = optimizer
        self._noise = noise
        self._deviation = noise_multiplier * clip_norm
        self._expected_batch_size = expected_batch_size
        self._gradients: dict[torch.device, torch.Tensor] = {}
        for device, parameters in self._copies[0].items():
            self._gradients[device] = torch.zeros_like(self._sums[device])
            # Parts of one vector, so that a step writes all of them at once.
            parts = torch.split(self._gradients[device], [one.numel() for one in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        if noise.sizes != {device: len(own) for device, own in self._gradients.items()}:
            raise RuntimeError("the noise is for other parameters than those that are trained")

    def _part(self, gradients: Gradients, units: Ints | None) -> dict[torch.device, torch.Tensor]:
        return clipped_sum(gradients, units, self._clip_norm, self._clipping)

    def step(self) -> None:
        """Takes the step with the noisy sum, and starts a new sum.

        Sum and noise are added and divided in float64, and rounded once to float32.
        """
        # 3. The sum over the copies.
        self._sum_copies()
        # 4. The noise, and 5. the division.
        for offset, draws in self._noise.take():
            place = slice(offset, offset + len(draws))
            total = self._sums[draws.device][place]
            draws.mul_(self._deviation).add_(total).div_(self._expected_batch_size)
            self._gradients[draws.device][place].copy_(draws)
            # Now, and not after the step: of one that fails, the next sum would hold this one too.
            total.zero_()
        # 6. The step.
        self._optimizer.step()


def clipped_sum(
    gradients: Gradients, units: Ints | None, clip_norm: float, clipping: Clipping
) -> dict[torch.device, torch.Tensor]:
    """The sum of the units' clipped gradients: float32[trained elements] of each device, there.

    A unit's gradient is the mean over its records, and is clipped once, whatever their number and
    on however many devices its parts are. Adding or removing the unit with all of its records moves
    the sum over all devices by `clip_norm` at most.

    Args:
        gradients: of the records; may be changed.
        units: int64[n], the unit of each record, any numbers; None: each record is a unit.
        clip_norm: largest contribution of one unit, in the Euclidean norm.
        clipping: the rule of clipping.
    """
    # 2. The mean of each unit, and its factor of clipping.
    gradients, exact = clip_factors(gradients, units, clip_norm, clipping)
    factors = exact.float()
    # Rounded towards zero: of gradients near the end of float32, the factor is so small that the
    # nearest float32 may be twice as large.
    smaller = torch.nextafter(factors, torch.zeros_like(factors))
    factors = torch.where(factors > exact, smaller, factors)
    # 3. Clipped and summed in one product.
    return {
        device: torch.cat([factors.to(device) @ rows for rows in there])
        for device, there in gradients.items()
    }


def private_step(
    task: Task,
    model: AdaptedModel,
    data: PreparedData,
    chosen: Ints,
    optimizer: PrivateOptimizer,
    limit: BatchLimit,
    units: Ints | None = None,
) -> None:
    """Takes one noisy step on the chosen records; an empty batch is a step of noise alone.

    A step that is skipped would tell that its batch was empty, and break the accounting.

    Args:
        chosen, limit, units: see `sum_batch`.

    Raises:
        ModelError: a unit's records are in several physical batches.
    """
    sum_batch(task, model, data, chosen, optimizer, limit, units)
    # 3. The sum over the copies, 4. noise, 5. division, 6. step.
    optimizer.step()
    model.update_copies()
