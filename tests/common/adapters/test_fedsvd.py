"""FedSVD: products divided again, with their state, and what a verifier requires of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.distributed import distributed

from umbel_common.adapters import fedsvd
from umbel_common.adapters.reach import largest_steps, require_reachable
from umbel_common.adapters.server_step import ServerState, take_step
from umbel_common.adapters.vector import Vector, initial_vector, unflatten
from umbel_common.errors import PlanError, RemoteProtocolError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import (
    Aggregation,
    Tensor,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.server_optimizer import (
    Average,
    Schedule,
    ServerAdam,
    ServerOptimizer,
    ServerSgd,
    ServerYogi,
)
from umbel_common.plans.start import ReleasedStart

MakePlan = Callable[..., TrainingPlan]
A, B = "x.lora_A.weight", "x.lora_B.weight"
TENSORS = (
    Tensor(name=A, shape=(4, 9), role="lora_A"),
    Tensor(name=B, shape=(7, 4), role="lora_B"),
    Tensor(name="head.weight", shape=(3, 6), role="head"),
)
RATES: dict[str, Any] = {
    "adapter_learning_rate": 0.5,
    "head_learning_rate": 1.0,
    "schedule": Schedule(final=0.5),
}
SERVERS: dict[str, ServerOptimizer] = {
    "average": Average(),
    "sgd": ServerSgd(**RATES),
    "nesterov": ServerSgd(**RATES, momentum=0.8, nesterov=True),
    "adam": ServerAdam(**RATES, eps=1e-6),
    "yogi": ServerYogi(**RATES, eps=1e-6),
}
ROUNDS = 10


def plan_of(
    make_plan2: MakePlan, server: ServerOptimizer, method: str = "fedsvd", mode: str = "local"
) -> TrainingPlan:
    aggregation = Aggregation(threshold=2, clip_range=1.0, step=1e-4)
    plan = make_plan2(server=server, method=method, aggregation=aggregation)
    if mode == "distributed":
        plan = distributed(plan)
    training = msgspec.structs.replace(plan.training, rounds=ROUNDS)
    lora = msgspec.structs.replace(plan.lora, rank=4, tensors=TENSORS)
    return msgspec.structs.replace(plan, lora=lora, training=training)


def sums(plan: TrainingPlan, largest: int = 10_000) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(3)
    size = sum(tensor.size for tensor in plan.trained_tensors(1))
    return [generator.integers(-largest, largest, size).astype(np.int32) for _ in range(ROUNDS)]


def parts(plan: TrainingPlan, vector: Vector) -> dict[str, np.ndarray[Any, Any]]:
    values = unflatten(vector, plan.lora.tensors)
    return {name: value.astype(np.float64) for name, value in values.items()}


def run(plan: TrainingPlan, totals: list[np.ndarray[Any, Any]], weight: int = 3) -> list[Vector]:
    """The releases of a job with these sums."""
    adapter, state = initial_vector(plan), ServerState()
    found = [adapter.copy()]
    for number, total in enumerate(totals, start=1):
        take_step(plan, number, total, weight, adapter, state)
        if plan.lora.method == "fedsvd":
            fedsvd.refactorise(plan, adapter, state)
        found.append(adapter.copy())
    return found


@pytest.mark.parametrize("mode", ["local", "distributed"])
@pytest.mark.parametrize("name", ["average", "sgd", "nesterov"])
def test_gradient_descent_gives_the_products_of_ffa(
    make_plan2: MakePlan, name: str, mode: str
) -> None:
    """The sites' gradients turn with A: here each sum is turned as a site's gradient would be."""
    plan = plan_of(make_plan2, SERVERS[name], mode=mode)
    ffa = plan_of(make_plan2, SERVERS[name], "ffa", mode)
    totals = sums(plan)
    fixed = run(ffa, totals)
    adapter, state = initial_vector(plan), ServerState()
    first = parts(plan, adapter)[A]
    for number, total in enumerate(totals, start=1):
        turned = total.astype(np.float64)
        size = TENSORS[1].size
        rotation = parts(plan, adapter)[A] @ first.T
        turned[:size] = (turned[:size].reshape(7, 4) @ rotation.T).reshape(-1)
        take_step(plan, number, turned, 3, adapter, state)  # type: ignore[arg-type]  # not rounded
        fedsvd.refactorise(plan, adapter, state)
        found, expected = parts(plan, adapter), parts(ffa, fixed[number])
        np.testing.assert_allclose(found[B] @ found[A], expected[B] @ expected[A], atol=2e-5)
        np.testing.assert_array_equal(found["head.weight"], expected["head.weight"])
        np.testing.assert_allclose(found[A] @ found[A].T, np.eye(4), atol=1e-6)
        assert not np.allclose(found[A], first)


def test_the_columns_of_b_are_sorted_and_the_sign_is_chosen(make_plan2: MakePlan) -> None:
    plan = plan_of(make_plan2, Average())
    for vector in run(plan, sums(plan))[1:]:
        found = parts(plan, vector)
        lengths = np.linalg.norm(found[B], axis=0)
        assert list(lengths) == sorted(lengths, reverse=True)
        gram = found[B].T @ found[B]
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5 * gram.max())
        rows = found[A]
        assert (rows[np.arange(4), np.abs(rows).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_product_of_lower_rank_is_divided_too(make_plan2: MakePlan, rank: int) -> None:
    plan = plan_of(make_plan2, Average())
    adapter, state = initial_vector(plan), ServerState()
    values = unflatten(adapter, plan.lora.tensors)
    generator = np.random.default_rng(5)
    values[B][...] = generator.normal(size=(7, rank)) @ generator.normal(size=(rank, 4))
    before = parts(plan, adapter)
    moved = adapter.copy()
    fedsvd.refactorise(plan, adapter, state)
    found = parts(plan, adapter)
    np.testing.assert_allclose(found[B] @ found[A], before[B] @ before[A], atol=1e-6)
    np.testing.assert_allclose(found[A] @ found[A].T, np.eye(4), atol=1e-6)
    assert np.linalg.matrix_rank(found[B], tol=1e-5) == rank
    if rank == 0:
        # Before anything is learnt, A is as it was released.
        np.testing.assert_array_equal(adapter, moved)
    fedsvd.require_refactorised(plan, moved, adapter)


@pytest.mark.parametrize("name", SERVERS)
def test_a_verifier_carries_the_same_state(make_plan2: MakePlan, name: str) -> None:
    plan = plan_of(make_plan2, SERVERS[name])
    adapter, state, other = initial_vector(plan), ServerState(), ServerState()
    for number, total in enumerate(sums(plan), start=1):
        before, moved = adapter.copy(), adapter.copy()
        take_step(plan, number, total, 3, adapter, state)
        fedsvd.refactorise(plan, adapter, state)
        take_step(plan, number, total, 3, moved, other)
        fedsvd.require_refactorised(plan, moved, adapter)
        fedsvd.carry_state(plan, before, adapter, other)
        assert other.steps == state.steps
        assert other.moments.keys() == state.moments.keys()
        for kind, named in state.moments.items():
            for tensor, values in named.items():
                np.testing.assert_array_equal(other.moments[kind][tensor], values)
    assert ("lora_B" in state.steps) == (name not in ("adam", "yogi"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values[B].__imul__(1.001), "its product is not the one"),
        (lambda values: values[A].__imul__(1.001), "not orthonormal"),
        (lambda values: values["head.weight"].__iadd__(1e-3), "the sum moves it elsewhere"),
    ],
)
def test_an_adapter_that_does_not_follow_is_found(
    make_plan2: MakePlan, change: Callable[[dict[str, Vector]], object], message: str
) -> None:
    plan = plan_of(make_plan2, Average())
    adapter, state = initial_vector(plan), ServerState()
    take_step(plan, 1, sums(plan)[0], 3, adapter, state)
    moved = adapter.copy()
    fedsvd.refactorise(plan, adapter, state)
    fedsvd.require_refactorised(plan, moved, adapter)
    change(unflatten(adapter, plan.lora.tensors))
    with pytest.raises(RemoteProtocolError, match=message):
        fedsvd.require_refactorised(plan, moved, adapter)


def drifts(followed: fedsvd.SummedProducts, *releases: Vector) -> bool:
    """Whether a release is found not to be what all rounds together give."""
    try:
        followed.require_near(*releases)
    except RemoteProtocolError as error:
        return "drifts from what the sums of all rounds give" in error.message
    return False


@pytest.mark.parametrize("share", [0.0, 0.09, 0.99], ids=["honest", "a tenth", "all of it"])
def test_what_the_tolerance_leaves_does_not_add_up(make_plan2: MakePlan, share: float) -> None:
    """An operator moves each product as far as the tolerance of a round lets it, in one direction.

    After 100 rounds the figure of the pages is reached, and each round by itself passes.
    """
    plan = plan_of(make_plan2, Average())
    training = msgspec.structs.replace(plan.training, rounds=100)
    plan = msgspec.structs.replace(plan, training=training)
    adapter, state = initial_vector(plan), ServerState()
    followed, found_in = fedsvd.SummedProducts(plan, adapter), 0
    first = parts(plan, adapter)[A]
    way = np.random.default_rng(1).normal(size=(7, 4))
    way /= np.linalg.norm(way)
    total, given = sums(plan)[0], np.zeros((7, 9))
    for number in range(1, 101):
        before = adapter.copy()
        # Sites that send nothing after round 1 show the drift alone.
        take_step(plan, number, total if number == 1 else 0 * total, 3, adapter, state)
        moved = adapter.copy()
        fedsvd.refactorise(plan, adapter, state)
        if number == 1:
            given = parts(plan, moved)[B] @ parts(plan, moved)[A]
        drift = share * fedsvd.TOLERANCE * np.linalg.norm(given)
        values = unflatten(adapter, plan.lora.tensors)
        values[B][...] += (drift * (way @ first @ values[A].T.astype(np.float64))).astype("f4")
        fedsvd.require_refactorised(plan, moved, adapter)
        if drifts(followed, before, moved, adapter):
            found_in = found_in or number
    last = parts(plan, adapter)
    drifted = np.linalg.norm(last[B] @ last[A] - given) / np.linalg.norm(given)
    assert drifted == pytest.approx(100 * share * fedsvd.TOLERANCE, rel=0.01, abs=1e-6)
    # A tenth of it is what 100 rounds may differ by.
    assert found_in == {0.0: 0, 0.09: 0, 0.99: 2}[share]
    page = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    assert "0.01 % of the longest product after 100 rounds" in " ".join(page.split())


@pytest.mark.parametrize("mode", ["local", "distributed"])
@pytest.mark.parametrize("name", SERVERS)
def test_the_largest_sums_are_reachable_and_hardly_more(
    make_plan2: MakePlan, name: str, mode: str
) -> None:
    plan = plan_of(make_plan2, SERVERS[name], mode=mode)
    size = sum(tensor.size for tensor in plan.trained_tensors(1))
    most = 3 * 10_000
    # Each row of B the same: then the columns of B keep one direction, and all its length.
    releases = run(plan, [np.full(size, most, dtype=np.int32)] * ROUNDS)
    for number, vector in enumerate(releases):
        require_reachable(plan, number, vector, sites=3)
    bound = sum(one for one, _ in zip(largest_steps(plan, "lora_B", 3), range(1), strict=False))
    reached = float(np.linalg.norm(parts(plan, releases[1])[B]))
    far = releases[1].copy()
    if mode == "local":
        assert reached == pytest.approx(bound * np.sqrt(TENSORS[1].size), rel=1e-4)
    values = unflatten(far, plan.lora.tensors)
    values[B][...] *= 1.001 * bound * np.sqrt(TENSORS[1].size) / reached
    with pytest.raises(RemoteProtocolError, match="further from its initial value"):
        require_reachable(plan, 1, far, sites=3)


def test_no_other_subspace_and_no_longer_row_is_reachable(make_plan2: MakePlan) -> None:
    plan = plan_of(make_plan2, Average())
    vector = run(plan, sums(plan))[-1]
    require_reachable(plan, ROUNDS, vector)
    generator = np.random.default_rng(9)
    other = np.linalg.qr(generator.normal(size=(9, 4)))[0].T
    first = parts(plan, initial_vector(plan))[A]
    for rows in (other, 1.001 * first, np.concatenate([first[:3], first[:1]])):
        planted = vector.copy()
        unflatten(planted, plan.lora.tensors)[A][...] = rows
        with pytest.raises(RemoteProtocolError, match="not a rotation"):
            require_reachable(plan, ROUNDS, planted)


def test_a_plan_needs_orthonormal_rows_and_a_layer_larger_than_the_rank(
    make_plan2: MakePlan,
) -> None:
    plan = plan_of(make_plan2, Average())
    check_plan(plan)
    start = ReleasedStart(adapter=bytes(32), plan=bytes(32), round=1, largest_norm=1.0)
    narrow = (
        Tensor(name=A, shape=(4, 3), role="lora_A"),
        Tensor(name=B, shape=(7, 4), role="lora_B"),
    )
    for changed, message in (
        (second_version(plan, start=start), "needs a start"),
        (with_tensors(plan, narrow), "larger than a layer"),
        (with_tensors(plan, TENSORS[1:]), "both matrices"),
    ):
        with pytest.raises(PlanError, match=message):
            check_plan(changed)


def with_tensors(plan: TrainingPlan, tensors: tuple[Tensor, ...]) -> TrainingPlan:
    return msgspec.structs.replace(plan, lora=msgspec.structs.replace(plan.lora, tensors=tensors))
