"""Neighbouring data sets: a record more or less moves the clipped sum by the clip norm at most."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel_client.batch import Batch, TokenInputs
from umbel_client.model import AdaptedModel, folder_digest, plan_lora
from umbel_client.prepared import PreparedData
from umbel_client.task import ClassificationTask
from umbel_client.tokens import Tokens
from umbel_client.training import train_round
from umbel_common.plan import (
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Sgd,
    Training,
    TrainingPlan,
)

CLIP_NORM = 4.0
LONG = 200
NEXT_TO_NOTHING = 1e-7
"""A noise multiplier that float32 hardly shows."""
ROUNDING = 1e-4
"""Of noise and float32 in a difference of two adapters."""


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> AdaptedModel:
    task = Classification(labels=("a", "b", "c"))
    plan = TrainingPlan(
        federation="f",
        job="j",
        model=BaseModel(name="tiny", digest=folder_digest(tiny_model)),
        task=task,
        lora=plan_lora(
            tiny_model,
            task,
            rank=2,
            alpha=4.0,
            target_modules=("query", "value"),
            layers=None,
            method="both",
            seed=5,
        ),
        training=Training(
            rounds=1,
            local_steps=1,
            expected_batch_size=1,
            optimizer=Sgd(adapter_learning_rate=1.0, head_learning_rate=1.0),
        ),
        privacy=LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=CLIP_NORM),
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-4),
    )
    return AdaptedModel.load(tiny_model, plan)


def data_of(lengths: list[int], labels: list[int], seed: int) -> PreparedData:
    random = np.random.default_rng(seed)
    tokens = [random.integers(5, 40, length) for length in lengths]
    return PreparedData(
        Tokens(
            ids=np.concatenate([*tokens, np.zeros(0, np.int64)]).astype(np.int32),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            pad_id=0,
        ),
        np.array(labels, dtype=np.int64),
        prefix=None,
    )


def without(data: PreparedData, record: int) -> PreparedData:
    """The neighbour."""
    start, end = data.tokens.starts[record : record + 2]
    lengths = np.delete(data.tokens.lengths, record)
    return PreparedData(
        Tokens(
            ids=np.delete(data.tokens.ids, np.arange(start, end)),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            pad_id=0,
        ),
        np.delete(data.labels, record),
        prefix=None,
    )


def clipped_sum(model: AdaptedModel, data: PreparedData, adapter_seed: int = 0) -> np.ndarray:
    """What one step of rate 1 on every record subtracts from the adapter."""
    vector = np.random.default_rng(adapter_seed).normal(0, 0.3, model.plan.lora.size)
    return -train_round(
        model,
        data,
        model.plan,
        1,
        vector.astype(np.float32),
        1.0,
        NEXT_TO_NOTHING,
        None,
        entropy=lambda size: bytes(size),
        physical_batch_size=64,
        on_step=lambda step, steps: None,
    ).delta


def largest_move(model: AdaptedModel, data: PreparedData) -> float:
    """Over all records that can be left out."""
    whole = clipped_sum(model, data)
    moves = [whole - clipped_sum(model, without(data, record)) for record in range(len(data))]
    return float(np.linalg.norm(moves, axis=1).max())


def mean_over_tokens(self: ClassificationTask, model: AdaptedModel, batch: Batch) -> object:
    """Every token of the batch counts the same, as in Transformers' `.loss`; times the number of
    records, as per-record gradients of a mean are taken."""
    losses = own_losses(self, model, batch)
    assert isinstance(batch.inputs, TokenInputs)
    lengths = batch.inputs.mask.sum(1)
    return losses * lengths * len(lengths) / lengths.sum()


own_losses = ClassificationTask.losses


def test_one_very_long_record_beside_15_short_ones_moves_the_sum_by_the_clip_norm(
    model: AdaptedModel,
) -> None:
    move = largest_move(model, data_of([3] * 15 + [LONG], [0] * 16, seed=0))
    assert move <= CLIP_NORM + ROUNDING
    # The bound is reached, so it is the clipping that holds it.
    assert move > CLIP_NORM - ROUNDING


def test_a_mean_over_the_batchs_tokens_moves_it_several_times_as_far(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassificationTask, "losses", mean_over_tokens)
    assert largest_move(model, data_of([3] * 15 + [LONG], [0] * 16, seed=0)) > 3 * CLIP_NORM


@settings(max_examples=25)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 5, 8, 40, LONG]), min_size=1, max_size=16),
    data=st.data(),
)
def test_any_record_of_any_data_moves_it_by_the_clip_norm_at_most(
    model: AdaptedModel, lengths: list[int], data: st.DataObject
) -> None:
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    record = data.draw(st.integers(0, len(lengths) - 1))
    seed = data.draw(st.integers(0, 1000))
    whole = data_of(lengths, labels, seed)
    move = clipped_sum(model, whole, seed) - clipped_sum(model, without(whole, record), seed)
    assert np.linalg.norm(move) <= CLIP_NORM + ROUNDING
