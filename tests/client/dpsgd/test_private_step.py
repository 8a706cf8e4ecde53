"""One private step: each record's own gradient, clipped, summed, noised once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from umbel_client.data.tokens import Tokens
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.base.precision import Precision
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.frozen_cache import frozen_prefix
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import ClassificationTask, Task
from umbel_common.errors import ModelError
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    NoPrivacy,
    Sgd,
    Training,
    TrainingPlan,
)
from umbel_host.files.model_digest import folder_digest

torch.set_num_threads(1)

TASK = ClassificationTask()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
SGD = Sgd(adapter_learning_rate=1.0, head_learning_rate=1.0)
PRIVATE = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=0.5)
NEXT_TO_NOTHING = 1e-12
"""A noise multiplier that float32 cannot show."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("model")
    config = BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=40,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(path)
    BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(path)
    return path


def plan_of(
    folder: Path,
    *,
    head: str = "mean-pool",
    method: str = "both",
    layers: tuple[int, ...] | None = None,
    optimizer: Adam | Sgd = SGD,
    privacy: LocalPrivacy | NoPrivacy = PRIVATE,
    **training: object,
) -> TrainingPlan:
    task = Classification(labels=("a", "b", "c"), head=head)
    return TrainingPlan(
        federation="f",
        job="j",
        model=BaseModel(name="tiny", digest=folder_digest(folder)),
        task=task,
        lora=plan_lora(
            folder,
            task,
            rank=2,
            alpha=4.0,
            target_modules=("query", "value"),
            layers=layers,
            method=method,
            seed=5,
        ),
        training=Training(
            **{
                "rounds": 4,
                "local_steps": 1,
                "expected_batch_size": 8,
                "optimizer": optimizer,
                **training,
            }
        ),
        privacy=privacy,
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-4),
    )


def records(lengths: list[int], seed: int = 0) -> PreparedData:
    random = np.random.default_rng(seed)
    tokens = Tokens(
        ids=random.integers(5, 40, sum(lengths)).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pad_id=0,
    )
    return PreparedData(tokens, random.integers(0, 3, len(lengths)), prefix=None)


def ragged(count: int = 16) -> PreparedData:
    return records(np.random.default_rng(3).integers(2, 14, count).tolist())


def some_vector(plan: TrainingPlan, scale: float = 0.3) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, plan.lora.size).astype(np.float32)


def model_of(
    folder: Path, plan: TrainingPlan, round_number: int = 1, precision: Precision = "float32"
) -> AdaptedModel:
    model = AdaptedModel.load(folder, plan, precision=precision)
    model.set_vector(some_vector(plan))
    model.select(round_number)
    return model


def fixed(byte: int):
    return lambda length: bytes([byte]) * length


def true_gradients(
    model: AdaptedModel, data: PreparedData, indices: np.ndarray, task: Task = TASK
) -> np.ndarray:
    """One record at a time, by torch alone: float32[n, trained elements]."""
    trained = [p for p in model.adapter.values() if p.requires_grad]
    rows = []
    for index in indices:
        loss = task.losses(model, data.batch(data.part(np.array([index]))))
        gradients = torch.autograd.grad(loss.sum(), trained)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).numpy())
    return np.stack(rows)


