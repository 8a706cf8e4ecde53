"""The server's step: the same as PyTorch's optimizers, as the papers' formulas, and exact."""

import math
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from umbel_common.adapters.server_step import (
    CHUNK,
    ServerState,
    add_scaled,
    change_scale,
    power,
    take_step,
)
from umbel_common.adapters.vector import Vector, initial_vector, unflatten
from umbel_common.plans.plan import (
    Aggregation,
    DistributedPrivacy,
    NoOptimizer,
    Tensor,
    TrainingPlan,
)
from umbel_common.plans.server_optimizer import (
    Average,
    Schedule,
    ServerAdam,
    ServerOptimizer,
    ServerSgd,
    ServerYogi,
)

MakePlan = Callable[..., TrainingPlan]
STEP = 1e-3
ROUNDS = 12
HEAD, ADAPTER = 0.3, 0.02
SCHEDULE = Schedule(warmup_rounds=2, decay="cosine", final=0.1)


def plan_of(make_plan2: MakePlan, server: ServerOptimizer, method: str = "both") -> TrainingPlan:
    plan = make_plan2(
        server=server,
        method=method,
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=STEP),
    )
    return with_rounds(plan, ROUNDS)


def with_rounds(plan: TrainingPlan, rounds: int) -> TrainingPlan:
    training = msgspec.structs.replace(plan.training, rounds=rounds)
    return msgspec.structs.replace(plan, training=training)


