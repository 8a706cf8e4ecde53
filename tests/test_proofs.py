"""What tests share of a self-test, and what makes it run again."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import proofs
from support.small_models import plan_for

from umbel_client.dpsgd import private_step
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.errors import ModelError
from umbel_common.plans.plan import Classification, LocalPrivacy, TrainingPlan

PRIVACY = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0)


class Counting:
    """Takes the place of the real test, keeps one number of rows, and counts its runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.fails = False

    def __call__(self, model: Any, noise: Any, limit: BatchLimit, *, entropy: Any) -> None:
        self.runs += 1
        if self.fails:
            raise ModelError("no")
        limit.keep({2})


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(proofs, "self_test", counting)
    monkeypatch.setattr(proofs, "_proofs", {})
    return counting


@pytest.fixture
def plan(tiny_model: Path) -> TrainingPlan:
    return plan_for(tiny_model, Classification(labels=("a", "b")), privacy=PRIVACY)


@pytest.fixture
def model(tiny_model: Path, plan: TrainingPlan) -> AdaptedModel:
    return AdaptedModel.load(tiny_model, plan)


def prove(model: AdaptedModel, noise: float = 1.0, records: int = 4, entropy: Any = None) -> Any:
    limit = BatchLimit(records)
    proofs.remembered_self_test(model, noise, limit, entropy=entropy or os.urandom)
    return limit.choices


def test_the_same_model_and_plan_are_tested_once(
    counting: Counting, tiny_model: Path, plan: TrainingPlan
) -> None:
    other_job = plan_for(tiny_model, plan.task, privacy=PRIVACY, job="other")
    for each in (plan, plan, other_job):
        assert prove(AdaptedModel.load(tiny_model, each)) == (2, 4)
    assert counting.runs == 1


def test_whatever_a_result_depends_on_is_tested_again(
    counting: Counting, model: AdaptedModel, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove(model)
    prove(model, noise=2.0)
    prove(model, records=8)
    prove(model, entropy=bytes)
    assert counting.runs == 4
    shorter = plan_for(tiny_model, Classification(labels=("a", "b"), max_tokens=32))
    prove(AdaptedModel.load(tiny_model, shorter))
    assert counting.runs == 5
    with monkeypatch.context() as patch:
        patch.setattr(private_step.PrivateOptimizer, "accumulate", lambda *_: None)
        prove(model)
    assert counting.runs == 6
    prove(model)
    assert counting.runs == 6
    next(model.base.parameters()).data += 1.0
    prove(model)
    assert counting.runs == 7


def test_what_no_key_names_is_tested_each_time(counting: Counting, model: AdaptedModel) -> None:
    numbers = iter(range(100))
    for _ in range(2):
        prove(model, entropy=lambda size: bytes([next(numbers)]) * size)
    assert counting.runs == 2
    model.base.register_forward_hook(lambda _, __, output: output)
    for _ in range(2):
        prove(model)
    assert counting.runs == 4


def test_a_rounds_adapter_is_tested_once_for_what_it_trains(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, ...]] = []

    def check(model: AdaptedModel, limit: BatchLimit, *, entropy: Any) -> None:
        runs.append(limit.choices)
        limit.keep({2})

    monkeypatch.setattr(proofs, "check_round", check)
    monkeypatch.setattr(proofs, "_proofs", {})
    for change in (0.0, 1.0):
        model.set_vector(model.vector() + np.float32(change))
        limit = BatchLimit(4)
        proofs.remembered_check_round(model, limit, entropy=os.urandom)
        assert limit.choices == (2, 4)
    assert len(runs) == 1
    proofs.remembered_check_round(model, limit, entropy=os.urandom)
    next(iter(model.adapter.values())).requires_grad_(False)
    proofs.remembered_check_round(model, limit, entropy=os.urandom)
    assert len(runs) == 3


def test_a_failure_is_not_remembered(counting: Counting, model: AdaptedModel) -> None:
    counting.fails = True
    for _ in range(2):
        with pytest.raises(ModelError):
            prove(model)
    assert counting.runs == 2
