"""The game of a one-run audit (Steinke et al. 2023, algorithm 1), around a site's own training.

Canaries are units that the auditor makes up. A fair coin decides whether each one joins the site's
data. One job is trained, and an attack guesses the coins from what was released.

The attack is the adversary of the accountant's theorem and no stronger. It knows the plan, the
sampling rate, the noise multiplier, every canary, all other records of the site, and the site's
noisy delta after *each* step. The server and all other sites together see this much if each round
has one step. The attack sees neither batches nor noise nor anything else inside the site. Steps are
plain gradient descent: with Adam, or with several steps in a round, the releases are a function of
these deltas, so they cannot reveal more.

In distributed mode the attack reads sums instead (`gather_shared_evidence`).
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
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import task_of
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.vector import Vector, initial_vector, size_of
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import (
    DifferentialPrivacy,
    DistributedPrivacy,
    Sgd,
    TrainingPlan,
)

_RATE = 0.01
"""Learning rate: large enough that float32 keeps the noise, small enough that nothing diverges."""
_TINY = 1e-12
_NORMAL_QUARTILE = 0.6745
"""Half of all draws from a standard normal distribution are closer to zero than this."""

Floats = npt.NDArray[np.float64]
OnRound = Callable[[int, int], None]
"""Called after each round, which is one step, with (rounds done, rounds)."""


@dataclass(frozen=True)
class GameOutcome:
    """The coins, and what the attack found out about them."""

    included: npt.NDArray[np.bool_]
    """bool[canaries]: the coins."""
    evidence: Floats
    """float64[canaries]: log-likelihood ratio of the releases, with the canary to without it."""


def step_by_step(plan: TrainingPlan) -> TrainingPlan:
    """The plan with the same noisy steps, but a release after each of them."""
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
        overlaps = overlaps_of(directions)
        evidence += log_likelihood_ratios(noisy_sum, directions, overlaps, noise.sampling_rate)
        before = after
        on_round(number, training.rounds)
    return evidence


def gather_shared_evidence(
    victim: LocalTrainer,
    others: Sequence[LocalTrainer],
    known: PreparedData,
    canaries: PreparedData,
    *,
    attempts: int,
    of_the_mean: bool,
    on_round: OnRound,
) -> Floats:
    """Reads the sums of distributed mode, and attacks them.

    The attack sees one sum for each attempt, of the vectors of the sites whose noise it does not
    know, and nothing else; it knows the records of all sites but for the canaries. With other
    sites, it is on the claim against readers of the sums, and without, on the claim against
    everybody. All attempts are at the adapter that the job starts from, which is where a server can
    keep a job by ending its attempts.

    Args:
        victim: trains on `known` and the included canaries.
        others: the other sites of each sum, without records.
        known: what the attack knows to be in the victim's data.
        canaries: all of them; the attack does not know which of them the victim has.
        attempts: number of sums.
        of_the_mean: whether the attack takes the mean of the sums, as if they had one batch, which
            they must not have; or each sum as one of a batch of its own.
        on_round: called after each attempt.

    Returns:
        float64[canaries], see `GameOutcome.evidence`.
    """
    model, size = victim.model, victim.limit.records
    privacy, start = model.plan.privacy, initial_vector(model.plan)
    assert isinstance(privacy, DistributedPrivacy)
    rate = privacy.sampling_rate
    model.set_vector(start)
    expected: Floats = np.zeros(size_of(model.plan.trained_tensors(1)))
    for _, gradients in clipped_gradients(model, 1, known, size):
        expected += rate * gradients.sum(axis=0)
    directions = np.empty((canaries.unit_count, len(expected)), dtype=np.float32)
    for units, gradients in clipped_gradients(model, 1, canaries, size):
        directions[units] = gradients
    overlaps = overlaps_of(directions)
    evidence, mean = np.zeros(canaries.unit_count), np.zeros(len(expected))
    for number in range(1, attempts + 1):
        vectors = [site.noisy_sum(1, start) for site in (victim, *others)]
        total = np.sum(vectors, axis=0) * model.plan.aggregation.step - expected
        if of_the_mean:
            mean += total / attempts
        else:
            evidence += log_likelihood_ratios(total, directions, overlaps, rate)
        on_round(number, attempts)
    return log_likelihood_ratios(mean, directions, overlaps, rate) if of_the_mean else evidence


def overlaps_of(directions: Vector) -> Floats:
    """The inner products of clipped gradients, float64[canaries, canaries].

    Args:
        directions: float32[canaries, D].
    """
    return (directions @ directions.T).astype(np.float64)


def log_likelihood_ratios(
    noisy_sum: Floats, directions: Vector, overlaps: Floats, rate: float
) -> Floats:
    """Log-likelihood ratio of one noisy sum for each canary: in the data, to not in the data.

    A canary in the data joins a batch with the sampling rate q, so a canary joins it with
    probability q / 2. The best linear estimate of all canaries at once (ridge regression) separates
    them from each other; each estimate is then nearly Gaussian.

    Args:
        noisy_sum: float64[D], minus the expected contribution of the known records.
        directions: float32[canaries, D], the clipped gradients.
        overlaps: `overlaps_of(directions)`.
        rate: the sampling rate.
    """
    prior = rate / 2
    variance = prior * (1 - prior)
    # The actual noise, not the claimed noise: an attack must profit where there is too little. Each
    # record adds little to any one element.
    deviation = float(np.median(np.abs(noisy_sum))) / _NORMAL_QUARTILE
    ridge = deviation**2 / variance
    surprise = directions @ noisy_sum - prior * overlaps.sum(axis=1)
    inverse = np.linalg.inv(overlaps + ridge * np.eye(len(overlaps)))
    # An estimate lies `gain` times as far from the prior as the truth does, and its error has the
    # variance `variance` gain (1 - gain). One factor `gain` is cancelled, so that a gain of 0 says
    # nothing and nothing is divided by 0.
    gain = 1 - ridge * np.diag(inverse)
    inside = (inverse @ surprise + (prior - 0.5) * gain) / (variance * (1 - gain))
    with np.errstate(divide="ignore"):
        ratios: Floats = np.logaddexp(np.log1p(-rate), np.log(rate) + inside)
    return ratios


def clipped_gradients(
    model: AdaptedModel, number: int, data: PreparedData, physical_batch_size: int
) -> Iterator[tuple[Ints, Floats]]:
    """Each unit's clipped gradient at the model's adapter, computed by the attack itself.

    Yields:
        numbers of some units, int64[n], and float64[n, elements trained in round `number`].
    """
    plan = model.plan
    assert isinstance(plan.privacy, DifferentialPrivacy)
    trained = [model.select(number)[tensor.name] for tensor in plan.trained_tensors(number)]
    task = task_of(plan.task)
    with per_record_gradients(model):
        for part in data.physical_batches(np.arange(len(data)), BatchLimit(physical_batch_size)):
            with torch.enable_grad():
                losses = task.losses(model, task.batch(data, part))
                losses.sum().backward()  # type: ignore[no-untyped-call]  # torch
            records = part.records
            of_record = records if data.units is None else data.units.of_record[records]
            units, rows = np.unique(of_record, return_inverse=True)
            gradients = _take_gradients(trained, part.rows)[: len(part)]
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
        rows.append(holder.grad_sample.reshape(records, -1).cpu().double())
        holder.grad_sample = None
    return torch.cat(rows, dim=1)