def sums(plan: TrainingPlan, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """A sum of three sites for each round, with zeros in it."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(1, plan.training.rounds + 1):
        size = sum(tensor.size for tensor in plan.trained_tensors(number))
        found.append(generator.integers(-900, 900, size).astype(np.int32) * (number % 5 > 0))
    return found


def stepped(plan: TrainingPlan, weight: int = 3) -> list[Vector]:
    """The adapter after each round."""
    adapter, state = initial_vector(plan), ServerState()
    found = []
    for number, total in enumerate(sums(plan), start=1):
        take_step(plan, number, total, weight, adapter, state)
        found.append(adapter.copy())
    return found


def by_torch(plan: TrainingPlan, make: Callable[[list[Any]], torch.optim.Optimizer]) -> Vector:
    """The adapter after the same rounds, with an optimizer of PyTorch in float64."""
    values = unflatten(initial_vector(plan), plan.lora.tensors)
    parameters = {
        name: torch.nn.Parameter(torch.from_numpy(value.astype(np.float64)))
        for name, value in values.items()
    }
    optimizer = make(
        [
            {
                "params": [
                    parameters[t.name] for t in plan.lora.tensors if (t.role == "head") is h
                ],
                "lr": HEAD if h else ADAPTER,
            }
            for h in (True, False)
        ]
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    server = plan.server
    assert not isinstance(server, Average)
    for number, total in enumerate(sums(plan), start=1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * server.schedule.factor(number, plan.training.rounds)
        position = 0
        optimizer.zero_grad(set_to_none=True)
        for tensor in plan.trained_tensors(number):
            part = total[position : position + tensor.size].astype(np.float64)
            position += tensor.size
            gradient = torch.from_numpy(-part * (STEP / 3)).reshape(tensor.shape)
            parameters[tensor.name].grad = gradient
        optimizer.step()
    last = [parameters[t.name].detach().numpy().reshape(-1) for t in plan.lora.tensors]
    return np.concatenate(last).astype(np.float32)


RATES: dict[str, Any] = {
    "adapter_learning_rate": ADAPTER,
    "head_learning_rate": HEAD,
    "schedule": SCHEDULE,
}


@pytest.mark.parametrize("method", ["both", "ffa", "alternate"])
@pytest.mark.parametrize(
    ("server", "make"),
    [
        (ServerSgd(**RATES, momentum=0.0), lambda groups: torch.optim.SGD(groups)),
        (ServerSgd(**RATES), lambda groups: torch.optim.SGD(groups, momentum=0.9)),
        (
            ServerSgd(**RATES, momentum=0.8, nesterov=True),
            lambda groups: torch.optim.SGD(groups, momentum=0.8, nesterov=True),
        ),
        (
            ServerAdam(**RATES, eps=1e-3),
            lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-3),
        ),
    ],
    ids=["sgd", "momentum", "nesterov", "adam"],
)
def test_a_job_moves_the_adapter_as_pytorch_does(
    make_plan2: MakePlan, method: str, server: ServerOptimizer, make: Any
) -> None:
    plan = plan_of(make_plan2, server, method)
    found = stepped(plan)[-1]
    expected = by_torch(plan, make)
    assert np.abs(found - initial_vector(plan)).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def yogi(plan: TrainingPlan, server: ServerYogi, tensor: Tensor) -> tuple[list[float], int]:
    """The first element of a tensor after each round, by the formulas of Reddi et al. 2021,
    algorithm 2, with the corrections of Adam, in exact fractions but for the root; and in how many
    rounds the second moment fell."""
    beta1, beta2 = Fraction(server.beta1), Fraction(server.beta2)
    m, v = Fraction(0), Fraction(0)
    x = float(unflatten(initial_vector(plan), plan.lora.tensors)[tensor.name].reshape(-1)[0])
    found, count, falls = [], 0, 0
    for number, total in enumerate(sums(plan), start=1):
        position = 0
        for other in plan.trained_tensors(number):
            if other == tensor:
                change = Fraction(int(total[position])) * Fraction(STEP) / 3
                count += 1
                m = beta1 * m + (1 - beta1) * change
                sign = (v > change**2) - (v < change**2)
                falls += sign > 0 and change != 0
                v = v - (1 - beta2) * change**2 * sign
                first, second = m / (1 - beta1**count), v / (1 - beta2**count)
                rate = server.learning_rate(
                    head=tensor.role == "head", round_number=number, rounds=ROUNDS
                )
                x += rate * float(first) / (math.sqrt(second) + server.eps)
            position += other.size
        found.append(x)
    return found, falls


@pytest.mark.parametrize("method", ["both", "alternate"])
def test_yogi_is_that_of_its_paper(make_plan2: MakePlan, method: str) -> None:
    server = ServerYogi(**RATES, beta2=0.6, eps=1e-3)
    plan = plan_of(make_plan2, server, method)
    adapters = stepped(plan)
    for tensor in plan.lora.tensors:
        found = [
            float(unflatten(vector, plan.lora.tensors)[tensor.name].reshape(-1)[0])
            for vector in adapters
        ]
        expected, falls = yogi(plan, server, tensor)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert falls > 0


@pytest.mark.parametrize("method", ["both", "ffa", "alternate", "fedsvd"])
@pytest.mark.parametrize(
    "server",
    [Average(), ServerSgd(**RATES), ServerAdam(**RATES), ServerYogi(**RATES)],
    ids=["average", "sgd", "adam", "yogi"],
)
def test_only_the_tensors_of_a_round_move_and_count_a_step(
    make_plan2: MakePlan, method: str, server: ServerOptimizer
) -> None:
    plan = plan_of(make_plan2, server, method)
    adapter, state = initial_vector(plan), ServerState()
    for number, total in enumerate(sums(plan)[:4], start=1):
        before, known = adapter.copy(), state.copy()
        take_step(plan, number, total, 3, adapter, state)
        trained = plan.trained_tensors(number)
        old = unflatten(before, plan.lora.tensors)
        for name, values in unflatten(adapter, plan.lora.tensors).items():
            moved = name in {tensor.name for tensor in trained}
            assert np.any(values != old[name]) == moved
            for kind, named in state.moments.items():
                if name in named:
                    former = known.moments.get(kind, {}).get(name)
                    assert (former is None or np.any(former != named[name])) == moved
        for role in ("lora_A", "lora_B", "head"):
            steps = state.steps.get(role, 0) - known.steps.get(role, 0)
            assert steps == any(tensor.role == role for tensor in trained)


@pytest.mark.parametrize(
    "server", [ServerSgd(**RATES), ServerAdam(**RATES), ServerYogi(**RATES), Average()]
)
def test_a_step_has_the_same_bits_however_it_is_cut(
    make_plan2: MakePlan, server: ServerOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(make_plan2, server)
    whole = stepped(plan)
    for chunk in (1, 5):
        monkeypatch.setattr("umbel_common.adapters.server_step.CHUNK", chunk)
        assert all(map(np.array_equal, whole, stepped(plan)))


def test_the_average_is_the_mean_in_float32() -> None:
    """Bit for bit what jobs under plans of version 1 released."""
    generator = np.random.default_rng(1)
    total = generator.integers(-(2**30), 2**30, CHUNK + 3).astype(np.int32)
    start = generator.normal(size=total.size).astype(np.float32)
    target = start.copy()
    add_scaled(total, 1e-6 / 7, [target])
    mean = (total * np.float64(1e-6 / 7)).astype(np.float32)
    assert np.array_equal(target, start + mean)


def test_in_distributed_mode_the_change_is_minus_the_sum_over_a_public_number(
    make_plan2: MakePlan,
) -> None:
    plan = distributed(make_plan2, ServerSgd(adapter_learning_rate=2.0, momentum=0.0))
    adapter, state = initial_vector(plan), ServerState()
    start = adapter.copy()
    total = np.arange(plan.lora.size, dtype=np.int32)
    for weight in (2, 3):
        # Whoever takes part, the sum is divided by the same number.
        assert change_scale(plan, weight) == -(STEP / 8)
    take_step(plan, 1, total, 3, adapter, state)
    np.testing.assert_allclose(adapter, start - 2.0 * total * STEP / 8, rtol=1e-6)


def distributed(make_plan2: MakePlan, server: ServerOptimizer) -> TrainingPlan:
    plan = make_plan2(
        server=server,
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=STEP),
        privacy=DistributedPrivacy(
            epsilon=8.0,
            delta=1e-5,
            clip_norm=1.0,
            sampling_rate=0.1,
            noise_bits=8,
            honest=2,
            least_survivors=2,
            most_attempts=10,
        ),
    )
    training = msgspec.structs.replace(plan.training, local_steps=1, optimizer=NoOptimizer())
    return msgspec.structs.replace(plan, training=training)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_a_schedule_rises_to_one_and_falls_to_its_end(decay: Any, warmup: int) -> None:
    schedule = Schedule(warmup_rounds=warmup, decay=decay, final=0.2)
    factors = [schedule.factor(number, 10) for number in range(1, 11)]
    assert factors[:warmup] == [(number + 1) / (warmup + 1) for number in range(warmup)]
    assert factors[warmup] == 1.0
    assert factors[-1] == pytest.approx(0.2)
    later = factors[warmup:]
    assert later == sorted(later, reverse=True)
    middle = (len(later) - 1) / 2
    if middle.is_integer():
        assert later[int(middle)] == pytest.approx(0.6)
    assert Schedule(warmup_rounds=warmup).factor(10, 10) == 1.0
    assert schedule.factor(warmup + 1, warmup + 1) == 1.0


def test_a_cosine_is_the_nearest_number() -> None:
    for done in range(33):
        factor = Schedule(decay="cosine", final=1e-9).factor(done + 1, 33)
        exact = 1e-9 + (1 - 1e-9) * (1 + math.cos(math.pi * done / 32)) / 2
        assert factor == pytest.approx(exact, rel=1e-14, abs=1e-16)


def test_a_power_is_a_product() -> None:
    assert power(0.9, 0) == 1.0
    assert power(0.9, 2) == 0.9 * 0.9
    assert power(0.99, 500) == pytest.approx(0.99**500, rel=1e-12)


@pytest.mark.parametrize(
    ("server", "longer"),
    [(ServerSgd(adapter_learning_rate=0.1), 100), (ServerAdam(adapter_learning_rate=0.1), 1)],
    ids=["sgd", "adam"],
)
def test_a_step_of_adam_is_as_long_whatever_the_noise(
    make_plan2: MakePlan, server: ServerOptimizer, longer: float
) -> None:
    """docs/operator.md says so of changes that are pure noise."""
    tensors = (Tensor(name="x.lora_A.weight", shape=(2, 5000), role="lora_A"),)
    plan = plan_of(make_plan2, server)
    lora = msgspec.structs.replace(plan.lora, tensors=tensors)
    plan = msgspec.structs.replace(plan, lora=lora)
    lengths = []
    for deviation in (1e-3, 1e-1):
        generator = np.random.default_rng(4)
        adapter, state = np.zeros(plan.lora.size, np.float32), ServerState()
        for number in range(1, ROUNDS + 1):
            before = adapter.copy()
            noise = generator.normal(0, deviation / STEP * 1000, plan.lora.size)
            take_step(plan, number, np.rint(noise).astype(np.int64), 1000, adapter, state)
        lengths.append(float(np.linalg.norm(adapter - before)))
    assert lengths[1] / lengths[0] == pytest.approx(longer, rel=1e-3)


@pytest.mark.parametrize("server", [Average(), ServerSgd(**RATES), ServerYogi(**RATES)])
def test_a_step_of_a_large_adapter_needs_little_more_memory(
    make_plan2: MakePlan, server: ServerOptimizer
) -> None:
    tensors = (Tensor(name="x.lora_A.weight", shape=(2, 1_000_000), role="lora_A"),)
    plan = plan_of(make_plan2, server)
    plan = msgspec.structs.replace(plan, lora=msgspec.structs.replace(plan.lora, tensors=tensors))
    adapter, state = np.zeros(plan.lora.size, np.float32), ServerState()
    total = np.ones(plan.lora.size, np.int32)
    take_step(plan, 1, total, 3, adapter, state)
    tracemalloc.start()
    try:
        take_step(plan, 2, total, 3, adapter, state)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Beside the adapter of 8 MB.
    assert peak < 2e6
