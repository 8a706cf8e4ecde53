"""The game of a one-run audit (Steinke et al. 2023, algorithm 1), around a site's own training.

Canaries are units that the auditor makes: a fair coin decides whether each joins the site's data,
one job is trained, and an attack guesses the coins from what was released.

The attack is the adversary of the accountant's theorem, and no stronger one. It knows the plan, the
sampling rate, the noise multiplier, every canary, all other records of the site, and the site's
noisy delta after *each* step: what the server and all other sites together see if each round has
one step. It does not see batches, noise, or anything inside the site. Steps are plain gradient
descent: with Adam, or with several steps to a round, what is released is a function of these
deltas, so it cannot tell more.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from umbel_client.data.tokens import Ints
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.task import task_of
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.vector import Vector, initial_vector
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import LocalPrivacy, Sgd, TrainingPlan

_RATE = 0.01
"""Learning rate: large enough that float32 keeps the noise, small enough that nothing diverges."""
_TINY = 1e-12
_NORMAL_QUARTILE = 0.6745
"""Half of a standard normal variable's draws are nearer to zero."""

Floats = npt.NDArray[np.float64]
OnRound = Callable[[int, int], None]
"""Called after each round, which is one step, with (rounds done, rounds)."""


@dataclass(frozen=True)
class GameOutcome:
    """What the attack is judged by."""

    included: npt.NDArray[np.bool_]
    """bool[canaries]: the coins."""
    evidence: Floats
    """float64[canaries]: log of how much likelier the releases are with the canary than without."""


def step_by_step(plan: TrainingPlan) -> TrainingPlan:
    """The plan with the same noisy steps, each of them released."""
    training = msgspec.structs.replace(
        plan.training,
        rounds=plan.training.steps,
        local_steps=1,
        optimizer=Sgd(adapter_learning_rate=_RATE, head_learning_rate=_RATE),
        final_learning_rate=1.0,
    )
    return msgspec.structs.replace(plan, training=training)


def flip_coins(count: int, entropy: Entropy) -> npt.NDArray[np.bool_]:
    """bool[count]: each true with probability one half, independently."""
    included = np.zeros(count, dtype=np.bool_)
    included[NoiseSource(entropy).poisson_batch(count, 0.5)] = True
    return included


def gather_evidence(
    trainer: LocalTrainer, known: PreparedData, canaries: PreparedData, on_round: OnRound
) -> Floats:
    """Trains the job of a `step_by_step` plan as a site does, and attacks each of its releases.

    Args:
        trainer: trains on `known` and the included canaries.
        known: what the attack knows to be in the trainer's data.
        canaries: all of them; the attack does not know which of them the trainer has.
        on_round: called after each round.

    Returns:
        float64[canaries], see `GameOutcome.evidence`.
    """
    model, noise, size = trainer.model, trainer.noise, trainer.limit.records
    training = model.plan.training
    evidence = np.zeros(canaries.unit_count)
    before = initial_vector(model.plan)
    for number, after, result in trainer.rounds(before):
        # The attack takes gradients at the adapter that the round started from.
        model.set_vector(before)
        noisy_sum = -result.delta.astype(np.float64) / _RATE * training.expected_batch_size
        for _, gradients in clipped_gradients(model, number, known, size):
            noisy_sum -= noise.sampling_rate * gradients.sum(axis=0)
        directions = np.empty((canaries.unit_count, len(noisy_sum)), dtype=np.float32)
        for units, gradients in clipped_gradients(model, number, canaries, size):
            directions[units] = gradients
        evidence += log_likelihood_ratios(noisy_sum, directions, noise.sampling_rate)
        before = after
        on_round(number, training.rounds)
    return evidence


def log_likelihood_ratios(noisy_sum: Floats, directions: Vector, rate: float) -> Floats:
    """How much likelier one noisy sum is with each canary in the data than without it.

    A canary that is in the data is in a batch with the sampling rate q, so each is in a batch with
    probability q / 2. The best linear estimate of all of them at once (ridge regression) takes the
    canaries out of each other's way; each estimate then is nearly Gaussian.

    Args:
        noisy_sum: float64[D], without what the known records are expected to add.
        directions: float32[canaries, D], the clipped gradients.
        rate: with which each record is in a batch.
    """
    prior = rate / 2
    variance = prior * (1 - prior)
    # What noise there is, not what is claimed: an attack must profit from too little. Each record
    # adds little to any one element.
    deviation = float(np.median(np.abs(noisy_sum))) / _NORMAL_QUARTILE
    ridge = deviation**2 / variance
    overlaps = (directions @ directions.T).astype(np.float64)
    surprise = directions @ noisy_sum - prior * overlaps.sum(axis=1)
    inverse = np.linalg.inv(overlaps + ridge * np.eye(len(overlaps)))
    # An estimate lies `gain` times as far from the prior as the truth does, with an error of
    # variance `variance` gain (1 - gain); reduced, so that a gain of 0 says and divides nothing.
    gain = 1 - ridge * np.diag(inverse)
    inside = (inverse @ surprise + (prior - 0.5) * gain) / (variance * (1 - gain))
    with np.errstate(divide="ignore"):
        ratios: Floats = np.logaddexp(np.log1p(-rate), np.log(rate) + inside)
    return ratios


def clipped_gradients(
    model: AdaptedModel, number: int, data: PreparedData, physical_batch_size: int
) -> Iterator[tuple[Ints, Floats]]:
    """Each unit's clipped gradient at the model's adapter, by the attack's own arithmetic.

    Yields:
        numbers of some units, int64[n], and float64[n, elements trained in round `number`].
    """
    plan = model.plan
    assert isinstance(plan.privacy, LocalPrivacy)
    trained = [model.select(number)[tensor.name] for tensor in plan.trained_tensors(number)]
    task = task_of(plan.task)
    with per_record_gradients(model):
        for part in data.physical_batches(np.arange(len(data)), physical_batch_size):
            with torch.enable_grad():
                losses = task.losses(model, task.batch(data, part))
                losses.sum().backward()  # type: ignore[no-untyped-call]  # torch
            of_record = part if data.units is None else data.units.of_record[part]
            units, rows = np.unique(of_record, return_inverse=True)
            gradients = _take_gradients(trained, len(part))
            sums = gradients.new_zeros(len(units), gradients.shape[1])
            means = sums.index_add_(0, torch.from_numpy(rows), gradients).numpy()
            means /= np.bincount(rows)[:, None]
            norms = np.linalg.norm(means, axis=1, keepdims=True)
            means *= np.minimum(1.0, plan.privacy.clip_norm / np.maximum(norms, _TINY))
            yield units, means


def _take_gradients(parameters: Sequence[torch.nn.Parameter], records: int) -> torch.Tensor:
    """Takes the gradients of a part off the parameters: float64[records, trained elements]."""
    rows = []
    for parameter in parameters:
        holder: Any = parameter
        rows.append(holder.grad_sample.reshape(records, -1).double().cpu())
        holder.grad_sample = None
    return torch.cat(rows, dim=1)
