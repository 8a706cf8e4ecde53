from collections.abc import Callable

import numpy as np
import pytest

from umbel_common.adapters.vector import (
    adapter_digest,
    flatten,
    from_bytes,
    initial_vector,
    merge,
    size_of,
    to_bytes,
    unflatten,
)
from umbel_common.errors import PlanError, RemoteProtocolError
from umbel_common.plans.plan import Lora, Tensor, TrainingPlan

MakePlan = Callable[..., TrainingPlan]


def with_method(make_plan: MakePlan, method: str, **changes: object) -> TrainingPlan:
    lora = make_plan().lora
    fields = {name: getattr(lora, name) for name in lora.__struct_fields__}
    return make_plan(lora=Lora(**{**fields, "method": method, **changes}))


def test_flattening_comes_back(make_plan: MakePlan) -> None:
    tensors = make_plan().lora.tensors
    vector = np.arange(size_of(tensors), dtype=np.float32)
    assert np.array_equal(flatten(unflatten(vector, tensors), tensors), vector)


def test_a_tensor_of_another_shape_is_named(make_plan: MakePlan) -> None:
    tensors = make_plan().lora.tensors
    values = unflatten(np.zeros(size_of(tensors), dtype=np.float32), tensors)
    values["head.bias"] = np.zeros(4, dtype=np.float32)
    with pytest.raises(PlanError, match=r"head\.bias"):
        flatten(values, tensors)
    del values["head.bias"]
    with pytest.raises(PlanError, match="missing"):
        flatten(values, tensors)


def test_the_initial_adapter_leaves_the_model_unchanged(make_plan: MakePlan) -> None:
    plan = make_plan()
    values = unflatten(initial_vector(plan), plan.lora.tensors)
    assert not values["base_model.model.layer.query.lora_B.weight"].any()
    assert not values["head.weight"].any()


@pytest.mark.parametrize("shape", [(2, 6), (6, 2), (8, 384), (5, 5)])
def test_A_starts_orthonormal_in_its_shorter_side(  # LoRA's name
    make_plan: MakePlan, shape: tuple[int, int]
) -> None:
    plan = with_method(
        make_plan, "both", tensors=(Tensor(name="x.lora_A.weight", shape=shape, role="lora_A"),)
    )
    A = unflatten(initial_vector(plan), plan.lora.tensors)["x.lora_A.weight"].astype(np.float64)
    gram = A @ A.T if shape[0] <= shape[1] else A.T @ A
    assert np.abs(gram - np.eye(min(shape))).max() < 1e-6


def test_the_initial_adapter_is_the_same_everywhere(make_plan: MakePlan) -> None:
    # With another digest here, sites of two versions would start from two adapters.
    vector = initial_vector(make_plan())
    assert adapter_digest(bytes(32), vector).hex() == PINNED
    assert not np.array_equal(vector, initial_vector(with_method(make_plan, "both", seed=8)))


PINNED = "121411990553f3f0d4bf7b1f401ff4ad383fc9822fd5eaa94e4f6016039cfc08"


def test_each_method_trains_what_it_says(make_plan: MakePlan) -> None:
    def roles(method: str, round_number: int) -> set[str]:
        plan = with_method(make_plan, method)
        return {tensor.role for tensor in plan.trained_tensors(round_number)}

    assert roles("both", 1) == {"lora_A", "lora_B", "head"}
    assert roles("ffa", 1) == roles("ffa", 2) == {"lora_B", "head"}
    assert roles("alternate", 1) == {"lora_B", "head"}
    assert roles("alternate", 2) == {"lora_A", "head"}


def test_a_delta_changes_what_its_round_trains_and_nothing_else(make_plan: MakePlan) -> None:
    plan = with_method(make_plan, "ffa")
    before = initial_vector(plan)
    delta = np.ones(size_of(plan.trained_tensors(1)), dtype=np.float32)
    changed = unflatten(merge(before, delta, plan, 1), plan.lora.tensors)
    start = unflatten(before, plan.lora.tensors)
    for tensor in plan.lora.tensors:
        expected = start[tensor.name] + (0 if tensor.role == "lora_A" else 1)
        assert np.array_equal(changed[tensor.name], expected)


def test_a_vector_travels_as_little_endian_float32() -> None:
    assert to_bytes(np.array([1.0], dtype=np.float32)) == b"\x00\x00\x80\x3f"
    assert from_bytes(b"\x00\x00\x80\x3f", 1)[0] == 1.0


@pytest.mark.parametrize(
    ("data", "check"),
    [
        (bytes(8), "adapter-length"),
        (np.array([np.nan], dtype="<f4").tobytes(), "adapter-values"),
        (np.array([np.inf], dtype="<f4").tobytes(), "adapter-values"),
    ],
)
def test_a_vector_of_wrong_length_or_values_is_refused(data: bytes, check: str) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        from_bytes(data, 1)
    assert refusal.value.check == check


def test_an_adapter_digest_depends_on_plan_and_values() -> None:
    one = np.ones(3, dtype=np.float32)
    assert adapter_digest(bytes(32), one) != adapter_digest(b"\x01" * 32, one)
    assert adapter_digest(bytes(32), one) != adapter_digest(bytes(32), 2 * one)
