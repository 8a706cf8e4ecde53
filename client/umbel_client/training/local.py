"""An adapter that one site trains by itself: a baseline for what a federation gives.

The same loop, batches and noise as in a federation, but nothing leaves and no ledger is charged:
the result is as private as the data.
"""

from collections.abc import Callable
from dataclasses import dataclass

from umbel_client.evaluation.losses import mean_loss
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.accounting import calibrate
from umbel_client.privacy.calibration import sampling_rate
from umbel_client.tasks.physical_batches import BatchLimit
from umbel_client.tasks.prepared import PreparedData
from umbel_client.training.round import StepTaken, train_round
from umbel_common.adapters.vector import Vector, initial_vector, merge
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import LocalPrivacy

RoundDone = Callable[[int, float | None], None]
"""Told (rounds done, mean loss on the validation records or None)."""


@dataclass(frozen=True)
class LocalResult:
    """What training alone leaves."""

    adapter: Vector
    """float32[plan.lora.size]: of the round with the least validation loss, else of the last."""
    round: int
    """Whose adapter it is; 0 is the initial one."""
    losses: tuple[float, ...]
    """Mean loss on the validation records before the first round and after each; empty without."""


@dataclass(frozen=True)
class EarlyStop:
    """When to give up."""

    validation: PreparedData
    patience: int
    """Rounds in a row without a smaller validation loss."""


def train_alone(
    model: AdaptedModel,
    data: PreparedData,
    *,
    public_size: int,
    entropy: Entropy,
    physical_batch_size: int | BatchLimit,
    early_stop: EarlyStop | None = None,
    on_step: StepTaken = lambda step, steps: None,
    on_round: RoundDone = lambda number, loss: None,
) -> LocalResult:
    """Trains the rounds of the model's plan one after the other, at one site.

    Noise is calibrated to the plan's epsilon at its own delta. Validation chooses among adapters
    that are private, if it is on public records; on the site's own it is one more look at them.

    Args:
        public_size: records (or units) that the sampling rate is reckoned with.

    Raises:
        DataError, CalibrationError: the plan does not fit so few records.
        ModelError: see `train_round`.
    """
    plan = model.plan
    rate = sampling_rate(plan, public_size)
    noise = None
    if isinstance(plan.privacy, LocalPrivacy):
        noise = calibrate(plan.privacy.epsilon, plan.privacy.delta, rate, plan.training.steps)
    adapter, state = initial_vector(plan), None
    best, best_round, losses = adapter, 0, []
    if early_stop is not None:
        model.set_vector(adapter)
        losses.append(mean_loss(model, early_stop.validation, physical_batch_size))
    for number in range(1, plan.training.rounds + 1):
        result = train_round(
            model,
            data,
            plan,
            number,
            adapter,
            rate,
            noise,
            state,
            entropy=entropy,
            physical_batch_size=physical_batch_size,
            on_step=on_step,
        )
        adapter, state = merge(adapter, result.delta, plan, number), result.state
        if early_stop is None:
            best, best_round = adapter, number
            on_round(number, None)
            continue
        model.set_vector(adapter)
        losses.append(mean_loss(model, early_stop.validation, physical_batch_size))
        on_round(number, losses[-1])
        if losses[-1] < min(losses[:-1]):
            best, best_round = adapter, number
        elif number - best_round >= early_stop.patience:
            break
    return LocalResult(best, best_round, tuple(losses))
