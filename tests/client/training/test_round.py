"""The local loop: what one record can do is bounded, and what leaves is the delta alone."""

import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from umbel_client.data.tokens import Tokens
from umbel_client.data.units import Units
from umbel_client.evaluation.losses import predicted_labels
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.base.precision import Precision
from umbel_client.privacy.calibration import SiteNoise, sampling_rate
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import ClassificationTask
from umbel_client.training.round import LocalTrainer, RoundResult
from umbel_common.adapters.vector import initial_vector, merge, size_of, unflatten
from umbel_common.errors import DataError, ModelError, PlanError
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    Classification,
    Clipping,
    LocalPrivacy,
    NoPrivacy,
    Sgd,
    Training,
    TrainingPlan,
)
from umbel_host.files.model_digest import folder_digest

torch.set_num_threads(1)

TASK = ClassificationTask()
SGD = Sgd(adapter_learning_rate=1.0, head_learning_rate=1.0)
ADAM = Adam(adapter_learning_rate=0.01, head_learning_rate=0.02)
PRIVATE = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=0.5)
NEXT_TO_NOTHING = 1e-12
"""A noise multiplier that float32 cannot show."""


@pytest.fixture
def folder(tiny_model: Path) -> Path:
    return tiny_model


def plan_of(
    folder: Path,
    *,
    method: str = "both",
    optimizer: Adam | Sgd = SGD,
    privacy: LocalPrivacy | NoPrivacy = PRIVATE,
    **training: object,
) -> TrainingPlan:
    task = Classification(labels=("a", "b", "c"))
    targets = {"target_modules": ("query", "value"), "layers": None}
    schedule = {"rounds": 4, "local_steps": 1, "expected_batch_size": 8, **training}
    return TrainingPlan(
        federation="f",
        job="j",
        model=BaseModel(name="tiny", digest=folder_digest(folder)),
        task=task,
        lora=plan_lora(folder, task, rank=2, alpha=4.0, method=method, seed=5, **targets),
        training=Training(optimizer=optimizer, **schedule),
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


def train(
    model: AdaptedModel, data: PreparedData, plan: TrainingPlan, **changes: object
) -> RoundResult:
    arguments: dict[str, Any] = {
        "round_number": 1,
        "global_vector": some_vector(plan),
        "sample_rate": plan.training.expected_batch_size / max(len(data), 1),
        "noise_multiplier": 1.0 if isinstance(plan.privacy, LocalPrivacy) else None,
        "state": None,
        "entropy": fixed(1),
        "physical_batch_size": 4,
        "on_step": lambda _step, _steps: None,
        **changes,
    }
    model.follow(plan)
    trainer = LocalTrainer(
        model,
        data,
        SiteNoise(arguments["sample_rate"], arguments["noise_multiplier"]),
        arguments["entropy"],
        BatchLimit(arguments["physical_batch_size"]),
    )
    return trainer.round(
        arguments["round_number"],
        arguments["global_vector"],
        arguments["state"],
        arguments["on_step"],
    )


def true_gradients(model: AdaptedModel, data: PreparedData, indices: np.ndarray) -> np.ndarray:
    """One record at a time, by torch alone: float32[n, trained elements]."""
    trained = [p for p in model.adapter.values() if p.requires_grad]
    rows = []
    for index in indices:
        loss = TASK.losses(model, data.batch(data.part(np.array([index]))))
        gradients = torch.autograd.grad(loss.sum(), trained)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).numpy())
    return np.stack(rows)


def test_hooks_are_gone_after_a_round_and_the_model_evaluates_as_before(folder: Path) -> None:
    plan, data = plan_of(folder), ragged()
    model = AdaptedModel.load(folder, plan)
    for _ in range(2):
        train(model, data, plan)
        assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
        assert not any(hasattr(p, "grad_sample") for p in model.parameters())
        assert not any(module.training for module in model.modules())


def test_a_round_is_its_entropy_and_nothing_else(folder: Path) -> None:
    plan, data = plan_of(folder, local_steps=3), ragged()
    model = AdaptedModel.load(folder, plan)
    torch.manual_seed(0)
    first = train(model, data, plan).delta
    torch.manual_seed(1)
    assert np.array_equal(train(model, data, plan).delta, first)
    others = [train(model, data, plan, entropy=os.urandom).delta for _ in range(2)]
    assert not np.isclose(others[0], others[1], rtol=1e-6).any()


