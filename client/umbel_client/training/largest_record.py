"""Tests that a model computes the longest record that a plan allows, of its last token.

This module is part of the core of the privacy guarantee. Never test on real records.

A model that fails on some lengths or some tokens would fail in a round, on the record that has
them: its failure would tell that this record is in the batch. Where the longest record and the last
token are computed, every other is.
"""

import numpy as np
import torch

from umbel_client.data.tokens import Tokens
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import Part
from umbel_client.tasks.task import made_up_labels, task_of


@torch.no_grad()
def largest_record_test(model: AdaptedModel) -> None:
    """Computes the loss of one made-up record, once.

    Raises:
        Exception: the model fails on it, in whatever way its architecture does.
    """
    length = model.plan.task.max_tokens
    ids = np.full(length, model.vocabulary - 1, dtype=np.int32)
    tokens = Tokens(ids, np.array([0, length], dtype=np.int64), pad_id=0)
    data = PreparedData(tokens, made_up_labels(model.plan.task, tokens), prefix=None)
    task = task_of(model.plan.task)
    task.losses(model, task.batch(data, Part(np.array([0]), length, 1)))
