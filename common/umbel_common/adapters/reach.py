"""How far an adapter can be from its initial value: what a release cannot honestly be.

The law: one bound for every party, a pure function of plan, round and number of sites.

Sites and the verifier compare an adapter with this bound. One that lies further away does not
follow from sums: its signer made it. The server holds each step to it before it signs, because it
refuses a sum with a coordinate above `largest_sum` (`secagg.encoding.total_weight`).

**One change.** Let L bound each element's change c of a round (`server_step.change_scale`). In
local mode each coordinate of a delta is clipped and rounded to one of the plan's levels, and c is a
weighted mean, so L is the largest level. In distributed mode c is a sum divided by a public number,
so L = `largest_sum` * step / expected_batch_size, for the most sites that there can be.

**One step.** A tensor moves only in rounds that train it. Let it be its t-th step, with the
learning rate r of the round. Then the element moves by at most

- average: L.
- sgd: r L G with G = 1 + m + ... + m^(t-1), since |b_t| <= m |b_(t-1)| + L; with nesterov, r L
  (1 + m G), since it moves by r (c + m b_t).
- adam: r x, x = L K / (L + K eps), for a K with |u'| <= K sqrt(v'), where u' and v' are the
  corrected moments. Since u' is a weighted mean of changes, |u'| <= L. The element moves by at most
  r |u'| / (|u'| / K + eps), which grows with |u'|, so it is largest for |u'| = L. By Cauchy and
  Schwarz, with the sums over j = 0 to t - 1 and c_j the change j steps ago,
  |u| <= (1 - beta1) sum beta1^j |c_j|
      <= (1 - beta1) sqrt(sum (beta1^2 / beta2)^j) sqrt(sum beta2^j c_j^2),
  and the last sum is v / (1 - beta2). With S = sum (beta1^2 / beta2)^j:
  K = (1 - beta1) sqrt(S (1 - beta2^t) / (1 - beta2)) / (1 - beta1^t).
- yogi: as adam with another K. A step is a *rise* where c^2 > v before it, and v grows by
  (1 - beta2) c^2; in any other step v falls by (1 - beta2) c^2 <= (1 - beta2) v, or stays. So v
  never falls below beta2 times what it was, and v >= sum over rises of (1 - beta2) beta2^j c_j^2.
  In a step that is no rise, c_j^2 is at most the v before it, which is at most v / beta2^(j+1) now.
  The first step is a rise, or its change is 0. With Cauchy and Schwarz for the rises, and term by
  term for the others,
  |u| <= (1 - beta1) sqrt(v) (sqrt(S / (1 - beta2)) + sum of beta1^j / beta2^((j+1)/2)),
  with j = 0 to t - 2 in the last sum. K is the factor of sqrt(v), times
  sqrt(1 - beta2^t) / (1 - beta1^t).

A round that the release gate held back takes no step, so a later step may have a smaller t than the
number of rounds says. So the largest bound for any t up to that number counts. The bounds of all
rounds up to a release are summed.

**FedSVD** rotates A and B after each step, so no element of them keeps its place. Each step begins
with an A of orthonormal rows, and the product moves by D A for the step D of B. Since A has
orthonormal rows, |D A| = |D| in the Frobenius norm, and |D| is at most sqrt(size of B) times the
bound of one element. Rotations keep norms: B's, which is that of the product, and the momentum's.
So the norm of B is at most its initial norm plus sqrt(size) times the summed bounds. (The moments
of adam and yogi are reset for B: each step is a first one.) The rows of each A are combinations of
those before, so they stay in the space of the initial A's rows.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import count, islice

import numpy as np

from umbel_common.adapters.start import LABEL_ROWS, Origin, seed_origin
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.errors import require
from umbel_common.plans.largest_sum import MOST_SITES, largest_sum
from umbel_common.plans.plan import DistributedPrivacy, Tensor, TrainingPlan
from umbel_common.plans.server_optimizer import (
    Average,
    ServerAdam,
    ServerOptimizer,
    ServerSgd,
    ServerYogi,
)
from umbel_common.plans.start import SeedStart

_ROUNDING = 1e-6
"""Rounding of each addition in float32, relative to the largest value that is added to."""
_NORM_ROUNDING = 1e-5
"""Relative rounding of a norm in float32."""


def largest_change(plan: TrainingPlan, sites: int) -> float:
    """Largest magnitude of an element's change in a round: L above.

    Args:
        sites: the most sites that can be in a sum.
    """
    if isinstance(plan.privacy, DistributedPrivacy):
        most = largest_sum(plan, weight=sites * plan.aggregation.max_weight, sites=sites)
        return most * plan.aggregation.step / plan.training.expected_batch_size
    return plan.aggregation.largest_change


def largest_steps(plan: TrainingPlan, role: str, sites: int) -> Iterator[float]:
    """For each round from the first on, the most that it moves an element of a tensor.

    Args:
        role: the role of the tensor.
    """
    server, change = plan.server, largest_change(plan, sites)
    gains = _gains(server, change, resets=plan.lora.method == "fedsvd" and role == "lora_B")
    largest = 0.0
    rounds = plan.training.rounds
    for number in count(1):
        if not any(tensor.role == role for tensor in plan.trained_tensors(number)):
            yield 0.0
            continue
        largest = max(largest, next(gains))
        if isinstance(server, Average):
            yield largest
        else:
            last = min(number, rounds)
            yield largest * server.learning_rate(
                head=role == "head", round_number=last, rounds=rounds
            )


def largest_step(server: ServerOptimizer, change: float, rounds: int) -> float:
    """The most that any round of a job moves an element, whatever is trained in it.

    Args:
        change: largest magnitude of the element's change in a round.
        rounds: number of rounds of the job.
    """
    if isinstance(server, Average):
        return change
    rate = max(server.adapter_learning_rate, server.head_learning_rate or 0.0)
    return rate * max(islice(_gains(server, change, resets=False), rounds))


def longest_step(plan: TrainingPlan) -> float:
    """What a site's `max_clip_range` bounds: the most that a round of a plan may move an element.

    In distributed mode, it is the longest step by the largest of three: a mean of gradients of at
    most the clip norm, the most that a site may send of one element (`clip_range`), and the
    standard deviation of its noise. The bound of an adapter (`require_reachable`) is larger there:
    it holds for every sum that sites can send. It is at most a multiple of this, whatever numbers
    a plan has: n times the range and 13 sqrt(n) times the noise, for n sites in a sum.
    """
    privacy, aggregation = plan.privacy, plan.aggregation
    change = aggregation.clip_range
    if isinstance(privacy, DistributedPrivacy):
        batch, change = plan.training.expected_batch_size, privacy.clip_norm
        sent = max(aggregation.clip_range, 2.0**privacy.noise_bits * aggregation.step)
        # A quotient of the product of these two could round to more than the clip norm.
        if sent > change * batch:
            change = sent / batch
    return largest_step(plan.server, change, plan.training.rounds)


def _gains(server: ServerOptimizer, change: float, *, resets: bool) -> Iterator[float]:
    """For t = 1, 2, ..., the largest t-th step of an element at a learning rate of 1.

    Args:
        resets: whether the moments of adam and yogi are reset before each step.
    """
    match server:
        case Average():
            while True:
                yield change
        case ServerSgd(momentum=momentum, nesterov=nesterov):
            total = 0.0
            while True:
                total = momentum * total + 1.0
                yield change * (1.0 + momentum * total if nesterov else total)
        case ServerAdam() | ServerYogi():
            ratios = _ratios(server)
            ratio = next(ratios)
            while True:
                # A ratio that overflowed leaves the whole change over eps, and not a NaN.
                yield change / (change / ratio + server.eps)
                ratio = ratio if resets else next(ratios)


def _ratios(server: ServerAdam | ServerYogi) -> Iterator[float]:
    """For t = 1, 2, ..., the bound K of the corrected first moment over the second one's root."""
    beta1, beta2 = server.beta1, server.beta2
    squares = falls = 0.0
    square = fall = power1 = power2 = 1.0
    while True:
        squares += square
        square *= beta1 * beta1 / beta2
        power1 *= beta1
        power2 *= beta2
        factor = math.sqrt(squares / (1 - beta2))
        if isinstance(server, ServerYogi):
            factor += falls / math.sqrt(beta2)
            falls += fall
            fall *= beta1 / math.sqrt(beta2)
        yield (1 - beta1) * factor * math.sqrt(1 - power2) / (1 - power1)


