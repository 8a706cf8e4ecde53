"""The classification task: a loss for each record, from this record alone."""

import numpy as np
import pytest
import torch

from umbel_client.models.inputs import Batch, PooledInputs
from umbel_client.tasks.task import ClassificationTask


class Linear:
    """Logits straight from the inputs: the task needs no more of a model."""

    def logits(self, inputs: PooledInputs) -> torch.Tensor:
        return inputs.pooled


LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-5.0, 1.0, 3.0]])
BATCH = Batch(PooledInputs(LOGITS), torch.tensor([0, 2, 1]))


def test_losses_are_the_cross_entropy_of_each_record() -> None:
    losses = ClassificationTask().losses(Linear(), BATCH)
    exponents = np.exp(LOGITS.numpy())
    wanted = -np.log(exponents[[0, 1, 2], [0, 2, 1]] / exponents.sum(1))
    assert losses.shape == (3,)
    assert losses.numpy() == pytest.approx(wanted, rel=1e-5)


def test_a_loss_does_not_depend_on_the_other_records() -> None:
    task = ClassificationTask()
    together = task.losses(Linear(), BATCH)
    for index in range(3):
        alone = Batch(PooledInputs(LOGITS[index : index + 1]), BATCH.labels[index : index + 1])
        assert task.losses(Linear(), alone)[0] == together[index]


def test_the_prediction_is_the_largest_logit() -> None:
    assert ClassificationTask().predict(Linear(), BATCH).tolist() == [0, 0, 2]
