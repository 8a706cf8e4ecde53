"""What a task asks of a model: where a new kind of task is added.

This module is part of the core of the privacy guarantee. Never let the tokens, the label or the
loss of a record depend on another record.
"""

from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from umbel_client.data.chat import IGNORED
from umbel_client.data.tokens import Ints, Tokens
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.inputs import Batch
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import Part
from umbel_common.plans.plan import CausalLm
from umbel_common.plans.plan import Task as PlannedTask


class Task(Protocol):
    """How records become batches, and batches become losses."""

    def batch(self, data: PreparedData, part: Part) -> Batch:
        """The rows of a part."""
        ...

    def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """float32[n]: one loss for each record of the batch in nats, from this record alone.

        A task over tokens takes the mean over the record's own tokens. A mean over the batch's
        tokens, as in Transformers' `.loss`, would let one record change the gradients of others.
        """
        ...


class ClassificationTask:
    """Sequence classification by cross entropy."""

    def batch(self, data: PreparedData, part: Part) -> Batch:
        """The rows of a part."""
        return data.batch(part)

    def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """float32[n]."""
        logits = model.logits(batch.inputs)
        losses = cross_entropy(logits, batch.labels.to(logits.device), reduction="none")
        return losses[: batch.records]

    @torch.no_grad()
    def predict(self, model: AdaptedModel, batch: Batch) -> Ints:
        """Most likely label index of each record, int64[n]."""
        predicted: Ints = model.logits(batch.inputs).argmax(-1).cpu().numpy().astype(np.int64)
        return predicted[: batch.records]


class CausalLmTask:
    """The next token of an answer, by cross entropy."""

    def batch(self, data: PreparedData, part: Part) -> Batch:
        """The rows of a part; their labels are padded with `IGNORED`."""
        rows, mask = data.tokens.rows(part.filled, part.length)
        labels = np.where(mask == 1, data.labels[rows], IGNORED)
        return Batch(data.inputs(part), torch.from_numpy(labels), len(part))

    def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """float32[n]: the mean over the tokens of the record that count."""
        targets = batch.labels[:, 1:]
        counts = targets != IGNORED
        losses = model.next_token_losses(batch.inputs, counts, targets[counts])
        counts = counts.to(losses.device)
        # Back in its place, so that a record's sum runs over its own tokens in a fixed shape.
        placed = torch.zeros(counts.shape, device=losses.device).masked_scatter(counts, losses)
        means = placed.sum(1) / counts.sum(1)
        return means[: batch.records]


def task_of(planned: PlannedTask) -> Task:
    """The task that a plan names."""
    return CausalLmTask() if isinstance(planned, CausalLm) else ClassificationTask()


def made_up_labels(planned: PlannedTask, tokens: Tokens) -> Ints:
    """Labels as in `PreparedData.labels`, for made-up records.

    A classification's records take each label in turn; of a language model every token counts.
    """
    if isinstance(planned, CausalLm):
        return tokens.ids.astype(np.int64)
    return np.arange(len(tokens)) % len(planned.labels)
