"""How far an adapter can be from its initial value."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec
import numpy as np
import pytest
from support.distributed import distributed

from umbel_common.adapters.reach import (
    largest_change,
    largest_steps,
    longest_step,
    require_reachable,
)
from umbel_common.adapters.server_step import ServerState, take_step
from umbel_common.adapters.vector import Vector, initial_vector, merge, unflatten
from umbel_common.errors import PlanError, RemoteProtocolError
from umbel_common.plans.check import check_plan
from umbel_common.plans.largest_sum import largest_sum, noise_in_sum
from umbel_common.plans.plan import Aggregation, TrainingPlan
from umbel_common.plans.server_optimizer import (
    Average,
    Schedule,
    ServerAdam,
    ServerOptimizer,
    ServerSgd,
    ServerYogi,
)

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


L = 0.9
"""Largest change of an element in a round: three steps of 0.3."""
RATES: dict[str, Any] = {
    "adapter_learning_rate": 0.5,
    "head_learning_rate": 2.0,
    "schedule": Schedule(warmup_rounds=1, final=0.25),
}
SITES = 4


def with_server(
    make_plan2: MakePlan, server: ServerOptimizer, method: str = "both", **parts: object
) -> TrainingPlan:
    parts = {"aggregation": Aggregation(threshold=2, clip_range=RANGE, step=0.3), **parts}
    plan = make_plan2(server=server, method=method, **parts)
    training = msgspec.structs.replace(plan.training, rounds=8)
    return msgspec.structs.replace(plan, training=training)


def moved_by(
    plan: TrainingPlan, changes: Callable[[int], float], rounds: int, weight: int = 2
) -> Vector:
    """The adapter after rounds whose sums have one value, a share of the largest, everywhere.

    Args:
        changes: from the number of a round to that share, between -1 and 1.
    """
    adapter, state = initial_vector(plan), ServerState()
    most = largest_sum(plan, weight=weight, sites=weight)
    for number in range(1, rounds + 1):
        size = sum(tensor.size for tensor in plan.trained_tensors(number))
        total = np.full(size, round(most * changes(number)), dtype=np.int32)
        take_step(plan, number, total, weight, adapter, state)
    return adapter


def share_of_reach(plan: TrainingPlan, vector: Vector, rounds: int) -> float:
    """How much of the allowed way an adapter has gone, in the tensor where it is the most."""
    start = unflatten(initial_vector(plan), plan.lora.tensors)
    shares = []
    for tensor in plan.lora.tensors:
        way = np.abs(unflatten(vector, plan.lora.tensors)[tensor.name] - start[tensor.name]).max()
        most = sum(islice(largest_steps(plan, tensor.role, SITES), rounds))
        shares.append(float(way) / most if most else 0.0)
    return max(shares)


ADAM = {"eps": 1e-6}
SERVERS: dict[str, tuple[ServerOptimizer, float]] = {
    "average": (Average(), 1.0),
    "sgd": (ServerSgd(**RATES, momentum=0.0), 1.0),
    "momentum": (ServerSgd(**RATES, momentum=0.9), 1.0),
    "nesterov": (ServerSgd(**RATES, momentum=0.9, nesterov=True), 1.0),
    # With equal betas a lasting change makes every step as long as a step can be.
    "adam": (ServerAdam(**RATES, **ADAM, beta1=0.9, beta2=0.9), 1.0),
    # Whatever they are, the first step is.
    "adam as usual": (ServerAdam(**RATES, **ADAM), 0.4),
    "yogi": (ServerYogi(**RATES, **ADAM), 0.4),
}


@pytest.mark.parametrize("mode", ["local", "distributed"])
@pytest.mark.parametrize("method", ["both", "ffa", "alternate"])
@pytest.mark.parametrize("name", SERVERS)
def test_the_largest_sums_of_every_round_are_reachable_under_each_optimizer(
    make_plan2: MakePlan, name: str, method: str, mode: str
) -> None:
    server, least = SERVERS[name]
    plan = with_server(make_plan2, server, method)
    plan = distributed(plan) if mode == "distributed" else plan
    # There the sum is one of gradients: the adapter moves against it.
    way = -1 if mode == "distributed" else 1
    for sign in (1, -1):
        for rounds in (1, 2, 7):
            vector = moved_by(plan, lambda _, sign=sign: sign, rounds, weight=SITES)
            require_reachable(plan, rounds, vector, sites=SITES)
            share = share_of_reach(plan, vector, rounds)
            assert share == pytest.approx(1.0, rel=1e-4) or (rounds > 1 and share > least - 0.01)
            for tensor in plan.trained_tensors(rounds):
                far = vector.copy()
                bound = sum(islice(largest_steps(plan, tensor.role, SITES), rounds))
                values = unflatten(far, plan.lora.tensors)[tensor.name]
                values += np.float32(way * sign * 1.001 * bound)
                with pytest.raises(RemoteProtocolError, match="further from its initial"):
                    require_reachable(plan, rounds, far, sites=SITES)


@pytest.mark.parametrize(
    ("server", "least"),
    [
        (ServerAdam(**RATES, **ADAM), 0.99),
        (ServerAdam(**RATES, **ADAM, beta1=0.5, beta2=0.6), 0.99),
        (ServerAdam(**RATES, **ADAM, beta1=0.95, beta2=0.5), 0.99),
        (ServerYogi(**RATES, **ADAM), 0.5),
        (ServerYogi(**RATES, **ADAM, beta1=0.01), 0.85),
    ],
)
def test_the_worst_changes_make_a_step_as_long_as_the_bound_of_one_step(
    make_plan2: MakePlan, server: ServerAdam | ServerYogi, least: float
) -> None:
    """With changes that grow by beta1 / beta2 towards the last one, or fall, the inequality of
    Cauchy and Schwarz holds with equality."""
    plan = with_server(
        make_plan2, server, aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-7)
    )
    rounds = 8
    growth = server.beta1 / server.beta2
    changes = [growth ** (rounds - number) for number in range(1, rounds + 1)]
    changes = [change / max(changes) for change in changes]
    before = moved_by(plan, lambda number: changes[number - 1], rounds - 1)
    after = moved_by(plan, lambda number: changes[number - 1], rounds)
    step = float((after - before)[-1])
    bound = list(islice(largest_steps(plan, "head", SITES), rounds))[-1]
    assert least * bound < step < bound * (1 + 1e-4)


@pytest.mark.parametrize(
    "server",
    [ServerAdam(**RATES, beta2=5e-324), ServerAdam(**RATES, beta2=1e-160)],
    ids=["in the second round", "later"],
)
def test_a_bound_that_overflows_is_no_smaller_than_the_longest_step(
    make_plan2: MakePlan, server: ServerAdam
) -> None:
    """A NaN in its place is passed over by `max`: a policy would allow steps of any length."""
    plan = with_server(make_plan2, server)
    rounds = plan.training.rounds
    assert rounds > 2

    def fading(number: int) -> float:
        return 1.0 if number == 1 else 0.0

    before, after = (moved_by(plan, fading, number) for number in (1, 2))
    found = float((after - before)[-1])
    assert found > 1e4
    assert longest_step(plan) > found
    require_reachable(plan, 2, after, sites=SITES)


@pytest.mark.parametrize("mode", ["local", "distributed"])
@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("seed", range(3))
def test_no_sums_lead_past_the_bound(make_plan2: MakePlan, name: str, seed: int, mode: str) -> None:
    plan = with_server(make_plan2, SERVERS[name][0])
    plan = distributed(plan) if mode == "distributed" else plan
    generator = np.random.default_rng(seed)
    # Sums from nothing to the largest: short ones make long steps of adam and yogi.
    shares = 10.0 ** generator.uniform(-4, 0, 20) * generator.choice([-1, 1, 1, 1], 20)
    for rounds in range(1, 9):
        vector = moved_by(plan, lambda number: float(shares[number]), rounds, weight=SITES)
        require_reachable(plan, rounds, vector, sites=SITES)


def test_a_larger_cohort_reaches_further_in_distributed_mode_alone(make_plan2: MakePlan) -> None:
    local = with_server(make_plan2, ServerSgd(**RATES))
    shared = distributed(local)
    assert largest_change(local, 3) == largest_change(local, 30) == pytest.approx(L)
    assert largest_change(shared, 30) > 3 * largest_change(shared, 3)
    # Each site's clipped sum, and the noise that comes after it.
    steps = 3 * 3 + noise_in_sum(shared, 3)
    assert noise_in_sum(shared, 3) > 3 * 16
    assert largest_change(shared, 3) == pytest.approx(steps * 0.3 / 8)


def test_what_a_policy_bounds_grows_with_all_that_a_site_may_send(make_plan2: MakePlan) -> None:
    """Otherwise an operator asks for a short clip norm and a long range, or much noise, and shows
    sites an adapter with weights in the millions, which the sums of such a plan could lead to."""
    server = ServerSgd(adapter_learning_rate=1.0, momentum=0.0)
    plan = distributed(with_server(make_plan2, server))
    batch = plan.training.expected_batch_size

    def with_sums(clip_range: float, step: float) -> TrainingPlan:
        aggregation = msgspec.structs.replace(plan.aggregation, clip_range=clip_range, step=step)
        return msgspec.structs.replace(plan, aggregation=aggregation)

    # One site with the whole batch, and noise of at most as much: as by the clip norm.
    assert longest_step(with_sums(batch, batch / 16)) == 1.0
    assert longest_step(with_sums(10 * batch, 0.1)) == 10.0
    assert longest_step(with_sums(batch, batch)) == 16.0
    for clip_range, step in ((1e6, 1.0), (1.0, 1e-3), (1e4, 1e4)):
        wide = with_sums(clip_range, step)
        assert largest_change(wide, 3) < 3 * (1 + 13 * 3) * longest_step(wide)
