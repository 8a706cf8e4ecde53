"""The local loop of one round, top to bottom.

Nothing but the delta leaves it: losses, gradient norms and realised batch sizes are queries that
nobody has paid for. The caller has reserved the whole round in the ledger before it calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from umbel_client.data.tokens import Ints
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import CLIPPINGS, PrivateOptimizer, private_step
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.noise import NoiseSource
from umbel_client.storage.deltas import OptimizerState
from umbel_client.tasks.physical_batches import BatchLimit, compute_parts, limit_of
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.task import Task, task_of
from umbel_client.training.averaging import MovingAverage
from umbel_client.training.optimiser import (
    build_optimizer,
    extract_state,
    restore_state,
    set_learning_rates,
)
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.canonical import Entropy
from umbel_common.errors import ModelError, PlanError
from umbel_common.plans.plan import LocalPrivacy, Tensor, TrainingPlan

StepTaken = Callable[[int, int], None]
"""Told (steps done, steps of the round)."""


@dataclass(frozen=True)
class RoundResult:
    """What a round leaves at the site."""

    delta: Vector
    """float32[size of the round's tensors]: the local adapter, or its average over the steps where
    the plan has one, minus the global one."""
    state: OptimizerState
    """Moments of the optimiser, for the next round."""


def train_round(
    model: AdaptedModel,
    data: PreparedData,
    plan: TrainingPlan,
    round_number: int,
    global_vector: Vector,
    sample_rate: float,
    noise_multiplier: float | None,
    state: OptimizerState | None,
    *,
    entropy: Entropy,
    physical_batch_size: int | BatchLimit,
    on_step: StepTaken,
) -> RoundResult:
    """Trains the adapter for one round, from `global_vector`, float32[plan.lora.size].

    Args:
        round_number: from 1.
        sample_rate: probability with which each unit (record, or patient) is in a batch.
        noise_multiplier: standard deviation of the noise in units of the clip norm; None exactly
            when the plan has no privacy.
        state: from the round before, or None.
        entropy: for this round's batches and noise.
        physical_batch_size: records computed at once; sets memory and speed, not the result. A
            limit is lowered where memory runs out.

    Raises:
        PlanError: the noise multiplier does not fit the plan's privacy.
        ModelError: the adapter did not move in the first step, or is not finite in the end, or the
            records of one unit do not fit into memory.
    """
    _check_noise(plan, noise_multiplier)
    noise = NoiseSource(entropy)
    trained = plan.trained_tensors(round_number)
    model.set_vector(global_vector)
    parameters = model.select(round_number)
    start = model.values(trained)
    optimizer = build_optimizer(plan, trained, parameters, noise_multiplier)
    restore_state(optimizer, parameters, state)
    steps = plan.training.local_steps
    limit = limit_of(physical_batch_size)
    decay = plan.training.average_decay
    average = None if decay is None else MovingAverage(decay)
    with _stepping(plan, model, data, optimizer, noise, noise_multiplier) as take_step:
        for step in range(steps):
            job_step = (round_number - 1) * steps + step
            set_learning_rates(optimizer, plan.training.learning_rate_factor(job_step))
            chosen = data.records_of(noise.poisson_batch(data.unit_count, sample_rate))
            take_step(chosen, limit)
            if step == 0 and (noise_multiplier is not None or len(chosen)):
                _check_moved(model, start, trained, every=noise_multiplier is not None)
            if average is not None:
                average.add(model.values(trained) - start)
            on_step(step + 1, steps)
    delta = model.values(trained) - start if average is None else average.value()
    if not np.isfinite(delta).all():
        raise ModelError(
            "training diverged: the adapter is not finite",
            remedy="lower the learning rates, or look for broken weights of the base model",
        )
    return RoundResult(delta, extract_state(optimizer, parameters, state))


TakeStep = Callable[[Ints, BatchLimit], None]
"""Takes one step on (chosen records, limit of physical batches)."""


@contextmanager
def _stepping(
    plan: TrainingPlan,
    model: AdaptedModel,
    data: PreparedData,
    optimizer: torch.optim.Optimizer,
    noise: NoiseSource,
    noise_multiplier: float | None,
) -> Iterator[TakeStep]:
    """The kind of step that the plan's privacy asks for."""
    task = task_of(plan.task)
    expected = plan.training.expected_batch_size
    if not isinstance(plan.privacy, LocalPrivacy) or noise_multiplier is None:
        yield lambda chosen, limit: plain_step(
            task, model, data, chosen, optimizer, limit, expected
        )
        return
    private = PrivateOptimizer(
        optimizer,
        noise,
        noise_multiplier=noise_multiplier,
        clip_norm=plan.privacy.clip_norm,
        expected_batch_size=expected,
        clipping=CLIPPINGS[plan.privacy.clipping],
    )
    units = None if data.units is None else data.units.of_record
    with per_record_gradients(model):
        yield lambda chosen, limit: private_step(task, model, data, chosen, private, limit, units)


def plain_step(
    task: Task,
    model: AdaptedModel,
    data: PreparedData,
    chosen: Ints,
    optimizer: torch.optim.Optimizer,
    physical_batch_size: int | BatchLimit,
    expected_batch_size: float,
) -> None:
    """One step without privacy, with the batches and denominators of the private one."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def compute(part: Ints) -> None:
        with torch.enable_grad():
            losses = task.losses(model, task.batch(data, part))
            losses = losses * data.unit_shares(part).to(losses.device)
            total = losses.sum() / expected_batch_size
        # A backward pass that fails midway would have added some of its gradients already.
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                parameter.grad += gradient

    units = None if data.units is None else data.units.of_record
    limit = limit_of(physical_batch_size)
    compute_parts(data, chosen, limit, units, compute=compute, discard=lambda: None)
    optimizer.step()


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
    model: AdaptedModel, start: Vector, trained: tuple[Tensor, ...], *, every: bool
) -> None:
    """A step that changes nothing spends privacy for nothing (opacus issue 820).

    Noise moves every tensor. Without it some rest in the first step: B's gradient is zero while the
    head is, and A's while B is.
    """
    before = unflatten(start, trained)
    after = unflatten(model.values(trained), trained)
    moved = {name: not np.array_equal(before[name], after[name]) for name in before}
    if not (all if every else any)(moved.values()):
        raise ModelError(
            "a training step left the adapter as it was",
            found=", ".join(name for name, has_moved in moved.items() if not has_moved),
            accepted="every trained tensor changes" if every else "some tensor changes",
            remedy="stop: privacy would be spent for nothing; check device and PEFT version",
        )