def step_of(
    model: AdaptedModel,
    data: PreparedData,
    chosen: np.ndarray,
    *,
    noise_multiplier: float = NEXT_TO_NOTHING,
    clip_norm: float = 0.5,
    expected: float = 8.0,
    physical: int = 4,
    task: Task = TASK,
    units: np.ndarray | None = None,
) -> np.ndarray:
    """What one private step of gradient descent with rate 1 subtracts from the adapter."""
    parameters = [p for p in model.adapter.values() if p.requires_grad]
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        StepNoise(fixed(1), parameters, steps=1),
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        expected_batch_size=expected,
    )
    with per_record_gradients(model):
        private_step(task, model, data, chosen, optimizer, BatchLimit(physical), units)
    after = torch.cat([p.detach().flatten().clone() for p in parameters])
    with torch.no_grad():
        for parameter, old in zip(
            parameters, before.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.copy_(old.view_as(parameter))
    return (before - after).numpy()


def clipped(gradients: np.ndarray, norm: float) -> np.ndarray:
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients * np.minimum(1.0, norm / lengths)


@pytest.mark.parametrize("head", ["mean-pool", "stock"])
@pytest.mark.parametrize(("method", "round_number"), [("both", 1), ("ffa", 1), ("alternate", 2)])
def test_per_record_gradients_are_those_of_records_taken_alone(
    folder: Path, head: str, method: str, round_number: int
) -> None:
    plan = plan_of(folder, head=head, method=method)
    model, data = model_of(folder, plan, round_number), ragged()
    indices = np.arange(16)
    with per_record_gradients(model):
        TASK.losses(model, data.batch(data.part(indices))).sum().backward()
        found = np.concatenate(
            [
                model.adapter[t.name].grad_sample.reshape(16, -1).numpy()
                for t in plan.trained_tensors(round_number)
            ],
            axis=1,
        )
    wanted = true_gradients(model, data, indices)
    errors = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert errors.max() < 1e-5


def test_gradients_from_the_prefix_cache_are_those_of_the_whole_model(folder: Path) -> None:
    plan = plan_of(folder, layers=(1,))
    model, whole = model_of(folder, plan), ragged()
    parts = list(whole.physical_batches(np.arange(len(whole)), BatchLimit(8)))
    prefix = frozen_prefix(model, whole.tokens, parts, None, lambda _done, _total: None)
    assert prefix is not None
    cached = PreparedData(whole.tokens, whole.labels, prefix)
    chosen = np.arange(16)
    wanted = step_of(model, whole, chosen)
    assert np.linalg.norm(step_of(model, cached, chosen) - wanted) < 2e-3 * np.linalg.norm(wanted)


def test_a_step_is_the_sum_of_clipped_gradients_over_the_expected_batch_size(
    folder: Path,
) -> None:
    model, data = model_of(folder, plan_of(folder)), ragged()
    chosen = np.array([0, 3, 4, 9, 15])
    gradients = true_gradients(model, data, chosen)
    norms = np.linalg.norm(gradients, axis=1)
    clip_norm = float(np.median(norms))
    assert norms.min() < clip_norm < norms.max()
    found = step_of(model, data, chosen, clip_norm=clip_norm, expected=7.5)
    wanted = clipped(gradients, clip_norm).sum(0) / 7.5
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("physical", [1, 3, 5, 16])
def test_physical_batches_do_not_change_the_step(folder: Path, physical: int) -> None:
    model, data = model_of(folder, plan_of(folder)), ragged()
    whole = step_of(model, data, np.arange(16), physical=100)
    parts = step_of(model, data, np.arange(16), physical=physical)
    assert np.abs(whole - parts).max() < 1e-6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_record_moves_the_sum_by_the_clip_norm_at_most(
    folder: Path, precision: Precision
) -> None:
    """A very long record beside 15 short ones: a mean over the batch's tokens would fail here."""
    data = records([3] * 15 + [200])
    model = model_of(folder, plan_of(folder), precision=precision)
    every = np.arange(16)
    for clip_norm in (0.01, 0.5):
        options = {"clip_norm": clip_norm, "expected": 1.0, "physical": 16}
        with_all = step_of(model, data, every, **options)
        for left_out in every:
            without = step_of(model, data, np.delete(every, left_out), **options)
            assert np.linalg.norm(with_all - without) <= clip_norm * (1 + 1e-4)
    # The bound is tight, so nothing else bounds it.
    assert np.linalg.norm(step_of(model, data, every[-1:], clip_norm=0.01, expected=1.0)) > 0.0099


class Overflowing(ClassificationTask):
    """Multiplies what flows back from the head to the layers below, for records with label 2."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def losses(self, model, batch):
        factors = torch.where(batch.labels == 2, self.factor, 1.0)[:, None]

        def multiply(_head, inputs):
            inputs[0].register_hook(lambda gradients: gradients * factors)

        hook = model.head.register_forward_pre_hook(multiply)
        losses = super().losses(model, batch)
        hook.remove()
        return losses


@pytest.mark.parametrize(
    ("factor", "physical"),
    [
        *((factor, 3) for factor in (np.nan, np.inf, 3e38)),
        (np.nan, 16),
        pytest.param(np.inf, 16, marks=pytest.mark.full),
        pytest.param(3e38, 16, marks=pytest.mark.full),
    ],
)
def test_a_record_whose_gradient_overflows_counts_as_if_it_were_not_there(
    folder: Path, factor: float, physical: int
) -> None:
    """Otherwise its NaN would pass clipping and noise, and say that the record is there."""
    task, broken, others = Overflowing(factor), np.array([8]), np.delete(np.arange(16), 8)
    labels = np.where(np.arange(16) == 8, 2, np.arange(16) % 2)
    model, data = model_of(folder, plan_of(folder)), replace(ragged(), labels=labels)
    finite = np.isfinite(true_gradients(model, data, broken, task))
    # The head's part is sound, and must not count alone.
    assert finite.any()
    assert not finite.all()
    options = {"task": task, "physical": physical}
    found = step_of(model, data, np.arange(16), **options)
    assert np.isfinite(found).all()
    assert np.abs(found - step_of(model, data, others, **options)).max() < 1e-6
    shares = clipped(true_gradients(model, data, others), 0.5) / 8
    assert np.abs(found - shares.sum(0)).max() < 1e-6
    for other, share in zip(others, shares, strict=True):
        beside = step_of(model, data, np.append(broken, other), **options)
        assert np.abs(beside - share).max() < 1e-6
    assert not step_of(model, data, broken, **options).any()


def test_bfloat16_layers_give_nearly_the_same_step(folder: Path) -> None:
    plan, data = plan_of(folder), ragged()
    wanted = step_of(model_of(folder, plan), data, np.arange(16))
    found = step_of(model_of(folder, plan, precision="bfloat16"), data, np.arange(16))
    assert 0 < np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


def test_an_empty_batch_takes_a_step_of_noise_alone(folder: Path) -> None:
    model, data = model_of(folder, plan_of(folder)), ragged()
    empty = np.array([], dtype=np.int64)
    found = step_of(model, data, empty, noise_multiplier=3.0, clip_norm=0.5, expected=2.0)
    source = NoiseSource(fixed(1))
    trained = [p for p in model.adapter.values() if p.requires_grad]
    wanted = source.normal(sum(p.numel() for p in trained)) * 3.0 * 0.5 / 2.0
    assert np.abs(found - wanted).max() < 1e-6
    assert 0.5 < found.std() / 0.75 < 1.5


def test_noise_is_added_once_to_a_step_of_many_physical_batches(folder: Path) -> None:
    model, data = model_of(folder, plan_of(folder)), ragged()
    options = {"clip_norm": 0.5, "expected": 2.0}
    signal = step_of(model, data, np.arange(16), **options)
    noisy = step_of(model, data, np.arange(16), noise_multiplier=3.0, physical=2, **options)
    empty = step_of(model, data, np.arange(0), noise_multiplier=3.0, **options)
    assert np.abs(noisy - signal - empty).max() < 1e-5


def test_two_passes_without_a_step_are_refused(folder: Path) -> None:
    model, data = model_of(folder, plan_of(folder)), ragged()
    parameters = [p for p in model.adapter.values() if p.requires_grad]
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        StepNoise(fixed(1), parameters, steps=1),
        noise_multiplier=1.0,
        clip_norm=1.0,
        expected_batch_size=4,
    )
    with per_record_gradients(model):
        TASK.losses(model, data.batch(data.part(np.arange(4)))).sum().backward()
        with pytest.raises(ModelError, match="not separate"):
            private_step(TASK, model, data, np.arange(4), optimizer, BatchLimit(4))


def test_tokens_taken_for_records_are_refused(folder: Path) -> None:
    class Flattening(ClassificationTask):
        def losses(self, model, batch):
            logits = model.logits(batch.inputs)
            pooled = logits.repeat_interleave(2, 0)
            return (model.head(torch.ones(len(pooled), 16)) + pooled).sum(1)

    model, data = model_of(folder, plan_of(folder)), ragged()
    parameters = [p for p in model.adapter.values() if p.requires_grad]
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        StepNoise(fixed(1), parameters, steps=1),
        noise_multiplier=1.0,
        clip_norm=1.0,
        expected_batch_size=4,
    )
    with per_record_gradients(model), pytest.raises(ModelError, match="not separate"):
        private_step(Flattening(), model, data, np.arange(4), optimizer, BatchLimit(4))


def test_units_of_one_record_each_are_records(folder: Path) -> None:
    model, data = model_of(folder, plan_of(folder)), ragged()
    wanted = step_of(model, data, np.arange(16))
    found = step_of(model, data, np.arange(16), units=np.arange(16)[::-1] + 100)
    assert np.abs(found - wanted).max() < 1e-6


def test_a_step_over_units_clips_the_mean_of_each_units_records(folder: Path) -> None:
    model, data = model_of(folder, plan_of(folder)), ragged()
    chosen, units = np.array([0, 3, 4, 9, 15]), np.arange(16) % 3
    gradients = true_gradients(model, data, chosen)
    means = np.stack([gradients[units[chosen] == unit].mean(0) for unit in range(2)])
    assert set(units[chosen]) == {0, 1}
    found = step_of(model, data, chosen, physical=16, units=units)
    wanted = clipped(means, 0.5).sum(0) / 8
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_a_unit_in_two_physical_batches_is_refused_before_any_gradient(folder: Path) -> None:
    model, data = model_of(folder, plan_of(folder)), ragged()
    with pytest.raises(ModelError, match="several physical batches"):
        step_of(model, data, np.arange(16), physical=8, units=np.zeros(16, dtype=np.int64))
