"""One trial of hyper-parameters on public records: the plan's own training, and the loss after it.

In local mode, each site is simulated by one training on the same records with its own noise. Their
deltas are clipped and averaged as in a round. In distributed mode, one site is simulated, with the
noise of all. Nothing here reads a site's configuration or its data.
"""

import math
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
from umbel_client.privacy.discrete_gaussian import FEWEST_BITS
from umbel_client.storage.deltas import OptimizerState
from umbel_client.tasks.label_names import computed_start
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.fedsvd import next_adapter
from umbel_common.adapters.server_step import ServerState
from umbel_common.adapters.vector import Vector
from umbel_common.errors import DataError
from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan

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
            the plan's size. In distributed mode the plan says the noise, and no size does.
        sites: number of sites that are simulated, or whose noise is in a sum.
        seed: of batches and noise. It is the same in each trial, so that trials differ by their
            hyper-parameters only.

    Raises:
        DataError: there are fewer records than a batch is expected to hold.
        CalibrationError, PolicyRefusal: such a site cannot have the plan's privacy.
        ModelError: training diverged.
    """
    if isinstance(plan.privacy, DistributedPrivacy):
        return _loss_after_sums(plan, plan.privacy, data, sites=sites, seed=seed)
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


def _loss_after_sums(
    plan: TrainingPlan, privacy: DistributedPrivacy, data: PublicData, *, sites: int, seed: int
) -> float:
    """The loss after training by sums of one site, with the noise of `sites` sites in each.

    Batches have the plan's expected size, or as many records as there are. In that case the noise
    is made smaller in the same proportion, so that the noise of the mean gradient is the plan's.
    """
    records = len(data.training)
    batch = min(plan.training.expected_batch_size, records)
    share = batch / plan.training.expected_batch_size
    wanted = max(sites, privacy.least_survivors) * (share * 2.0**privacy.noise_bits) ** 2
    # The site's own noise is made as small as it can be, and what it lacks is added.
    rest = math.sqrt(max(wanted - 4.0**FEWEST_BITS, 0.0))
    alone = msgspec.structs.replace(
        plan,
        training=msgspec.structs.replace(plan.training, expected_batch_size=batch),
        privacy=msgspec.structs.replace(
            privacy, sampling_rate=batch / records, noise_bits=FEWEST_BITS
        ),
    )
    # Public records protect nobody, so a repeatable seed is right here.
    generator = np.random.default_rng((seed, 0))
    data.model.follow(alone)
    noise = SiteNoise(batch / records, None)
    trainer = LocalTrainer(data.model, data.training, noise, generator.bytes, BatchLimit(BATCH))
    adapter, server = data.start.copy(), ServerState()
    for number in range(1, plan.training.rounds + 1):
        total = trainer.noisy_sum(number, adapter)
        total += np.rint(generator.normal(0.0, rest, total.size)).astype(np.int64)
        next_adapter(alone, number, total, 1, adapter, server)
    data.model.set_vector(adapter)
    return mean_loss(data.model, data.validation, BatchLimit(BATCH))
