"""A round's training at one site: from the global adapter to this site's noisy delta or sum.

This module is part of the core of the privacy guarantee. Never add or change here:

- What leaves. Only the delta and the optimizer state, or the noisy sum, are returned. A loss, a
  gradient norm or the realised size of a batch is a query on the data that nobody has paid for: it
  is not returned, not logged and not shown.
- The randomness. Batches come from `NoiseSource` alone, and noise from `StepNoise`, with other
  keys. They are drawn once for each step, also for a step whose batch is empty.
- The accounting. Nothing here charges: the caller has reserved the whole round, or attempt, in the
  ledger before (`umbel_client.trainer.local_job` and `distributed_job`).
- A batch or noise that is kept for another attempt: the difference of two sums over one batch is
  noise alone, and their mean has half of its variance.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from umbel_client.data.tokens import Ints
from umbel_client.dpsgd.gradient_sum import CLIPPINGS, sum_batch
from umbel_client.dpsgd.integer_sum import IntegerSum
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.privacy.discrete_gaussian import DiscreteGaussian
from umbel_client.privacy.noise import NoiseSource
from umbel_client.storage.deltas import OptimizerState
from umbel_client.tasks.physical_batches import compute_parts
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_client.tasks.task import Task, task_of
from umbel_client.training.averaging import MovingAverage
from umbel_client.training.optimiser import (
    build_optimizer,
    carried_state,
    extract_state,
    restore_state,
    set_learning_rates,
)
from umbel_common.adapters.fedsvd import next_adapter
from umbel_common.adapters.server_step import ServerState
from umbel_common.adapters.vector import Vector, flatten, merge, unflatten
from umbel_common.canonical import Entropy
from umbel_common.errors import ModelError, PlanError
from umbel_common.plans.plan import DistributedPrivacy, LocalPrivacy, Tensor, TrainingPlan, levels

OnStep = Callable[[int, int], None]
"""Called after each step with (steps done, steps of the round)."""


NoisySum = npt.NDArray[np.int64]
"""What a site sends in one attempt of distributed mode, int64[size of the round's tensors]: its sum
of clipped gradients in steps of the plan's grid, with its share of the noise."""


def ignore_step(step: int, steps: int) -> None:
    """The `OnStep` of a caller that does not follow the steps."""


@dataclass(frozen=True)
class RoundResult:
    """What a round leaves at the site."""

    delta: Vector
    """float32[size of the round's tensors]: the local adapter minus the global one, or the average
    of this difference over the steps where the plan has one."""
    state: OptimizerState
    """Moments of the optimizer, for the next round."""


# No generated repr: it would write records and noise into whatever log a trainer is printed to.
@dataclass(frozen=True, repr=False, eq=False)
class LocalTrainer:
    """Trains one site's adapter under the model's plan."""

    model: AdaptedModel
    data: PreparedData
    noise: SiteNoise
    """The sampling rate of the batches; the noise multiplier is None exactly when the plan has no
    privacy."""
    entropy: Entropy
    """The source of each round's batches and noise."""
    limit: BatchLimit
    """The number of records computed at once: sets memory and speed, not the result. It is lowered
    where memory runs out."""

    def round(
        self,
        number: int,
        start: Vector,
        state: OptimizerState | None = None,
        on_step: OnStep = ignore_step,
    ) -> RoundResult:
        """Trains one round.

        0. The noise fits the plan's privacy (PlanError).
        1. The model takes the adapter that the round starts from, and the round's tensors are
           selected for training.
        2. The optimizer takes the moments of earlier rounds. The average of the change is empty,
           where the plan has one.
        3. For each step: set the learning rates, and draw a Poisson batch of units. Take one step
           (`private_step`, or `plain_step` without privacy); after the first, check that it moved
           the adapter (without privacy: unless its batch was empty). Add the change so far to the
           average; tell `on_step`. Records whose gradients are not separate stop it (ModelError).
        4. The delta is the change after the last step, or the average. It must be finite.

        Args:
            number: the round, from 1.
            start: the global adapter, float32[plan.lora.size].
            state: what the round before left, or None.
            on_step: called after each step.

        Raises:
            PlanError: the noise does not fit the plan's privacy, or its optimizer.
            ModelError: a trained module has no gradient for each record, or the gradients of
                records are not separate; the first step left the adapter as it was; the adapter is
                not finite in the end; the records of one unit are in several physical batches, or,
                without privacy, do not fit into memory.
        """
        plan = self.model.plan
        noise_multiplier = self.noise.noise_multiplier
        # 0. The noise.
        _check_noise(plan, noise_multiplier)
        batches = NoiseSource(self.entropy)
        # 1. The adapter.
        trained = plan.trained_tensors(number)
        self.model.set_vector(start)
        parameters = self.model.select(number)
        before = self.model.values(trained)
        # 2. The optimizer, and the average.
        optimizer = build_optimizer(plan, trained, parameters, noise_multiplier)
        state = carried_state(plan, state)
        restore_state(optimizer, parameters, state)
        decay = plan.training.average_decay
        average = None if decay is None else MovingAverage(decay)
        # 3. The steps.
        steps = plan.training.local_steps
        with self._stepping(optimizer, number) as take_step:
            for step in range(steps):
                job_step = (number - 1) * steps + step
                set_learning_rates(optimizer, plan.training.learning_rate_factor(job_step))
                units = batches.poisson_batch(self.data.unit_count, self.noise.sampling_rate)
                chosen = self.data.records_of(units)
                take_step(chosen)
                if step == 0 and (noise_multiplier is not None or len(chosen)):
                    _check_moved(self.model, before, trained, every=noise_multiplier is not None)
                if average is not None:
                    average.add(self.model.values(trained) - before)
                on_step(step + 1, steps)
        # 4. The delta.
        delta = self.model.values(trained) - before if average is None else average.value()
        if not np.isfinite(delta).all():
            raise ModelError(
                "training diverged: the adapter is not finite",
                remedy="lower the learning rates, or look for broken weights of the base model",
            )
        return RoundResult(delta, extract_state(optimizer, parameters, state))

    def noisy_sum(self, number: int, start: Vector) -> NoisySum:
        """One attempt of distributed mode: one sum over a batch, with this site's share of noise.

        0. The plan shares its noise (PlanError).
        1. The model takes the adapter that the round starts from, and the round's tensors are
           selected.
        2. Draw a Poisson batch of units at exactly the plan's sampling rate. Sum the clipped
           gradients of its units in whole steps (`IntegerSum`). Records whose gradients are not
           separate stop it (ModelError).
        3. Clip each coordinate to the plan's clip range. It comes before the noise: what the noise
           brings past the range must stay.
        4. Add the noise (`DiscreteGaussian`), with a key of its own.

        A second call for the same round is another attempt: it draws another batch and other noise,
        and costs as much again.

        Args:
            number: the round, from 1.
            start: the global adapter, float32[plan.lora.size].

        Raises:
            PlanError: the plan does not share its noise.
            ModelError: a trained module has no gradient for each record, or the records of one unit
                are in several physical batches.
        """
        plan, model, data = self.model.plan, self.model, self.data
        # 0. The plan.
        privacy = plan.privacy
        if not isinstance(privacy, DistributedPrivacy):
            raise PlanError(
                "sites that do not share their noise send no sums of gradients",
                field="privacy.mode",
                accepted="distributed",
            )
        # 1. The adapter.
        model.set_vector(start)
        parameters = model.select(number)
        # 2. The batch, and its sum.
        units = NoiseSource(self.entropy).poisson_batch(data.unit_count, privacy.sampling_rate)
        total = IntegerSum(
            list(parameters.values()),
            clip_norm=privacy.clip_norm,
            grid=plan.aggregation.step,
            clipping=CLIPPINGS[privacy.clipping],
            copies=model.named_in_copies(parameters),
        )
        with per_record_gradients(*model.copies):
            sum_batch(
                task_of(plan.task),
                model,
                data,
                data.records_of(units),
                total,
                self.limit,
                None if data.units is None else data.units.of_record,
            )
        # 3. The clipping of coordinates.
        most = levels(plan.aggregation.clip_range, plan.aggregation.step)
        noisy = np.clip(total.values(), -most, most)
        # 4. The noise.
        noisy += DiscreteGaussian(NoiseSource(self.entropy), privacy.noise_bits).draw(noisy.size)
        return noisy

    def rounds(
        self, start: Vector, on_step: OnStep = ignore_step
    ) -> Iterator[tuple[int, Vector, RoundResult]]:
        """Trains all rounds of the plan at this site alone, each from the adapter of the last.

        In distributed mode this site takes the server's steps too, by its own sum alone; the plan
        is then one of `umbel_client.privacy.calibration.plan_alone`.

        Args:
            start: the adapter before the first round, float32[plan.lora.size].
            on_step: called after each step of each round.

        Yields:
            The round's number, the adapter after it, float32[plan.lora.size], and what it left.

        Raises:
            PlanError, ModelError: see `round`.
        """
        plan = self.model.plan
        adapter, state = start, None
        server = ServerState()
        for number in range(1, plan.training.rounds + 1):
            if isinstance(plan.privacy, DistributedPrivacy):
                before, adapter = adapter, adapter.copy()
                total = self.noisy_sum(number, before)
                next_adapter(plan, number, total, 1, adapter, server)
                on_step(1, 1)
                trained = plan.trained_tensors(number)
                change = unflatten(adapter - before, plan.lora.tensors)
                yield number, adapter, RoundResult(flatten(change, trained), {})
                continue
            result = self.round(number, adapter, state, on_step)
            adapter, state = merge(adapter, result.delta, plan, number), result.state
            yield number, adapter, result

    @contextmanager
    def _stepping(
        self, optimizer: torch.optim.Optimizer, number: int
    ) -> Iterator[Callable[[Ints], None]]:
        """The kind of step that the plan's privacy asks for, as a function of the chosen records.

        Each record's gradient is kept apart, and noise is drawn ahead, only within this context.
        """
        plan, model, data = self.model.plan, self.model, self.data
        task = task_of(plan.task)
        expected = plan.training.expected_batch_size
        noise_multiplier = self.noise.noise_multiplier
        if not isinstance(plan.privacy, LocalPrivacy) or noise_multiplier is None:
            yield lambda chosen: plain_step(
                task, model, data, chosen, optimizer, self.limit, expected
            )
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        noise = StepNoise(
            self.entropy, parameters, steps=plan.training.local_steps, round_number=number
        )
        units = None if data.units is None else data.units.of_record
        with noise, per_record_gradients(*model.copies):
            private = PrivateOptimizer(
                optimizer,
                noise,
                noise_multiplier=noise_multiplier,
                clip_norm=plan.privacy.clip_norm,
                expected_batch_size=expected,
                clipping=CLIPPINGS[plan.privacy.clipping],
                copies=model.in_copies(optimizer),
            )
            yield lambda chosen: private_step(task, model, data, chosen, private, self.limit, units)


def plain_step(
    task: Task,
    model: AdaptedModel,
    data: PreparedData,
    chosen: Ints,
    optimizer: torch.optim.Optimizer,
    limit: BatchLimit,
    expected_batch_size: float,
) -> None:
    """Takes one step without privacy, with the batches and denominators of the private one.

    Args:
        chosen: indices of the batch's records, int64[n].
        limit: the number of records computed at once; lowered where memory runs out.
        expected_batch_size: what the sum of the gradients is divided by, whatever the batch.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_each: list[list[Any]] = [parameters, *model.in_copies(optimizer)]
    for parameter in (one for own in of_each for one in own):
        parameter.grad = torch.zeros_like(parameter)

    def compute(copy: AdaptedModel, own: list[Any], part: Part) -> None:
        with torch.enable_grad():
            losses = task.losses(copy, task.batch(data, part))
            losses = losses * data.unit_shares(part.records).to(losses.device)
            total = losses.sum() / expected_batch_size
        # A backward pass that fails midway would already have added some of its gradients.
        found = torch.autograd.grad(total, own, allow_unused=True)
        for parameter, gradient in zip(own, found, strict=True):
            if gradient is not None:
                parameter.grad += gradient

    units = None if data.units is None else data.units.of_record
    on_each = [partial(compute, copy, own) for copy, own in zip(model.copies, of_each, strict=True)]
    compute_parts(data, chosen, limit, units, compute=on_each, discard=lambda: None)
    for own in of_each[1:]:
        for parameter, there in zip(parameters, own, strict=True):
            parameter.grad += there.grad.to(parameter.device)
    optimizer.step()
    model.update_copies()


def _check_noise(plan: TrainingPlan, noise_multiplier: float | None) -> None:
    private = isinstance(plan.privacy, LocalPrivacy)
    if private != (noise_multiplier is not None and noise_multiplier > 0):
        raise PlanError(
            "the noise does not fit the plan's privacy",
            field="noise multiplier",
            found=noise_multiplier,
            accepted="above zero" if private else "none",
        )


def _check_moved(
    model: AdaptedModel, before: Vector, trained: tuple[Tensor, ...], *, every: bool
) -> None:
    """A step that changes nothing spends privacy for nothing (opacus issue 820).

    Noise moves every tensor. Without noise some tensors do not move in the first step: B's gradient
    is zero while the head is, and A's while B is.
    """
    old = unflatten(before, trained)
    new = unflatten(model.values(trained), trained)
    moved = {name: not np.array_equal(old[name], new[name]) for name in old}
    if not (all if every else any)(moved.values()):
        raise ModelError(
            "a training step left the adapter as it was",
            found=", ".join(name for name, has_moved in moved.items() if not has_moved),
            accepted="every trained tensor changes" if every else "some tensor changes",
            remedy="stop: privacy would be spent for nothing; check device and PEFT version",
        )
