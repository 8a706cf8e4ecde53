"""An adapter that one site trains by itself: a baseline for what a federation gives.

The loop, batches and noise are those of a federation, but nothing leaves and no ledger is charged:
the result is as private as the data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from umbel_client.data.records import LmRecords, Records
from umbel_client.dpsgd.batch_size import choose_batch_limit
from umbel_client.evaluation.losses import mean_loss
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.architecture import naming_architecture
from umbel_client.models.site_model import load_site_model
from umbel_client.privacy.calibration import noise_alone, plan_alone
from umbel_client.site.config import ClientConfig
from umbel_client.tasks.label_names import computed_start
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.largest_record import largest_record_test
from umbel_client.training.round import LocalTrainer
from umbel_client.training.self_test import self_test
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import DifferentialPrivacy, TrainingPlan

OnRound = Callable[[int, float | None], None]
"""Called after each round with (rounds done, mean loss on the validation records or None)."""


OnStage = Callable[[str, int, int | None], None]
"""Called with a stage of the work, how much of it is done, and how much it is; None: not known."""


def ignore_stage(name: str, done: int, whole: int | None) -> None:
    """The `OnStage` of a caller that does not follow the work."""


@dataclass(frozen=True)
class LocalResult:
    """What training alone leaves."""

    adapter: Vector
    """float32[plan.lora.size]: of the round with the least validation loss, else of the last."""
    round: int
    """The round that this adapter is from; 0 is the adapter that the plan starts from."""


@dataclass(frozen=True)
class Validation:
    """Records that choose among the rounds, and decide when to stop.

    The adapters that they choose among are private. The choice is too if the records are public;
    if they are the site's own, it is one more look at them.
    """

    records: Records | LmRecords
    patience: int
    """Rounds in a row without a smaller validation loss."""


def fine_tune(
    settings: ClientConfig,
    plan: TrainingPlan,
    records: Records | LmRecords,
    validation: Validation | None,
    on_round: OnRound,
    on_stage: OnStage = ignore_stage,
    *,
    public_size: int | None,
    entropy: Entropy,
) -> LocalResult:
    """Trains the rounds of a plan one after the other, at one site.

    The model is loaded and tested before the records are prepared. Noise is calibrated to the
    plan's epsilon at its own delta.

    Args:
        settings: the site's configuration: model, threads, and records computed at once.
        on_round: called after each round.
        on_stage: called as the work proceeds.
        public_size: records (or units) that the sampling rate is calculated from; None: as many as
            there are.
        entropy: the source of batches and noise.

    Raises:
        DataError, CalibrationError: the plan does not fit so few records.
        ConfigError: the device is not there, or is not for private training.
        ModelError: the model cannot be used, fails its self-test, or does not train.
    """
    torch.set_num_threads(settings.threads)
    on_stage("loading the model", 0, None)
    model = load_site_model(settings.model, plan, trains=True)
    # The test asks whether a private step keeps its promises; they do not depend on this number.
    private = isinstance(plan.privacy, DifferentialPrivacy)
    has_units = records.unit_column is not None or bool(records.units)
    records_per_unit = settings.data.max_records_per_unit if has_units else 1
    limit = choose_batch_limit(settings.physical_batch_size, model, records_per_unit)
    on_stage("testing the model", 0, None)
    with naming_architecture(model.base):
        largest_record_test(model)
        self_test(model, 1.0 if private else None, limit, entropy=entropy)
    start = computed_start(model, Path(settings.model.path), plan)
    data = _prepare(settings, model, records, limit, on_stage)
    held_out = None
    if validation is not None:
        held_out = _prepare(settings, model, validation.records, limit, on_stage)
    size = data.unit_count if public_size is None else public_size
    plan = plan_alone(plan, size)
    model.follow(plan)
    noise = noise_alone(plan, size)
    trainer = LocalTrainer(model, data, noise, entropy, limit)
    best = LocalResult(start, 0)
    losses = []
    taken, steps = count(1), plan.training.rounds * plan.training.local_steps

    def on_step(_step: int, _of_round: int) -> None:
        on_stage("training", next(taken), steps)

    if held_out is not None:
        losses.append(_loss(trainer, held_out, best.adapter))
    for number, adapter, _ in trainer.rounds(best.adapter, on_step):
        if validation is None or held_out is None:
            best = LocalResult(adapter, number)
            on_round(number, None)
            continue
        losses.append(_loss(trainer, held_out, adapter))
        on_round(number, losses[-1])
        if losses[-1] < min(losses[:-1]):
            best = LocalResult(adapter, number)
        elif number - best.round >= validation.patience:
            break
    return best


def _prepare(
    settings: ClientConfig,
    model: AdaptedModel,
    records: Records | LmRecords,
    limit: BatchLimit,
    on_stage: OnStage,
) -> PreparedData:
    def on_progress(done: int, whole: int) -> None:
        on_stage("frozen layers", done, whole)

    on_stage("tokens", 0, None)
    folder = Path(settings.model.path)
    return prepare(model, folder, records, limit, cache=None, on_progress=on_progress)


def _loss(trainer: LocalTrainer, held_out: PreparedData, adapter: Vector) -> float:
    trainer.model.set_vector(adapter)
    return mean_loss(trainer.model, held_out, trainer.limit)
