"""Records that a site holds out, and the noisy counts of how an adapter does on them.

Which records are held out depends on each unit alone: its own content is hashed, so that adding or
removing another unit moves none from one side to the other.
"""

import numpy as np
import torch

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.task import ClassificationTask, task_of
from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.plans.plan import FederatedEvaluation, standard_deviation

BATCH = 32
"""Records at once: sets memory and speed, not the result."""


def noisy_counts(
    model: AdaptedModel, data: PreparedData, evaluation: FederatedEvaluation, noise: NoiseSource
) -> SiteCounts:
    """Score and number of the units of `data` under the model as it stands, each with noise.

    A unit counts once, with the mean score of its records; the sensitivity is
    `umbel_common.plans.plan.SENSITIVITY`.
    """
    scores = _scores(model, data, evaluation)
    shares = data.unit_shares(np.arange(len(data))).numpy().astype(np.float64)
    draws = noise.normal(2) * standard_deviation(evaluation)
    return SiteCounts(
        score=float((scores * shares).sum() + draws[0]), records=float(data.unit_count + draws[1])
    )


@torch.no_grad()
def _scores(
    model: AdaptedModel, data: PreparedData, evaluation: FederatedEvaluation
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of each record, from 0 to 1; NaN counts as the worst, so that nothing of it shows."""
    task = task_of(model.plan.task)
    scores = np.empty(len(data))
    for part in data.physical_batches(np.arange(len(data)), BATCH):
        batch = task.batch(data, part)
        if isinstance(task, ClassificationTask):
            scores[part] = task.predict(model, batch) == batch.labels.numpy()
        else:
            losses = task.losses(model, batch).double().cpu().numpy()
            worst = np.nan_to_num(losses, nan=np.inf)
            scores[part] = np.clip(worst / evaluation.largest_loss, 0, 1)
    return scores
