"""The server's step: from a round's sum to the next adapter and the next state of the optimizer.

The law: anybody who has the plan and the sums gets the same bits. So every operation here is one of
IEEE 754's exactly rounded ones (+, -, *, /, square root) on float64, element by element, in this
order: no power, sum over elements, or function of a library that rounds otherwise. One step rounds
each element of the adapter once, to float32.

With the change c of an element (`change_scale`), the learning rate r of the round and the number t
of steps that this matrix has taken:

- average: the adapter moves by c, computed in float32.
- sgd: b = m b + c; the adapter moves by r b, with nesterov by r (c + m b).
- adam: u = beta1 u + (1 - beta1) c, v = beta2 v + (1 - beta2) c^2; the adapter moves by
  r (u / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).
- yogi: as adam, with v = v - (1 - beta2) c^2 sign(v - c^2).

Only the tensors of the round move, and only their part of the state. The state of an optimizer is
therefore a function of the sums of the rounds that were released: it is kept nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.plans.plan import DistributedPrivacy, Tensor, TrainingPlan
from umbel_common.plans.server_optimizer import Average, ServerAdam, ServerSgd, ServerYogi

Integers: TypeAlias = npt.NDArray[np.signedinteger[Any]]
Moment: TypeAlias = npt.NDArray[np.float64]

CHUNK = 2**14
"""Number of elements of a step at a time: its temporaries stay in the L2 cache."""


@dataclass
class ServerState:
    """What the optimizer remembers between rounds."""

    steps: dict[str, int] = field(default_factory=dict)
    """Role of a tensor -> number of steps that tensors of this role have taken."""
    moments: dict[str, dict[str, Moment]] = field(default_factory=dict)
    """Kind -> name of a tensor -> its moment; a moment that is missing is zero."""

    def copy(self) -> "ServerState":
        """The same state; a step on one leaves the other as it is."""
        moments = {
            kind: {name: values.copy() for name, values in named.items()}
            for kind, named in self.moments.items()
        }
        return ServerState(dict(self.steps), moments)

    def moment(self, kind: str, tensor: Tensor) -> Moment:
        """A moment of a tensor, float64[tensor.size], writeable."""
        named = self.moments.setdefault(kind, {})
        if tensor.name not in named:
            named[tensor.name] = np.zeros(tensor.size, dtype=np.float64)
        return named[tensor.name]


def change_scale(plan: TrainingPlan, weight: int) -> float:
    """The change of an element for each step of the grid in a sum.

    In local mode the change is the weighted mean of the deltas. In distributed mode it is the
    negative mean gradient: the sum divided by a number that no site's part in it changes.

    Args:
        weight: the total weight in the sum.
    """
    if isinstance(plan.privacy, DistributedPrivacy):
        return -(plan.aggregation.step / plan.training.expected_batch_size)
    return plan.aggregation.step / weight


def add_scaled(total: Integers, scale: float, targets: Sequence[Vector]) -> None:
    """Adds a sum times `scale` to vectors, in place; each product and sum is rounded to float32.

    Args:
        total: the sum without its weight.
        targets: consecutive parts of a vector as long as the sum; float32, contiguous, writeable.
    """
    factor = np.float64(scale)
    product = np.empty(CHUNK, dtype=np.float32)
    position = 0
    for target in targets:
        flat = target.reshape(-1, copy=False)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            chunk = product[: part.size]
            source = total[position : position + part.size]
            np.multiply(source, factor, out=chunk, casting="same_kind")
            np.add(part, chunk, out=part)
            position += part.size


def take_step(
    plan: TrainingPlan,
    round_number: int,
    total: Integers,
    weight: int,
    adapter: Vector,
    state: ServerState,
) -> None:
    """Moves the adapter and the state of the optimizer by one round, in place.

    Args:
        round_number: the round (from 1), which says what is trained.
        total: the sum without its weight, in steps of the plan; what follows the round's tensors in
            it is not read.
        weight: the total weight in the sum.
        adapter: float32[plan.lora.size], writeable.
    """
    trained = plan.trained_tensors(round_number)
    values = unflatten(adapter, plan.lora.tensors)
    scale = change_scale(plan, weight)
    for role in sorted({tensor.role for tensor in trained}):
        state.steps[role] = state.steps.get(role, 0) + 1
    if isinstance(plan.server, Average):
        add_scaled(total, scale, [values[tensor.name] for tensor in trained])
        return
    position = 0
    for tensor in trained:
        source = total[position : position + tensor.size]
        position += tensor.size
        target = values[tensor.name].reshape(-1, copy=False)
        _move(plan, round_number, tensor, target, source, scale, state)


def _move(
    plan: TrainingPlan,
    round_number: int,
    tensor: Tensor,
    target: Vector,
    source: Integers,
    scale: float,
    state: ServerState,
) -> None:
    """Moves one tensor, float32[tensor.size], by its part of a sum."""
    server = plan.server
    assert not isinstance(server, Average)  # it has no learning rate
    rate = server.learning_rate(
        head=tensor.role == "head", round_number=round_number, rounds=plan.training.rounds
    )
    steps = state.steps[tensor.role]
    for start in range(0, tensor.size, CHUNK):
        part = slice(start, start + CHUNK)
        change = source[part] * np.float64(scale)
        match server:
            case ServerSgd():
                step = _sgd(server, change, state.moment("momentum", tensor)[part])
            case ServerAdam() | ServerYogi():
                first = state.moment("first", tensor)[part]
                second = state.moment("second", tensor)[part]
                step = _adaptive(server, change, first, second, steps)
        step *= rate
        np.add(target[part], step, out=target[part], casting="same_kind")


def _sgd(server: ServerSgd, change: Moment, momentum: Moment) -> Moment:
    momentum *= server.momentum
    momentum += change
    if not server.nesterov:
        return momentum.copy()
    step: Moment = momentum * server.momentum
    step += change
    return step


def _adaptive(
    server: ServerAdam | ServerYogi, change: Moment, first: Moment, second: Moment, steps: int
) -> Moment:
    first *= server.beta1
    first += (1 - server.beta1) * change
    square = change * change
    if isinstance(server, ServerAdam):
        second *= server.beta2
        second += (1 - server.beta2) * square
    else:
        second -= (1 - server.beta2) * square * np.sign(second - square)
    step: Moment = first / (1 - power(server.beta1, steps))
    root = second / (1 - power(server.beta2, steps))
    np.sqrt(root, out=root)
    root += server.eps
    step /= root
    return step


def power(base: float, exponent: int) -> float:
    """base ** exponent as repeated products: a library's power rounds differently elsewhere."""
    result = 1.0
    for _ in range(exponent):
        result *= base
    return result
