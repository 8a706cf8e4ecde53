"""What a model, as it stands, gives for each record: the loss, and the label.

Every figure of this wing comes through the one loop over physical batches here. The number of
records computed at once sets memory and speed, not the result.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from umbel_client.data.chat import IGNORED
from umbel_client.data.tokens import Ints
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.inputs import Batch
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import ClassificationTask, task_of

Floats = NDArray[np.float64]


def each_batch(
    model: AdaptedModel, data: PreparedData, limit: BatchLimit
) -> Iterator[tuple[Ints, Batch]]:
    """Yields all records once, in physical batches: their indices, int64[n], and the batch.

    Args:
        limit: the number of records computed at once.
    """
    task = task_of(model.plan.task)
    for part in data.physical_batches(np.arange(len(data)), limit):
        yield part.records, task.batch(data, part)


@torch.no_grad()
def record_losses(model: AdaptedModel, data: PreparedData, limit: BatchLimit) -> Floats:
    """The loss of each record in nats, float64[records]."""
    task = task_of(model.plan.task)
    losses = np.empty(len(data))
    for part, batch in each_batch(model, data, limit):
        losses[part] = task.losses(model, batch).cpu().numpy()
    return losses


def mean_loss(model: AdaptedModel, data: PreparedData, limit: BatchLimit) -> float:
    """Mean over records, in nats."""
    return float(record_losses(model, data, limit).mean())


def mean_token_loss(model: AdaptedModel, data: PreparedData, limit: BatchLimit) -> float:
    """Mean of a causal language model's loss over all tokens that count, in nats.

    A long answer weighs more here than in `mean_loss`.
    """
    counts = np.array(
        [
            # The first token has none before it to be predicted from.
            int((data.labels[start + 1 : end] != IGNORED).sum())
            for start, end in zip(data.tokens.starts[:-1], data.tokens.starts[1:], strict=True)
        ]
    )
    losses = record_losses(model, data, limit)
    return float((losses * counts).sum() / counts.sum())


def predicted_labels(model: AdaptedModel, data: PreparedData, limit: BatchLimit) -> Ints:
    """The index of the likeliest label of each record, int64[records]."""
    task = ClassificationTask()
    predicted = np.empty(len(data), dtype=np.int64)
    for part, batch in each_batch(model, data, limit):
        predicted[part] = task.predict(model, batch)
    return predicted


@torch.no_grad()
def losses_and_labels(
    model: AdaptedModel, data: PreparedData, limit: BatchLimit
) -> tuple[Floats, Ints]:
    """As `record_losses` and `predicted_labels` of a classification, in one pass."""
    losses, predicted = np.empty(len(data)), np.empty(len(data), dtype=np.int64)
    for part, batch in each_batch(model, data, limit):
        logits = model.logits(batch.inputs)[: batch.records]
        labels = batch.labels[: batch.records].to(logits.device)
        losses[part] = cross_entropy(logits, labels, reduction="none").cpu().numpy()
        predicted[part] = logits.argmax(-1).cpu().numpy()
    return losses, predicted
