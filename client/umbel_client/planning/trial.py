"""One trial of hyper-parameters on public records: the plan's own training, and the loss after it.

Each site is simulated by one training on the same records with its own noise. Their deltas are
clipped and averaged as in a round. Nothing here reads a site's configuration or its data.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from umbel_client.data.records import Columns, LmRecords, Records, load_records
from umbel_client.data.tokens import Ints
from umbel_client.evaluation.losses import mean_loss
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.site_model import load_public
from umbel_client.privacy.calibration import SiteNoise, noise_for, sampling_rate
from umbel_client.storage.deltas import OptimizerState
from umbel_client.tasks.label_names import computed_start
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.fedsvd import next_adapter
from umbel_common.adapters.server_step import ServerState
from umbel_common.adapters.vector import Vector
from umbel_common.errors import DataError
from umbel_common.plans.plan import TrainingPlan

BATCH = 32
"""Records computed at once."""


@dataclass(frozen=True)
class PublicData:
    """A model, and public records for it: one part to train on, the other to validate on."""

    model: AdaptedModel
    training: PreparedData
    validation: PreparedData
    start: Vector
    """The adapter that each trial starts from, float32[plan.lora.size]."""

    @classmethod
    def load(
        cls,
        plan: TrainingPlan,
        model_folder: Path,
        file: Path,
        columns: Columns,
        *,
        share: float,
        seed: int,
        device: str = "cpu",
    ) -> "PublicData":
        """Loads the model, and computes its frozen layers once for all trials.

        Args:
            share: the share of the records that validate; the seed chooses them.
            device: as in a site's client.toml.

        Raises:
            ConfigError: the device is not there.
            DataError: the file does not fit the plan, or has too few records to divide.
            ModelError: the model is not the plan's.
        """
        records = load_records(file, plan.task, **columns)
        count = round(share * len(records))
        if not 0 < count < len(records):
            raise DataError(
                "a public data set is too small to train on one part and to validate on another",
                file=file,
                found=f"{len(records)} records",
            )
        order = np.random.default_rng(seed).permutation(len(records))
        model = load_public(model_folder, plan, device, field="--device", trains=True)
        parts = (
            prepare(
                model,
                model_folder,
                _chosen(records, np.sort(indices)),
                BatchLimit(BATCH),
                cache=None,
            )
            for indices in (order[count:], order[:count])
        )
        training, validation = parts
        return cls(model, training, validation, computed_start(model, model_folder, plan))


def _chosen(records: Records | LmRecords, indices: Ints) -> Records | LmRecords:
    return msgspec.structs.replace(
        records,
        records=tuple(records.records[index] for index in indices),
        rows=tuple(records.rows[index] for index in indices),
    )


def loss_after_training(
    plan: TrainingPlan, data: PublicData, *, public_size: int, sites: int, seed: int
) -> float:
    """Trains the whole plan, and returns the adapter's mean loss on the validation records.

    Args:
        plan: with the values that are tried; for the data's model, task and adapter.
        public_size: a site's number of records: the noise is what such a site adds. Batches have
            the plan's size.
        sites: number of sites that are simulated.
        seed: of batches and noise. It is the same in each trial, so that trials differ by their
            hyper-parameters only.

    Raises:
        DataError: there are fewer records than a batch is expected to hold.
        CalibrationError, PolicyRefusal: such a site cannot have the plan's privacy.
        ModelError: training diverged.
    """
    noise_multiplier = noise_for(plan, public_size).noise_multiplier
    noise = SiteNoise(sampling_rate(plan, len(data.training)), noise_multiplier)
    # Public records protect nobody, so a repeatable seed is right here.
    entropy = [np.random.default_rng((seed, site)).bytes for site in range(sites)]
    data.model.follow(plan)
    trainers = [
        LocalTrainer(data.model, data.training, noise, source, BatchLimit(BATCH))
        for source in entropy
    ]
    states: list[OptimizerState | None] = [None] * sites
    limit = plan.aggregation.clip_range
    adapter, server = data.start.copy(), ServerState()
    for number in range(1, plan.training.rounds + 1):
        total: Vector | None = None
        for site, trainer in enumerate(trainers):
            result = trainer.round(number, adapter, states[site])
            states[site] = result.state
            delta = np.clip(result.delta, -limit, limit)
            total = delta if total is None else total + delta
        assert total is not None  # there is at least one site
        steps = np.rint(total / plan.aggregation.step).astype(np.int64)
        next_adapter(plan, number, steps, sites, adapter, server)
    data.model.set_vector(adapter)
    return mean_loss(data.model, data.validation, BatchLimit(BATCH))
