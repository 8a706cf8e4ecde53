"""Where memory runs out a batch is cut smaller: the same step, and nothing of a failed part."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_models import plan_for

from umbel_client.data.tokens import Tokens
from umbel_client.data.units import Units
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.inputs import Batch
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.tasks.physical_batches import ran_out_of_memory
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import ClassificationTask
from umbel_client.training.round import LocalTrainer, plain_step
from umbel_common.errors import ModelError
from umbel_common.plans.plan import Classification, LocalPrivacy, NoPrivacy, TrainingPlan

torch.set_num_threads(1)

COUNT = 16
EVERY = np.arange(COUNT)
OWNERS = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7, 8])


class Small(ClassificationTask):
    """On a machine without memory for more than `most` records: fails in the backward pass, when
    the head's gradients are there already, or in the forward pass."""

    def __init__(self, most: int, *, backward: bool = True) -> None:
        self.most = most
        self.backward = backward
        self.tried: list[int] = []
        """Rows of each physical batch."""
        self.done = 0
        """Records of those that had room."""

    def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        self.tried.append(len(batch.labels))
        too_many = len(batch.labels) > self.most
        if not too_many:
            assert batch.records is not None
            self.done += batch.records
        if too_many and not self.backward:
            raise torch.OutOfMemoryError("made up")

        def run_out(_gradient: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("made up")

        def fail_below(_head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            if too_many:
                inputs[0].register_hook(run_out)

        assert model.head is not None
        hook = model.head.register_forward_pre_hook(fail_below)
        losses = super().losses(model, batch)
        hook.remove()
        return losses


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    return loaded(tiny_model, plan_of(tiny_model))


def plan_of(folder: Path, *, private: bool = True) -> TrainingPlan:
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=0.5) if private else NoPrivacy()
    return plan_for(folder, Classification(labels=("a", "b", "c")), privacy=privacy)


def loaded(folder: Path, plan: TrainingPlan) -> AdaptedModel:
    model = AdaptedModel.load(folder, plan)
    random = np.random.default_rng(0)
    model.set_vector(random.normal(0, 0.3, plan.lora.size).astype(np.float32))
    model.select(1)
    return model


def data_of(owners: np.ndarray | None = None) -> PreparedData:
    random = np.random.default_rng(3)
    lengths = random.integers(2, 14, COUNT)
    tokens = Tokens(
        ids=random.integers(5, 40, int(lengths.sum())).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pad_id=0,
    )
    units = None if owners is None else Units(owners)
    return PreparedData(tokens, random.integers(0, 3, COUNT), prefix=None, units=units)


def fixed(length: int) -> bytes:
    return bytes([7]) * length


def step_of(
    model: AdaptedModel,
    data: PreparedData,
    task: ClassificationTask,
    limit: BatchLimit,
    *,
    noise_multiplier: float = 0.8,
    steps: int = 1,
    chosen: np.ndarray = EVERY,
) -> np.ndarray:
    """What steps of gradient descent with rate 1 add to an adapter that is zero, so that nothing of
    it is rounded away."""
    parameters = [p for p in model.adapter.values() if p.requires_grad]
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        StepNoise(fixed, parameters, steps=steps),
        noise_multiplier=noise_multiplier,
        clip_norm=0.5,
        expected_batch_size=8.0,
    )
    before = model.vector()
    units = None if data.units is None else data.units.of_record
    moved = np.zeros_like(before)
    with per_record_gradients(model):
        for _ in range(steps):
            private_step(task, model, data, chosen, optimizer, limit, units)
            moved += np.concatenate([p.grad.numpy().ravel() for p in parameters])
            model.set_vector(before)
    return moved


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.8])
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_physical_batches_give_the_same_sum_and_noise(
    model: AdaptedModel, size: int, units: bool, noise_multiplier: float
) -> None:
    data = data_of(OWNERS if units else None)
    task = ClassificationTask()
    wanted = step_of(model, data, task, BatchLimit(COUNT), noise_multiplier=noise_multiplier)
    found = step_of(model, data, task, BatchLimit(size), noise_multiplier=noise_multiplier)
    assert difference(found, wanted) < 1e-6


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("most", [4, 7, 15])
def test_a_batch_that_does_not_fit_gives_the_same_sum_and_noise_in_smaller_parts(
    model: AdaptedModel, most: int, units: bool, backward: bool
) -> None:
    data, small = data_of(OWNERS if units else None), Small(most, backward=backward)
    wanted = step_of(model, data, ClassificationTask(), BatchLimit(COUNT))
    found = step_of(model, data, small, BatchLimit(COUNT))
    assert difference(found, wanted) < 1e-6
    assert small.tried[0] == COUNT
    assert small.done == COUNT


