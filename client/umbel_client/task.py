"""What a task asks of a model: the seam for tasks beside classification."""

from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from umbel_client.batch import Batch
from umbel_client.model import AdaptedModel
from umbel_client.prepared import PreparedData
from umbel_client.tokens import Ints


class Task(Protocol):
    """How records become batches, and batches become losses."""

    def batch(self, data: PreparedData, indices: Ints) -> Batch:
        """The chosen records."""
        ...

    def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        """float32[n]: one loss for each record, from this record alone.

        A task over tokens takes the mean over the record's own tokens: a mean over the batch's
        tokens, as Transformers' `.loss` does, lets one record change the gradient of the others.
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