def require_reachable(
    plan: TrainingPlan,
    round_number: int,
    vector: Vector,
    origin: Origin | None = None,
    *,
    sites: int = MOST_SITES,
) -> None:
    """Requires that an adapter can be what a plan's rounds lead to.

    An adapter is accepted exactly if some start within the origin's distances lies within the
    reach of the rounds: what the rounds cannot have added is held to these distances.

    Args:
        round_number: the number of rounds that the adapter comes after.
        vector: float32[plan.lora.size], finite.
        origin: the adapter that the plan starts from; None for one that starts from its seed.
        sites: the most sites that can be in a sum. Only distributed mode depends on it.

    Raises:
        RemoteProtocolError: `adapter-too-far`.
    """
    if origin is None:
        assert isinstance(plan.start, SeedStart)  # no other start follows from the plan alone
        origin = seed_origin(plan)
    start = origin.values
    values = unflatten(vector, plan.lora.tensors)
    most = {
        role: _summed(plan, role, round_number, sites)
        for role in {tensor.role for tensor in plan.lora.tensors}
    }
    squares = 0.0
    for tensor in plan.lora.tensors:
        first, last = start[tensor.name], values[tensor.name]
        trained, limit = most[tensor.role]
        if plan.lora.method == "fedsvd" and tensor.role != "head":
            _require_product(plan, tensor, first, last, round_number, trained, limit)
            continue
        largest = float(np.abs(first).max()) + origin.radius
        reach = limit + _ROUNDING * trained * (limit + largest)
        distances = np.abs(last - first)
        if origin.radius > 0:
            squares += _beyond(distances, reach)
            continue
        if origin.row_radius > 0 and tensor.name == LABEL_ROWS:
            # The rows have one length, and the distance of the furthest decides.
            found = math.sqrt(max(_beyond(row, reach) for row in distances))
            require(
                found <= origin.row_radius,
                "adapter-too-far",
                "a head is further from the embeddings of its labels' names, as this side computes"
                " them, than the plan's tolerance and rounds can bring it",
                field=tensor.name,
                found=f"{found:.6g} after {round_number} rounds",
                accepted=f"at most {origin.row_radius:.6g}, start.tolerance x start.scale",
            )
            continue
        _require_within(plan, tensor, float(distances.max()), limit, reach, round_number)
    require(
        math.sqrt(squares) <= origin.radius * (1 + _NORM_ROUNDING),
        "adapter-too-far",
        "an adapter is longer than the plan's start and rounds can make it",
        found=f"{math.sqrt(squares):.6g} after {round_number} rounds, beyond what these can add",
        accepted=f"at most {origin.radius:.6g}, start.largest_norm",
    )


