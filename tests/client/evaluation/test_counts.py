"""Records that are scored and not trained on, and what is counted of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_models import one_round, plan_for, save_decoder

from umbel_client.data.hold_out import hold_out
from umbel_client.data.records import load_records
from umbel_client.evaluation.counts import noisy_counts
from umbel_client.evaluation.losses import predicted_labels
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.accounting import DpEvent, calibrate, epsilon
from umbel_client.privacy.calibration import noise_for
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.plans.plan import CausalLm, Classification, FederatedEvaluation, TrainingPlan

TASK = Classification(labels=("a", "b"))
EXACT = FederatedEvaluation(noise_multiplier=1e-9, max_records=1000)
ROWS = [
    {"text": f"w{n % 20} w{n % 7}", "label": "ab"[n % 2], "patient": f"p{n // 3}"}
    for n in range(300)
]

LIMIT = BatchLimit(8)


def file_of(folder: Path, rows: list[Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("unit", [None, "patient"])
def test_every_record_is_on_one_side_and_units_stay_whole(tmp_path: Path, unit: Any) -> None:
    records = load_records(file_of(tmp_path, ROWS), TASK, unit_column=unit)
    training, scoring = hold_out(records, 0.2)
    assert sorted([*training.rows, *scoring.rows]) == list(range(1, 301))
    assert 20 < len(scoring.rows) < 110
    if unit is not None:
        assert not set(training.unit_names) & set(scoring.unit_names)
        assert sorted(set(scoring.units)) == list(range(len(scoring.unit_names)))
        for row, number in zip(scoring.rows, scoring.units, strict=True):
            assert scoring.unit_names[number] == ROWS[row - 1]["patient"]


@pytest.mark.parametrize("unit", [None, "patient"])
def test_removing_a_unit_moves_no_other(tmp_path: Path, unit: Any) -> None:
    """Else a neighbouring data set would differ in more than one unit on both sides."""

    def sides(rows: list[Any]) -> dict[str, bool]:
        training, scoring = hold_out(
            load_records(file_of(tmp_path, rows), TASK, unit_column=unit), 0.2
        )
        found = {}
        for part, held in ((training, False), (scoring, True)):
            for row in part.rows:
                found[json.dumps(rows[row - 1])] = held
        return found

    every = sides(ROWS)
    fewer = sides([row for row in ROWS if row["patient"] != "p0"])
    assert all(every[row] == held for row, held in fewer.items())


@pytest.mark.parametrize("unit", [None, "patient"])
def test_a_side_without_a_record_counts_nobody(
    tmp_path: Path, tiny_model: Path, unit: str | None
) -> None:
    """A refusal would tell whether one record is on its side alone."""
    records = load_records(file_of(tmp_path, ROWS[:1]), TASK, unit_column=unit)
    sides = hold_out(records, 0.1)
    assert sorted(map(len, sides)) == [0, 1]
    model = AdaptedModel.load(tiny_model, plan_for(tiny_model, TASK))
    empty = prepare(model, tiny_model, min(sides, key=len), LIMIT, cache=tmp_path)
    assert (len(empty), empty.unit_count) == (0, 0)
    counts = noisy_counts(model, empty, EXACT, NoiseSource(np.random.default_rng(1).bytes), LIMIT)
    assert (counts.score, counts.records) == pytest.approx((0, 0), abs=1e-6)


def prepared(
    folder: Path, plan: TrainingPlan, file: Path, **columns: Any
) -> tuple[AdaptedModel, PreparedData]:
    model = AdaptedModel.load(folder, plan)
    random = np.random.default_rng(0)
    model.set_vector(random.normal(0, 0.5, plan.lora.size).astype(np.float32))
    records = load_records(file, plan.task, **columns)
    data = prepare(model, folder, records, LIMIT, cache=None)
    return model, data


def test_counts_are_those_of_the_model(tmp_path: Path, tiny_model: Path) -> None:
    plan = plan_for(tiny_model, TASK)
    model, data = prepared(tiny_model, plan, file_of(tmp_path, ROWS))
    counts = noisy_counts(model, data, EXACT, NoiseSource(np.random.default_rng(1).bytes), LIMIT)
    right = int((predicted_labels(model, data, BatchLimit(32)) == data.labels).sum())
    assert (counts.score, counts.records) == pytest.approx((right, 300), abs=1e-6)


def test_a_unit_counts_once(tmp_path: Path, tiny_model: Path) -> None:
    plan = plan_for(tiny_model, TASK)
    path = file_of(tmp_path, ROWS)
    model, data = prepared(tiny_model, plan, path, unit_column="patient")
    counts = noisy_counts(model, data, EXACT, NoiseSource(np.random.default_rng(1).bytes), LIMIT)
    right = predicted_labels(model, data, BatchLimit(32)) == data.labels
    wanted = right.reshape(100, 3).mean(1).sum()
    assert (counts.score, counts.records) == pytest.approx((wanted, 100), abs=1e-4)


def test_a_language_models_losses_are_clipped(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "llama")
    plan = plan_for(folder, CausalLm(max_tokens=64))
    rows = [{"prompt": "a", "completion": "b" * n} for n in range(1, 9)]
    model, data = prepared(folder, plan, file_of(tmp_path, rows))
    low = FederatedEvaluation(noise_multiplier=1e-9, max_records=1000, largest_loss=0.01)
    counts = noisy_counts(model, data, low, NoiseSource(np.random.default_rng(1).bytes), LIMIT)
    assert counts.score == pytest.approx(8, abs=1e-6)
    counts = noisy_counts(model, data, EXACT, NoiseSource(np.random.default_rng(1).bytes), LIMIT)
    assert 0.5 < counts.score * 10 / 8 < 12  # nats


def test_noise_has_the_scale_that_is_charged(tmp_path: Path, tiny_model: Path) -> None:
    plan = plan_for(tiny_model, TASK)
    model, data = prepared(tiny_model, plan, file_of(tmp_path, ROWS[:4]))
    noise = NoiseSource(np.random.default_rng(1).bytes)
    loud = FederatedEvaluation(noise_multiplier=3.0, max_records=1000)
    found = np.array(
        [
            (counts.score, counts.records)
            for counts in (noisy_counts(model, data, loud, noise, LIMIT) for _ in range(400))
        ]
    )
    assert found.std(0) == pytest.approx(3 * 2**0.5, rel=0.12)
    assert found[:, 1].mean() == pytest.approx(4, abs=1.0)


def test_the_plans_epsilon_covers_training_and_counts(tiny_model: Path) -> None:
    evaluation = FederatedEvaluation(noise_multiplier=20.0, max_records=1000)
    training = one_round(800, steps=10)
    plan = plan_for(tiny_model, TASK, training=training)
    both = plan_for(tiny_model, TASK, training=training, evaluation=evaluation)
    alone, beside = noise_for(plan, 8000), noise_for(both, 8000)
    assert alone.noise_multiplier is not None
    assert beside.noise_multiplier is not None
    assert beside.noise_multiplier > alone.noise_multiplier
    events = [DpEvent(beside.noise_multiplier, beside.sampling_rate, 10), DpEvent(20.0, 1.0, 1)]
    spent = epsilon(events, 1e-5)
    assert 7.9 < spent <= 8.0
    assert calibrate(8.0, 1e-5, 1.0, 30, DpEvent(20.0, 1.0, 6)) > calibrate(8.0, 1e-5, 1.0, 30)
