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
from umbel_common.plans.plan import CausalLm
from umbel_common.plans.plan import Task as PlannedTask


class Task(Protocol):
    """How records become batches, and batches become losses."""

    def batch(self, data: PreparedData, indices: Ints) -> Batch:
        """The batch of the chosen records; `indices` is int64[n]."""
        ...

    def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """float32[n]: one loss for each record in nats, from this record alone.

        A task over tokens takes the mean over the record's own tokens. A mean over the batch's
        tokens, as in Transformers' `.loss`, would let one record change the gradients of others.
        """
        ...


class ClassificationTask:
    """Sequence classification by cross entropy."""

    def batch(self, data: PreparedData, indices: Ints) -> Batch:
        """The chosen records."""
        return data.batch(indices)

    def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """float32[n]."""
        logits = model.logits(batch.inputs)
        return cross_entropy(logits, batch.labels.to(logits.device), reduction="none")

    @torch.no_grad()
    def predict(self, model: AdaptedModel, batch: Batch) -> Ints:
        """Most likely label index of each record, int64[n]."""
        predicted: Ints = model.logits(batch.inputs).argmax(-1).cpu().numpy().astype(np.int64)
        return predicted


class CausalLmTask:
    """The next token of an answer, by cross entropy."""

    def batch(self, data: PreparedData, indices: Ints) -> Batch:
        """The chosen records; their labels are padded with `IGNORED`."""
        rows, mask = data.tokens.rows(indices)
        labels = np.where(mask == 1, data.labels[rows], IGNORED)
        return Batch(data.inputs(indices), torch.from_numpy(labels))

    def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """float32[n]: the mean over the tokens of the record that count."""
        targets = batch.labels[:, 1:].to(model.device)
        counts = targets != IGNORED
        losses = model.next_token_losses(batch.inputs, counts, targets[counts])
        records = counts.nonzero()[:, 0]
        sums = torch.zeros(len(counts), device=losses.device).index_add(0, records, losses)
        return sums / counts.sum(1)


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