def test_physical_batches_do_not_change_a_round(folder: Path) -> None:
    plan, data = plan_of(folder, local_steps=3), ragged()
    model = AdaptedModel.load(folder, plan)
    deltas = [train(model, data, plan, physical_batch_size=size).delta for size in (2, 100)]
    assert np.abs(deltas[0] - deltas[1]).max() < 1e-5


@pytest.mark.parametrize("method", ["both", "ffa", "alternate"])
@pytest.mark.parametrize("round_number", [1, 2])
def test_the_delta_covers_the_rounds_tensors_and_the_rest_stays(
    folder: Path, method: str, round_number: int
) -> None:
    plan, data = plan_of(folder, method=method), ragged()
    model = AdaptedModel.load(folder, plan)
    base = {name: value.clone() for name, value in model.base.state_dict().items()}
    result = train(model, data, plan, round_number=round_number)
    trained = plan.trained_tensors(round_number)
    assert result.delta.dtype == np.float32
    assert result.delta.shape == (size_of(trained),)
    changes = unflatten(result.delta, trained)
    before = unflatten(some_vector(plan), plan.lora.tensors)
    after = unflatten(model.vector(), plan.lora.tensors)
    for name in before:
        wanted = before[name] + changes[name] if name in changes else before[name]
        np.testing.assert_allclose(after[name], wanted, rtol=1e-5, atol=1e-7)
    assert all(np.any(change != 0) for change in changes.values())
    for name, value in model.base.state_dict().items():
        assert "lora_" in name or torch.equal(value, base[name])


def test_noise_has_the_standard_deviation_that_the_plan_pays_for(folder: Path) -> None:
    plan, data = plan_of(folder, local_steps=4), ragged()
    model = AdaptedModel.load(folder, plan)
    quiet = train(model, data, plan, noise_multiplier=NEXT_TO_NOTHING).delta
    noise = np.concatenate(
        [
            train(model, data, plan, noise_multiplier=1000.0, entropy=os.urandom).delta - quiet
            for _ in range(12)
        ]
    )
    # Four independent steps of rate 1, each divided by the expected batch size.
    wanted = 1000.0 * 0.5 / 8 * math.sqrt(4)
    assert noise.std() == pytest.approx(wanted, rel=0.05)


def test_without_privacy_a_round_is_plain_descent_on_the_same_batches(folder: Path) -> None:
    plan, data = plan_of(folder, privacy=NoPrivacy(), local_steps=2), ragged()
    model = AdaptedModel.load(folder, plan)
    # Not the expected batch size over the records: that would tell their exact number.
    found = train(model, data, plan, sample_rate=0.3).delta
    source = NoiseSource(fixed(1))
    reference = model_of(folder, plan)
    for _ in range(2):
        chosen = source.poisson_batch(16, 0.3)
        gradient = true_gradients(reference, data, chosen).sum(0) / 8
        reference.set_vector(reference.vector() - gradient)
    assert np.abs(found - (reference.vector() - some_vector(plan))).max() < 1e-5


def test_without_privacy_an_empty_batch_is_a_step_too(folder: Path) -> None:
    plan, data = plan_of(folder, privacy=NoPrivacy(), expected_batch_size=1), ragged(200)
    byte = next(b for b in range(256) if not len(NoiseSource(fixed(b)).poisson_batch(200, 1 / 200)))
    steps: list[tuple[int, int]] = []
    model = AdaptedModel.load(folder, plan)
    result = train(model, data, plan, entropy=fixed(byte), on_step=lambda *s: steps.append(s))
    assert not result.delta.any()
    assert steps == [(1, 1)]


def test_learning_rates_follow_the_whole_job_and_their_group(folder: Path) -> None:
    optimizer = Sgd(adapter_learning_rate=0.5, head_learning_rate=2.0)
    plan = plan_of(folder, optimizer=optimizer, final_learning_rate=0.1, rounds=4)
    unit, data = plan_of(folder), ragged()
    model = AdaptedModel.load(folder, plan)
    reference = unflatten(train(model, data, unit).delta, unit.lora.tensors)
    for round_number in (1, 2, 4):
        found = unflatten(
            train(model, data, plan, round_number=round_number).delta, plan.lora.tensors
        )
        factor = 1 - 0.9 * (round_number - 1) / 3
        for tensor in plan.lora.tensors:
            rate = factor * (2.0 if tensor.role == "head" else 0.5)
            np.testing.assert_allclose(
                found[tensor.name], rate * reference[tensor.name], rtol=1e-3, atol=1e-6
            )


