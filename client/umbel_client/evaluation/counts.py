"""The noisy counts of how an adapter does on the records that a site holds out.

This module is part of the core of the privacy guarantee. Never return a count without noise, or a
record's score outside 0 to 1.

Which records are held out depends on each unit alone (`umbel_client.data.hold_out`).
"""

import numpy as np

from umbel_client.evaluation.losses import Floats, predicted_labels, record_losses
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.plans.plan import Classification, FederatedEvaluation, standard_deviation


def noisy_counts(
    model: AdaptedModel,
    data: PreparedData,
    evaluation: FederatedEvaluation,
    noise: NoiseSource,
    limit: BatchLimit,
) -> SiteCounts:
    """Counts the units of `data` and their score under the model as it stands, both with noise.

    A unit counts once, with the mean score of its records. The sensitivity is
    `umbel_common.plans.plan.SENSITIVITY`.

    Args:
        limit: the number of records computed at once, as in training.
    """
    scores = _scores(model, data, evaluation, limit)
    shares = data.unit_shares(np.arange(len(data))).numpy().astype(np.float64)
    draws = noise.normal(2) * standard_deviation(evaluation)
    return SiteCounts(
        score=float((scores * shares).sum() + draws[0]), records=float(data.unit_count + draws[1])
    )


def _scores(
    model: AdaptedModel, data: PreparedData, evaluation: FederatedEvaluation, limit: BatchLimit
) -> Floats:
    """The score of each record, from 0 to 1; NaN counts as the worst, so that it does not show."""
    scores: Floats
    if isinstance(model.plan.task, Classification):
        scores = (predicted_labels(model, data, limit) == data.labels).astype(np.float64)
    else:
        losses = np.nan_to_num(record_losses(model, data, limit), nan=np.inf)
        scores = np.clip(losses / evaluation.largest_loss, 0, 1)
    return scores