def _require_within(
    plan: TrainingPlan, tensor: Tensor, found: float, bound: float, reach: float, number: int
) -> None:
    """Requires a distance of at most `reach`, which is the bound with its rounding."""
    require(
        found <= reach,
        "adapter-too-far",
        "an adapter is further from its initial value than the plan's rounds can bring it",
        field=tensor.name,
        found=f"{found:.6g} after {number} rounds",
        accepted=f"at most {bound:.6g}, for clip_range {plan.aggregation.clip_range:g}",
    )


def _require_product(
    plan: TrainingPlan,
    tensor: Tensor,
    first: Vector,
    last: Vector,
    round_number: int,
    trained: int,
    limit: float,
) -> None:
    """Requires that a matrix of the method fedsvd can be what rounds and rotations lead to."""
    if tensor.role == "lora_A":
        _require_same_rows(plan, tensor, first, last, round_number)
        return
    bound = float(np.linalg.norm(first)) + limit * math.sqrt(tensor.size)
    rounding = _ROUNDING * trained * bound * math.sqrt(plan.lora.rank)
    found = float(np.linalg.norm(last.astype(np.float64)))
    _require_within(plan, tensor, found, bound, bound + rounding, round_number)


@lru_cache(maxsize=16)
def _summed(plan: TrainingPlan, role: str, round_number: int, sites: int) -> tuple[int, float]:
    """Number of steps of a tensor up to a round, and the most that they move an element."""
    steps = list(islice(largest_steps(plan, role, sites), round_number))
    trained = sum(step > 0 for step in steps)
    # A product, where every step is the same: the sum would round in each of them.
    return trained, trained * max(steps, default=0.0) if len({*steps} - {0.0}) == 1 else sum(steps)


def _require_same_rows(
    plan: TrainingPlan, tensor: Tensor, first: Vector, last: Vector, round_number: int
) -> None:
    """Requires orthonormal rows that lie in the space of other such rows."""
    wide, start = last.astype(np.float64), first.astype(np.float64)
    # Each release rounds A to float32 once more.
    tolerance = _ROUNDING * (round_number + 1) * math.sqrt(plan.lora.rank)
    lengths = wide @ wide.T - np.eye(len(wide))
    outside = wide - (wide @ start.T) @ start
    found = max(float(np.abs(lengths).max()), float(np.linalg.norm(outside, axis=1).max()))
    require(
        found <= tolerance,
        "adapter-too-far",
        "a matrix A is not a rotation of the initial one, which is all that fedsvd makes",
        field=tensor.name,
        found=f"{found:.3g} after {round_number} rounds",
        accepted=f"at most {tolerance:.3g}",
    )


def _beyond(distances: Vector, reach: float) -> float:
    """The square of the Euclidean length of what lies beyond the reach of a plan's rounds."""
    return float(np.square(np.maximum(distances - reach, 0), dtype=np.float64).sum())
