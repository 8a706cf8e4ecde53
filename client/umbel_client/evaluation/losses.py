"""The loss of each record under an adapter."""

import numpy as np
import torch

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.task import task_of


@torch.no_grad()
def record_losses(
    model: AdaptedModel, data: PreparedData, batch_size: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The loss of each record under the model as it stands, float64[records]."""
    task = task_of(model.plan.task)
    losses = np.empty(len(data))
    for part in data.physical_batches(np.arange(len(data)), batch_size):
        losses[part] = task.losses(model, task.batch(data, part)).cpu().numpy()
    return losses


def mean_loss(model: AdaptedModel, data: PreparedData, batch_size: int) -> float:
    """Mean over records."""
    return float(record_losses(model, data, batch_size).mean())