def test_what_a_failed_part_left_would_count_if_it_were_kept(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above could not fail otherwise: the head's gradients are there when memory ends."""
    monkeypatch.setattr(PrivateOptimizer, "discard", lambda self: None)
    with pytest.raises(ModelError, match="not separate"):
        step_of(model, data_of(), Small(8), BatchLimit(COUNT))


def test_the_smaller_size_stays_and_is_said_once(
    model: AdaptedModel, caplog: pytest.LogCaptureFixture
) -> None:
    limit, small = BatchLimit(COUNT), Small(5)
    with caplog.at_level(logging.INFO, "umbel.trainer"):
        step_of(model, data_of(), small, limit, steps=3)
    assert limit.records == 4
    assert small.tried == [16, 8, *[4] * 12]
    assert len(caplog.records) == 1
    assert "memory ran out with 16 records at once" in caplog.text


def test_a_unit_that_does_not_fit_is_an_error_that_says_what_to_do_without_privacy(
    tiny_model: Path,
) -> None:
    model = loaded(tiny_model, plan_of(tiny_model, private=False))

    def step(small: Small, data: PreparedData) -> None:
        optimizer = torch.optim.SGD(list(model.select(1).values()), lr=1.0)
        plain_step(small, model, data, EVERY, optimizer, BatchLimit(COUNT), 8.0)

    with pytest.raises(ModelError, match="records of one unit do not fit") as caught:
        step(Small(3), data_of(OWNERS))
    assert caught.value.exit_code == 12
    assert caught.value.found == "4 at once"
    assert "max_records_per_unit" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="records of one unit do not fit") as caught:
        step(Small(0), data_of())
    assert caught.value.found == "1 at once"


def test_a_unit_that_does_not_fit_counts_as_zero_under_privacy(
    model: AdaptedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """An error would tell that a unit of many records is in the batch."""
    fitting = np.flatnonzero(np.bincount(OWNERS)[OWNERS] <= 3)
    wanted = step_of(model, data_of(OWNERS), ClassificationTask(), BatchLimit(3), chosen=fitting)
    found = step_of(model, data_of(OWNERS), Small(3), BatchLimit(COUNT))
    assert difference(found, wanted) < 1e-6
    assert "records of one unit do not fit into memory" in caplog.text
    noise = step_of(model, data_of(), ClassificationTask(), BatchLimit(3), chosen=EVERY[:0])
    assert difference(step_of(model, data_of(), Small(0), BatchLimit(COUNT)), noise) < 1e-6


def test_an_error_that_is_not_about_memory_is_not_retried(model: AdaptedModel) -> None:
    class Broken(ClassificationTask):
        tried = 0

        def losses(self, model: AdaptedModel, batch: Batch) -> torch.Tensor:
            self.tried += 1
            return super().losses(model, replace(batch, labels=batch.labels + 9))

    broken = Broken()
    with pytest.raises((IndexError, RuntimeError)):
        step_of(model, data_of(), broken, BatchLimit(COUNT))
    assert broken.tried == 1


def test_torchs_own_refusals_are_known() -> None:
    """On a CPU torch has no error class for it: the real allocator's text is what counts."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**48)
    assert ran_out_of_memory(caught.value)
    assert ran_out_of_memory(MemoryError())
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("units", [True, False])
def test_a_round_goes_on_in_smaller_parts(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, units: bool, private: bool
) -> None:
    plan = plan_of(tiny_model, private=private)
    model, data = loaded(tiny_model, plan), data_of(OWNERS if units else None)
    start, noise = model.vector(), SiteNoise(1.0, 0.8 if private else None)
    wanted = LocalTrainer(model, data, noise, fixed, BatchLimit(COUNT)).round(1, start).delta
    limit = BatchLimit(COUNT)
    monkeypatch.setattr("umbel_client.training.round.task_of", lambda planned: Small(5))
    found = LocalTrainer(model, data, noise, fixed, limit).round(1, start).delta
    assert limit.records == 4
    assert difference(found, wanted) < 1e-5