def test_moments_live_across_rounds(folder: Path) -> None:
    """Two rounds of one step, the second from where the first ended, are one round of two."""
    data = ragged()
    # A sampling rate of one: the batches are the same whatever the entropy.
    shared = {"optimizer": ADAM, "privacy": NoPrivacy(), "expected_batch_size": 16}
    both = plan_of(folder, local_steps=2, rounds=1, **shared)
    single = plan_of(folder, local_steps=1, rounds=2, **shared)
    model = AdaptedModel.load(folder, both)
    wanted = train(model, data, both)
    first = train(model, data, single)
    middle = some_vector(single) + first.delta
    second = train(model, data, single, round_number=2, global_vector=middle, state=first.state)
    assert np.abs(first.delta + second.delta - wanted.delta).max() < 1e-6
    anew = train(model, data, single, round_number=2, global_vector=middle)
    assert np.abs(first.delta + anew.delta - wanted.delta).max() > 1e-4
    assert all(isinstance(value, np.ndarray) for value in second.state.values())


def test_moments_of_the_resting_matrix_rest(folder: Path) -> None:
    plan, data = plan_of(folder, method="alternate", optimizer=ADAM), ragged()
    model = AdaptedModel.load(folder, plan)
    first = train(model, data, plan, round_number=1).state
    second = train(model, data, plan, round_number=2, state=first).state
    third = train(model, data, plan, round_number=3, state=second).state
    b_moment = next(key for key in first if key.startswith("exp_avg/") and "lora_B" in key)
    b_steps = b_moment.replace("exp_avg/", "step/")
    a_steps = b_steps.replace("lora_B", "lora_A")
    assert a_steps not in first
    assert np.array_equal(second[b_moment], first[b_moment])
    assert not np.array_equal(third[b_moment], first[b_moment])
    counts = [
        (float(s[b_steps]), float(s.get(a_steps, np.zeros(())))) for s in (first, second, third)
    ]
    assert counts == [(1, 0), (1, 1), (2, 1)]
    assert float(third["step/head.bias"]) == 3


def test_the_moments_of_a_rotated_matrix_start_again(folder: Path) -> None:
    """With fedsvd the server rotates B after each round: its elements are others then."""
    plan, data = plan_of(folder, method="fedsvd", optimizer=ADAM), ragged()
    model = AdaptedModel.load(folder, plan)
    first = train(model, data, plan, round_number=1).state
    second = train(model, data, plan, round_number=2, state=first).state
    alone = train(model, data, plan, round_number=2).state
    (b_moment,) = [key for key in first if key.startswith("exp_avg/") and "lora_B" in key][:1]
    b_steps = b_moment.replace("exp_avg/", "step/")
    assert float(first[b_steps]) == float(second[b_steps]) == 1
    assert np.array_equal(second[b_moment], alone[b_moment])
    assert float(second["step/head.bias"]) == 2
    assert not any("lora_A" in key for key in second)
    # It is the method that forgets: under another one, the moments are carried on.
    kept = plan_of(folder, method="ffa", optimizer=ADAM)
    model = AdaptedModel.load(folder, kept)
    assert float(train(model, data, kept, round_number=2, state=first).state[b_steps]) == 2


def test_a_state_that_is_handed_in_is_not_changed(folder: Path) -> None:
    plan, data = plan_of(folder, optimizer=ADAM), ragged()
    model = AdaptedModel.load(folder, plan)
    state = train(model, data, plan).state
    copies = {key: value.copy() for key, value in state.items()}
    train(model, data, plan, state=state)
    assert all(np.array_equal(state[key], copies[key]) for key in copies)


@pytest.mark.parametrize("count", [0, 7])
def test_a_public_size_below_the_expected_batch_size_is_refused(folder: Path, count: int) -> None:
    with pytest.raises(DataError) as caught:
        sampling_rate(plan_of(folder), count)
    assert caught.value.found == f"{count} records"
    assert caught.value.accepted == "at least 8 records"


def test_the_sampling_rate_is_the_expected_batch_size_over_the_public_size(folder: Path) -> None:
    assert sampling_rate(plan_of(folder), 49) == 8 / 49
    assert sampling_rate(plan_of(folder), 8) == 1.0


