"""Neighbouring data sets: a record or a patient more or less moves the clipped sum by the clip norm
at most."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.amplifying import padded_to_the_longest
from support.small_models import plan_for

from umbel_client.data.tokens import Tokens
from umbel_client.data.units import Units
from umbel_client.dpsgd.gradient_sum import take_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.inputs import Batch, TokenInputs
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import ClassificationTask
from umbel_client.training.round import LocalTrainer
from umbel_common.plans.plan import Classification, LocalPrivacy

CLIP_NORM = 4.0
LONG = 200
NEXT_TO_NOTHING = 1e-7
"""A noise multiplier that float32 hardly shows."""
ROUNDING = 1e-4
"""Of noise and float32 in a difference of two adapters."""


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> AdaptedModel:
    plan = plan_for(
        tiny_model,
        Classification(labels=("a", "b", "c")),
        privacy=LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=CLIP_NORM),
    )
    return AdaptedModel.load(tiny_model, plan)


def data_of(
    lengths: list[int], labels: list[int], seed: int, units: list[int] | None = None
) -> PreparedData:
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
        units=None if units is None else Units(np.array(units)),
    )


def without(data: PreparedData, unit: int) -> PreparedData:
    """The neighbour: all records of the unit are gone."""
    gone = data.records_of(np.array([unit]))
    starts, lengths = data.tokens.starts, np.delete(data.tokens.lengths, gone)
    tokens = [np.arange(*starts[record : record + 2].tolist()) for record in gone]
    units = None
    # A site's file holds a record at least, so units are never of none; here they may be.
    if data.units is not None and len(lengths):
        kept = np.delete(data.units.of_record, gone)
        units = Units(kept - (kept > unit))
    return PreparedData(
        Tokens(
            ids=np.delete(data.tokens.ids, np.concatenate(tokens)),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            pad_id=0,
        ),
        np.delete(data.labels, gone),
        prefix=None,
        units=units,
    )


def clipped_sum(model: AdaptedModel, data: PreparedData, adapter_seed: int = 0) -> np.ndarray:
    """What one step of rate 1 on every unit subtracts from the adapter."""
    vector = np.random.default_rng(adapter_seed).normal(0, 0.3, model.plan.lora.size)
    noise = SiteNoise(1.0, NEXT_TO_NOTHING)
    trainer = LocalTrainer(model, data, noise, lambda size: bytes(size), BatchLimit(64))
    return -trainer.round(1, vector.astype(np.float32)).delta


def largest_move(model: AdaptedModel, data: PreparedData) -> float:
    """Over all units that can be left out."""
    whole = clipped_sum(model, data)
    moves = [whole - clipped_sum(model, without(data, unit)) for unit in range(data.unit_count)]
    return float(np.linalg.norm(moves, axis=1).max())


def mean_over_tokens(self: ClassificationTask, model: AdaptedModel, batch: Batch) -> object:
    """Every token of the batch counts the same, as in Transformers' `.loss`; times the number of
    records, as per-record gradients of a mean are taken."""
    losses = own_losses(self, model, batch)
    assert isinstance(batch.inputs, TokenInputs)
    lengths = batch.inputs.mask.sum(1)[: batch.records]
    return losses * lengths * len(lengths) / lengths.sum()


def adding_whole_gradients(
    self: PrivateOptimizer, records: int, units: object = None, *, rows: int, copy: int
) -> None:
    """The sum, and nothing clipped."""
    gradients = take_gradients(self.parameters, rows)
    (total,) = self._sums.values()
    total += torch.cat([gradient[:records].sum(dim=0) for gradient in gradients])


def clipping_records(
    self: PrivateOptimizer, records: int, units: object = None, *, rows: int, copy: int
) -> None:
    """As if each record were its own unit, while steps sample patients."""
    own_accumulate(self, records, rows=rows)


own_losses = ClassificationTask.losses
own_accumulate = PrivateOptimizer.accumulate


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
    # In the shapes that they have now, records of such different lengths never meet.
    with padded_to_the_longest():
        moved = largest_move(model, data_of([3] * 15 + [LONG], [0] * 16, seed=0))
    assert moved > 3 * CLIP_NORM


@pytest.mark.parametrize("examples", [12, pytest.param(40, marks=pytest.mark.full)])
def test_any_unit_of_any_data_moves_it_by_the_clip_norm_at_most(
    model: AdaptedModel, examples: int
) -> None:
    @settings(max_examples=examples)
    @given(
        lengths=st.lists(st.sampled_from([1, 2, 3, 5, 8, 40, LONG]), min_size=1, max_size=16),
        data=st.data(),
        patients=st.booleans(),
    )
    def holds(lengths: list[int], data: st.DataObject, patients: bool) -> None:
        labels = data.draw(
            st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))
        )
        owners = data.draw(
            st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))
        )
        units = np.unique(owners, return_inverse=True)[1].tolist() if patients else None
        seed = data.draw(st.integers(0, 1000))
        whole = data_of(lengths, labels, seed, units)
        unit = data.draw(st.integers(0, whole.unit_count - 1))
        move = clipped_sum(model, whole, seed) - clipped_sum(model, without(whole, unit), seed)
        assert np.linalg.norm(move) <= CLIP_NORM + ROUNDING

    holds()


PATIENTS = [0, 1, 1, 2, *[3] * 9]
"""The last one has nine records."""


def test_a_patient_with_nine_records_moves_the_sum_by_the_clip_norm(model: AdaptedModel) -> None:
    move = largest_move(model, data_of([40] * 13, [0] * 13, seed=0, units=PATIENTS))
    assert CLIP_NORM - ROUNDING < move <= CLIP_NORM + ROUNDING


def test_clipping_records_moves_it_several_times_as_far_for_a_patient(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivateOptimizer, "accumulate", clipping_records)
    assert largest_move(model, data_of([40] * 13, [0] * 13, seed=0, units=PATIENTS)) > 3 * CLIP_NORM


def test_without_clipping_a_record_moves_it_further(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivateOptimizer, "accumulate", adding_whole_gradients)
    assert largest_move(model, data_of([3] * 15 + [LONG], [0] * 16, seed=0)) > CLIP_NORM + ROUNDING
