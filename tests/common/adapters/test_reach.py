"""How far an adapter can be from its initial value."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from umbel_common.adapters.reach import require_reachable
from umbel_common.adapters.vector import Vector, initial_vector, merge, unflatten
from umbel_common.errors import PlanError, RemoteProtocolError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import Aggregation, TrainingPlan

MakePlan = Callable[..., TrainingPlan]
RANGE = 0.7
"""No multiple of the step: rounding may go up to the next level."""


def plan_of(make_plan: MakePlan, method: str = "both") -> TrainingPlan:
    plan = make_plan(aggregation=Aggregation(threshold=2, clip_range=RANGE, step=0.3))
    lora = msgspec.structs.replace(plan.lora, method=method)
    return msgspec.structs.replace(plan, lora=lora)


def trained(plan: TrainingPlan, rounds: int, change: float) -> Vector:
    vector = initial_vector(plan)
    for number in range(1, rounds + 1):
        size = sum(tensor.size for tensor in plan.trained_tensors(number))
        vector = merge(vector, np.full(size, change, dtype=np.float32), plan, number)
    return vector


@pytest.mark.parametrize("method", ["both", "ffa", "alternate"])
@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_deltas_of_every_round_are_reachable_and_hardly_more(
    make_plan: MakePlan, method: str, rounds: int, sign: int
) -> None:
    plan = plan_of(make_plan, method)
    require_reachable(plan, rounds, trained(plan, rounds, sign * 0.9))
    for tensor in plan.lora.tensors:
        vector = trained(plan, rounds, sign * 0.9)
        unflatten(vector, plan.lora.tensors)[tensor.name].ravel()[-1] += sign * 1e-3
        with pytest.raises(RemoteProtocolError) as caught:
            require_reachable(plan, rounds, vector)
        assert caught.value.check == "adapter-too-far"
        assert caught.value.field == tensor.name


def test_the_tensors_that_a_method_freezes_stay_as_they_were(make_plan: MakePlan) -> None:
    plan = plan_of(make_plan, "ffa")
    vector = trained(plan, 3, 0.1)
    frozen = next(tensor.name for tensor in plan.lora.tensors if tensor.role == "lora_A")
    unflatten(vector, plan.lora.tensors)[frozen][...] += 1e-3
    with pytest.raises(RemoteProtocolError, match="further from its initial value"):
        require_reachable(plan, 3, vector)


def test_no_step_lets_an_adapter_move_by_far_more_than_the_clip_range(make_plan: MakePlan) -> None:
    """A policy bounds the clip range. Rounded to whole steps, one of a million is reachable."""
    far = make_plan(aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e6))
    require_reachable(far, 1, trained(far, 1, 1e6))
    with pytest.raises(PlanError, match="step is longer than the clip range"):
        check_plan(far)
    check_plan(make_plan(aggregation=Aggregation(threshold=2, clip_range=1.0, step=1.0)))
