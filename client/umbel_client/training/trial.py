"""What the steps of a plan take at a site, measured on made-up records.

No private data are read, and nothing is charged. Records are as long as the plan allows, so a step
on real records takes at most as long.
"""

import math
import time
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from umbel_client.data.tokens import Tokens
from umbel_client.dpsgd.batch_size import choose_batch_limit
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.architecture import naming_architecture
from umbel_client.models.site_model import load_site_model
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.site.config import ClientConfig
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.task import made_up_labels
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.vector import initial_vector
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import DifferentialPrivacy, DistributedPrivacy, TrainingPlan

_STEPS = 2
"""The first one loads kernels, and is not measured."""


@dataclass(frozen=True)
class Trial:
    """What was measured."""

    rows: int
    """Number of records that were computed at once, on all copies of the model together."""
    seconds: float
    """Time of a step on that many records, with clipping and noise where the plan is private."""
    devices: tuple[torch.device, ...]


def try_plan(settings: ClientConfig, plan: TrainingPlan, *, entropy: Entropy) -> Trial:
    """Loads the plan's model as a job would, and takes steps on as many records as fit.

    Args:
        settings: the site's configuration: model, threads, and records computed at once.
        entropy: the source of the noise, which nobody sees.

    Raises:
        ConfigError: the device is not there, or is not for private training.
        ModelError: the model cannot be used or does not fit into memory.
    """
    torch.set_num_threads(settings.threads)
    privacy = plan.privacy
    shared = isinstance(privacy, DistributedPrivacy)
    if isinstance(privacy, DistributedPrivacy):
        plan = msgspec.structs.replace(
            plan, privacy=msgspec.structs.replace(privacy, sampling_rate=1.0)
        )
    else:
        training = msgspec.structs.replace(plan.training, local_steps=_STEPS)
        plan = msgspec.structs.replace(plan, training=training)
    model = load_site_model(settings.model, plan, trains=True)
    units = settings.data.unit_column is not None
    limit = choose_batch_limit(
        settings.physical_batch_size, model, settings.data.max_records_per_unit if units else 1
    )
    moments: list[float] = []

    def on_step(_step: int = 0, _steps: int = 0) -> None:
        # On a GPU a step has ended when its result is there.
        model.vector()
        moments.append(time.perf_counter())

    copies = len(model.copies)
    records = limit.records * copies
    data = _made_up(model, records)
    private = isinstance(plan.privacy, DifferentialPrivacy)
    noise = SiteNoise(sampling_rate=1.0, noise_multiplier=1.0 if private else None)
    with naming_architecture(model.base):
        trainer = LocalTrainer(model, data, noise, entropy, limit)
        if shared:
            for _ in range(_STEPS):
                trainer.noisy_sum(1, initial_vector(plan))
                on_step()
        else:
            trainer.round(1, initial_vector(plan), on_step=on_step)
    # Memory may have run out: then a step took several parts.
    rows = limit.records * copies
    parts = math.ceil(records / rows)
    devices = tuple(device for copy in model.copies for device in copy.devices)
    return Trial(rows, (moments[1] - moments[0]) / parts, devices)


def _made_up(model: AdaptedModel, records: int) -> PreparedData:
    """Records of the greatest length that the plan allows."""
    length = model.plan.task.max_tokens
    ids = (np.arange(records * length) % model.vocabulary).astype(np.int32)
    tokens = Tokens(ids, np.arange(records + 1, dtype=np.int64) * length, pad_id=0)
    labels = made_up_labels(model.plan.task, tokens)
    return PreparedData(tokens, labels, prefix=None, longest=length)