@pytest.mark.parametrize("count", [0, 3])
def test_a_round_on_fewer_records_than_a_batch_runs_as_any_other(folder: Path, count: int) -> None:
    """A refusal would tell that there are fewer than the public size says."""
    plan = plan_of(folder, local_steps=2)
    steps: list[tuple[int, int]] = []
    model, data = AdaptedModel.load(folder, plan), records([4] * count)
    result = train(model, data, plan, sample_rate=0.5, on_step=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    assert result.delta.all()


@pytest.mark.parametrize(
    ("privacy", "noise_multiplier"),
    [(PRIVATE, None), (PRIVATE, 0.0), (PRIVATE, -1.0), (PRIVATE, math.nan), (NoPrivacy(), 1.0)],
)
def test_noise_that_does_not_fit_the_privacy_is_refused(
    folder: Path, privacy: LocalPrivacy | NoPrivacy, noise_multiplier: float | None
) -> None:
    plan = plan_of(folder, privacy=privacy)
    with pytest.raises(PlanError, match="noise does not fit"):
        train(AdaptedModel.load(folder, plan), ragged(), plan, noise_multiplier=noise_multiplier)


def test_an_adapter_that_does_not_move_stops_the_round(folder: Path) -> None:
    still = Sgd(adapter_learning_rate=1e-30, head_learning_rate=1.0)
    plan = plan_of(folder, optimizer=still, local_steps=3)
    steps: list[int] = []
    model = AdaptedModel.load(folder, plan)
    with pytest.raises(ModelError, match="left the adapter as it was") as caught:
        train(model, ragged(), plan, on_step=lambda step, _steps: steps.append(step))
    assert "lora_B" in str(caught.value.found)
    assert "head" not in str(caught.value.found)
    assert steps == []


def test_an_adapter_that_the_model_does_not_use_stops_the_round(folder: Path) -> None:
    """As in opacus issue 820: the optimiser's tensors are not those of the forward pass."""
    plan = plan_of(folder)
    model = AdaptedModel.load(folder, plan)
    name = next(name for name in model.adapter if "lora_B" in name)
    model.adapter[name] = torch.nn.Parameter(model.adapter[name].detach().clone())
    with pytest.raises(ModelError, match="not separate"):
        train(model, ragged(), plan)


def with_clipping(clipping: Clipping, clip_norm: float = 0.5) -> LocalPrivacy:
    return LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=clip_norm, clipping=clipping)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_the_plans_clipping_is_that_of_the_sum(folder: Path, clipping: Clipping) -> None:
    data = ragged()
    gradients = true_gradients(model_of(folder, plan_of(folder)), data, np.arange(16))
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    clip_norm = float(np.median(norms))
    plan = plan_of(folder, privacy=with_clipping(clipping, clip_norm))
    options = {"sample_rate": 1.0, "noise_multiplier": NEXT_TO_NOTHING}
    found = -train(AdaptedModel.load(folder, plan), data, plan, **options).delta * 8
    sums = {
        "flat": (gradients * np.minimum(1, clip_norm / norms)).sum(0),
        "automatic": (gradients * clip_norm / (norms + 0.01)).sum(0),
    }
    assert np.linalg.norm(found - sums[clipping]) < 1e-5 * np.linalg.norm(sums[clipping])
    assert np.linalg.norm(sums["flat"] - sums["automatic"]) > 0.05 * np.linalg.norm(found)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_a_unit_moves_the_sum_of_a_round_by_the_clip_norm_at_most(
    folder: Path, clipping: Clipping
) -> None:
    """Neighbouring data sets: all records of one patient are there, or are not."""
    owners, every = np.repeat(np.arange(6), [1, 5, 2, 1, 4, 3]), ragged()
    plan = plan_of(folder, privacy=with_clipping(clipping))
    model = AdaptedModel.load(folder, plan)
    options = {"sample_rate": 1.0, "noise_multiplier": NEXT_TO_NOTHING, "physical_batch_size": 16}

    def summed(kept: np.ndarray) -> np.ndarray:
        starts, ids = every.tokens.starts, every.tokens.ids
        lengths = every.tokens.lengths[kept]
        tokens = Tokens(
            np.concatenate([ids[slice(*starts[row : row + 2])] for row in kept]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            0,
        )
        _, numbers = np.unique(owners[kept], return_inverse=True)
        data = PreparedData(tokens, every.labels[kept], None, Units(numbers.astype(np.int64)))
        return -train(model, data, plan, **options).delta * 8

    whole = summed(np.arange(16))
    moves = [np.linalg.norm(whole - summed(np.flatnonzero(owners != unit))) for unit in range(6)]
    assert max(moves) <= 0.5 * (1 + 1e-4)
    # Nothing else keeps them so short.
    assert max(moves) > 0.9 * 0.5


def test_unbiased_adam_is_given_the_noise_of_this_site(folder: Path) -> None:
    """A step of plain descent with the same noise tells the gradient that Adam saw."""
    unbiased = Adam(adapter_learning_rate=0.01, head_learning_rate=0.02, eps=1e-6, unbiased=True)
    data, options = ragged(), {"sample_rate": 1.0, "noise_multiplier": 3.0}
    plain, plan = plan_of(folder), plan_of(folder, optimizer=unbiased)
    model = AdaptedModel.load(folder, plan)
    gradient = -train(model, data, plain, **options).delta.astype(float)
    found = unflatten(train(model, data, plan, **options).delta, plan.lora.tensors)
    moments = np.maximum(gradient**2 - (3.0 * 0.5 / 8) ** 2, 1e-6)
    assert 0.1 < (moments == 1e-6).mean() < 0.9
    wanted = unflatten((gradient / np.sqrt(moments)).astype(np.float32), plan.lora.tensors)
    for tensor in plan.lora.tensors:
        rate = 0.02 if tensor.role == "head" else 0.01
        np.testing.assert_allclose(
            found[tensor.name], -rate * wanted[tensor.name], rtol=1e-2, atol=1e-4
        )


@pytest.mark.parametrize("decay", [0.5, 0.95])
@pytest.mark.parametrize("private", [True, False])
def test_the_average_of_a_rounds_steps_is_released(
    folder: Path, decay: float, private: bool
) -> None:
    """Rounds of one, two and so on steps with the same entropy tell what each step left."""
    privacy = PRIVATE if private else NoPrivacy()
    shared = {"privacy": privacy, "optimizer": Sgd(0.1, 0.1, 0.5)}
    data, steps = ragged(), 4
    model = AdaptedModel.load(folder, plan_of(folder, **shared))
    iterates = []
    for count in range(1, steps + 1):
        plan = plan_of(folder, local_steps=count, **shared)
        last = train(model, data, plan)
        iterates.append(last.delta.astype(float))
    weights = decay ** np.arange(steps)[::-1]
    wanted = (weights[:, None] * np.stack(iterates)).sum(0) / weights.sum()
    plan = plan_of(folder, local_steps=steps, average_decay=decay, **shared)
    found = train(model, data, plan)
    assert np.abs(found.delta - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(found.delta - last.delta).max() > 0.01 * np.abs(wanted).max()
    # The path of the optimiser is as it was.
    assert all(np.array_equal(found.state[key], last.state[key]) for key in last.state)


def test_an_average_of_one_step_is_that_step(folder: Path) -> None:
    data = ragged()
    plan, averaged = plan_of(folder), plan_of(folder, average_decay=0.9)
    model = AdaptedModel.load(folder, plan)
    wanted = train(model, data, plan).delta
    np.testing.assert_allclose(train(model, data, averaged).delta, wanted, rtol=1e-6)


def test_without_an_average_a_round_leaves_exactly_what_its_last_step_left(folder: Path) -> None:
    plan, data = plan_of(folder, local_steps=3, optimizer=ADAM), ragged()
    assert plan.training.average_decay is None
    model = AdaptedModel.load(folder, plan)
    delta = train(model, data, plan).delta
    assert np.array_equal(delta, model.vector() - some_vector(plan))


def test_training_that_diverges_is_an_error(folder: Path) -> None:
    wild = Sgd(adapter_learning_rate=1e30, head_learning_rate=1e30)
    plan = plan_of(folder, optimizer=wild, privacy=NoPrivacy(), local_steps=3)
    with pytest.raises(ModelError, match="diverged"):
        train(AdaptedModel.load(folder, plan), ragged(), plan)


def test_sites_in_threads_train_as_if_alone(folder: Path) -> None:
    plan = plan_of(folder, local_steps=5, optimizer=ADAM)
    sites = [(AdaptedModel.load(folder, plan), records([5] * 20, seed)) for seed in range(4)]
    alone = [
        train(model, data, plan, entropy=fixed(i)).delta for i, (model, data) in enumerate(sites)
    ]
    together: dict[int, np.ndarray] = {}

    def site(index: int) -> None:
        model, data = sites[index]
        together[index] = train(model, data, plan, entropy=fixed(index)).delta

    threads = [threading.Thread(target=site, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert np.array_equal(together[index], alone[index])


def test_evaluation_answers_in_the_order_of_the_records(folder: Path) -> None:
    plan, data = plan_of(folder), ragged(23)
    model = model_of(folder, plan)
    predicted = predicted_labels(model, data, BatchLimit(4))
    for index in range(23):
        logits = model.logits(data.batch(data.part(np.array([index]))).inputs)
        assert predicted[index] == int(logits.argmax())
    assert len(set(predicted.tolist())) > 1


def test_training_learns(folder: Path) -> None:
    """Records whose label is told by one word; with DP, from chance to nearly always right."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300)
    ids = random.integers(10, 40, (300, 5))
    ids[:, 2] = 5 + labels
    tokens = Tokens(ids.astype(np.int32).ravel(), np.arange(0, 1501, 5), 0)
    data = PreparedData(tokens, labels, None)
    plan = plan_of(folder, optimizer=ADAM, local_steps=40, expected_batch_size=100)
    model = AdaptedModel.load(folder, plan)
    vector = some_vector(plan, 0.1)
    model.set_vector(vector)
    before = (predicted_labels(model, data, BatchLimit(100)) == labels).mean()
    train(model, data, plan, global_vector=vector, noise_multiplier=0.5, physical_batch_size=50)
    after = (predicted_labels(model, data, BatchLimit(100)) == labels).mean()
    assert before < 0.6
    assert after > 0.8


@pytest.mark.parametrize("private", [True, False])
def test_a_unit_with_many_records_counts_as_one(folder: Path, private: bool) -> None:
    """A patient whose one record occurs five times changes nothing but the number of records."""
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-4, clip_norm=0.5) if private else NoPrivacy()
    plan = plan_of(folder, privacy=privacy, expected_batch_size=6)
    lengths = [5, 7, 3, 6, 4, 8]
    once = records(lengths)
    rows = [0, 1, 2, 3, 4, 5, 1, 1, 1, 1]
    repeated = PreparedData(
        Tokens(
            ids=np.concatenate(
                [once.tokens.ids[slice(*once.tokens.starts[row : row + 2])] for row in rows]
            ),
            starts=np.concatenate([[0], np.cumsum([lengths[row] for row in rows])]).astype(
                np.int64
            ),
            pad_id=0,
        ),
        once.labels[rows],
        prefix=None,
        units=Units(np.array(rows)),
    )
    model = model_of(folder, plan)
    noise = NEXT_TO_NOTHING if private else None
    options = {"sample_rate": 1.0, "noise_multiplier": noise, "physical_batch_size": 3}
    first = train(model, once, plan, **options).delta
    second = train(model, repeated, plan, **options).delta
    assert np.abs(first - second).max() < 1e-4 * np.abs(first).max()
    # Not so where each record is a unit of its own.
    separate = PreparedData(repeated.tokens, repeated.labels, prefix=None)
    third = train(model, separate, plan, **options).delta
    assert np.abs(first - third).max() > 1e-2 * np.abs(first).max()


def test_rounds_are_rounds_one_after_the_other(folder: Path) -> None:
    plan, data = plan_of(folder, method="alternate", optimizer=ADAM, rounds=3), ragged()
    model = AdaptedModel.load(folder, plan)
    trainer = LocalTrainer(model, data, SiteNoise(0.5, 1.0), fixed(1), BatchLimit(4))
    adapter, state = some_vector(plan), None
    numbers = []
    for number, found, result in trainer.rounds(adapter):
        # What is done with the model between two rounds does not matter.
        model.set_vector(initial_vector(plan))
        wanted = trainer.round(number, adapter, state)
        adapter, state = merge(adapter, wanted.delta, plan, number), wanted.state
        assert np.array_equal(result.delta, wanted.delta)
        assert np.array_equal(found, adapter)
        numbers.append(number)
    assert numbers == [1, 2, 3]
