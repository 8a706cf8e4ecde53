"""The adapter that a job starts from, as far as that needs no model."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from umbel_common.adapters.reach import require_reachable
from umbel_common.adapters.start import (
    LABEL_ROWS,
    norm_of,
    origin_of,
    require_start,
    start_from_rows,
)
from umbel_common.adapters.vector import (
    Vector,
    adapter_digest,
    initial_vector,
    merge,
    start_digest,
    unflatten,
)
from umbel_common.errors import PlanError, RemoteProtocolError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import CausalLm, Classification, TrainingPlan, second_version
from umbel_common.plans.plan_file import plan_from_json, plan_lines, plan_to_json
from umbel_common.plans.start import LabelNamesStart, ReleasedStart, Start

MakePlan = Callable[..., TrainingPlan]
NAMES = ("first", "second", "third")


def rows(scale: float = 2.0) -> Vector:
    found = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    found *= np.float32(scale) / np.linalg.norm(found, axis=1, keepdims=True)
    return found


def named(plan: TrainingPlan, vector: Vector) -> TrainingPlan:
    start = LabelNamesStart(tensor=start_digest(vector), names=NAMES, scale=2.0, tolerance=0.01)
    return second_version(plan, start=start)


def released(plan: TrainingPlan, vector: Vector) -> TrainingPlan:
    earlier = bytes(range(32))
    start = ReleasedStart(
        adapter=adapter_digest(earlier, vector),
        plan=earlier,
        round=3,
        largest_norm=norm_of(vector),
    )
    return second_version(plan, start=start)


def refusal(plan: TrainingPlan, vector: Vector) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        require_start(plan, vector)
    return caught.value.check


def test_each_start_is_taken_for_what_its_plan_says(make_plan: MakePlan) -> None:
    plan = make_plan()
    vector = start_from_rows(plan, rows())
    require_start(plan, initial_vector(plan))
    require_start(named(plan, vector), vector)
    require_start(released(plan, vector), vector)
    for started in (plan, named(plan, vector), released(plan, vector)):
        assert refusal(started, vector + np.float32(1e-3)) == "initial-adapter"


def test_a_head_at_its_labels_names_leaves_the_rest_to_the_seed(make_plan: MakePlan) -> None:
    plan = make_plan()
    for tensor in plan.lora.tensors:
        vector = start_from_rows(plan, rows())
        if tensor.name != LABEL_ROWS:
            unflatten(vector, plan.lora.tensors)[tensor.name].ravel()[-1] += 1e-3
            assert refusal(named(plan, vector), vector) == "initial-adapter"
    for scale in (1.999, 2.001):
        vector = start_from_rows(plan, rows(scale))
        assert refusal(named(plan, vector), vector) == "start-norm"


def test_an_earlier_adapter_is_no_longer_than_its_plan_says(make_plan: MakePlan) -> None:
    vector = start_from_rows(make_plan(), rows())
    plan = released(make_plan(), vector)
    shorter = msgspec.structs.replace(plan.start, largest_norm=norm_of(vector) * 0.999)
    assert refusal(second_version(plan, start=shorter), vector) == "start-norm"


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_reach_is_measured_from_what_a_site_knows_of_the_start(
    make_plan: MakePlan, rounds: int
) -> None:
    """Accepted is what rounds lead to from some start that the origin allows, and hardly more."""
    plan = make_plan()
    start = start_from_rows(plan, rows_off(0.02))
    moved = start
    for number in range(1, rounds + 1):
        # Away from zero, and so from the start.
        assert plan.trained_tensors(number) == plan.lora.tensors
        outwards = np.where(start < 0, -1, 1).astype(np.float32)
        moved = merge(moved, outwards, plan, number)
    exact = origin_of(plan, start)
    near = origin_of(plan, start_from_rows(plan, rows()), row_radius=0.0201)
    whole = origin_of(plan, np.zeros_like(start), radius=norm_of(start))
    for origin in (exact, near, whole):
        require_reachable(plan, rounds, moved, origin)
    further = moved.copy()
    head = unflatten(further, plan.lora.tensors)[LABEL_ROWS]
    head += 1e-3 * np.sign(head)
    for origin in (exact, near, whole):
        with pytest.raises(RemoteProtocolError) as caught:
            require_reachable(plan, rounds, further, origin)
        assert caught.value.check == "adapter-too-far"
    # Nothing but the rows may lie near theirs.
    further = moved.copy()
    unflatten(further, plan.lora.tensors)["head.bias"][0] += 1e-3
    with pytest.raises(RemoteProtocolError, match="further from its initial value"):
        require_reachable(plan, rounds, further, near)


def rows_off(distance: float) -> Vector:
    """Rows that lie further out than `rows`, each by this distance."""
    return rows(2.0 + distance)


@pytest.mark.parametrize("make", [named, released])
def test_a_plan_with_a_start_comes_back_from_its_file(
    make_plan: MakePlan, make: Callable[[TrainingPlan, Vector], TrainingPlan]
) -> None:
    plan = make(make_plan(), start_from_rows(make_plan(), rows()))
    text = plan_to_json(plan)
    assert plan_from_json(text, "plan.json") == (plan, None)
    for value in msgspec.structs.astuple(plan.start):
        if isinstance(value, bytes):
            assert f'"{value.hex()}"' in text


def test_people_read_what_a_job_starts_from(make_plan: MakePlan) -> None:
    def shown(plan: TrainingPlan) -> str:
        return "\n".join(f"{name}: {value}" for name, value in plan_lines(plan))

    plan, vector = make_plan(), start_from_rows(make_plan(), rows())
    assert "starts from" not in shown(plan)
    for part in ("starts from: the embeddings of these names", "length 2", "first; second; third"):
        assert part in shown(named(plan, vector))
    text = shown(released(plan, vector))
    assert "round 3 of an earlier job" in text
    assert f"its plan: {bytes(range(32)).hex()}" in text


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"task": CausalLm()}, "start"),
        ({"task": Classification(labels=("a", "b", "c"), head="stock")}, "start"),
        ({"task": Classification(labels=("a", "b"))}, "start.names"),
    ],
)
def test_only_a_mean_pool_head_starts_at_a_name_for_each_label(
    make_plan: MakePlan, parts: dict[str, object], field: str
) -> None:
    start: Start = LabelNamesStart(tensor=bytes(32), names=NAMES, scale=1.0, tolerance=0.01)
    check_plan(second_version(make_plan(), start=start))
    plan = make_plan(**parts)
    if isinstance(plan.task, CausalLm):
        tensors = tuple(one for one in plan.lora.tensors if one.role != "head")
        plan = msgspec.structs.replace(
            plan, lora=msgspec.structs.replace(plan.lora, tensors=tensors)
        )
    with pytest.raises(PlanError) as caught:
        check_plan(second_version(plan, start=start))
    assert caught.value.field == field
