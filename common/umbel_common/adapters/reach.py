"""How far an adapter can be from its initial value: what a release cannot honestly be.

The law: one bound for every party, a pure function of plan and round.

Each coordinate of a delta is clipped to the plan's clip range and rounded to one of its levels, so
a mean of deltas is at most that large, whatever the sites send. A tensor changes only in the rounds
that train it. An adapter that lies further away is not a mean of deltas: its signer made it. Sites
and the verifier compare the adapter with this bound. The server holds each step to it before it
signs: it refuses a sum with a coordinate above its weight's (`secagg.encoding.total_weight`).
"""

import math
from collections import Counter

import numpy as np

from umbel_common.adapters.start import LABEL_ROWS, Origin, seed_origin
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.errors import require
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.start import SeedStart

_ROUNDING = 1e-6
"""Rounding of each addition in float32, relative to the largest value that is added to."""
_NORM_ROUNDING = 1e-5
"""Relative rounding of a norm in float32."""


def require_reachable(
    plan: TrainingPlan, round_number: int, vector: Vector, origin: Origin | None = None
) -> None:
    """Requires that an adapter can be what a plan's rounds lead to.

    An adapter is accepted exactly if some start within the origin's distances lies within the
    reach of the rounds: what the rounds cannot have added is held to these distances.

    Args:
        round_number: the number of rounds that the adapter comes after.
        vector: float32[plan.lora.size], finite.
        origin: the adapter that the plan starts from; None for one that starts from its seed.

    Raises:
        RemoteProtocolError: `adapter-too-far`.
    """
    if origin is None:
        assert isinstance(plan.start, SeedStart)  # no other start follows from the plan alone
        origin = seed_origin(plan)
    rounds = Counter(
        tensor.name
        for number in range(1, round_number + 1)
        for tensor in plan.trained_tensors(number)
    )
    start = unflatten(origin.vector, plan.lora.tensors)
    squares = 0.0
    for name, values in unflatten(vector, plan.lora.tensors).items():
        most = rounds[name] * plan.aggregation.largest_change
        largest = float(np.abs(start[name]).max()) + origin.radius
        rounding = _ROUNDING * rounds[name] * (most + largest)
        distances = np.abs(values - start[name])
        if origin.radius > 0:
            squares += _beyond(distances, most + rounding)
            continue
        if origin.row_radius > 0 and name == LABEL_ROWS:
            # The rows have one length, and the distance of the furthest decides.
            found = math.sqrt(max(_beyond(row, most + rounding) for row in distances))
            require(
                found <= origin.row_radius,
                "adapter-too-far",
                "a head is further from the embeddings of its labels' names, as this side computes"
                " them, than the plan's tolerance and rounds can bring it",
                field=name,
                found=f"{found:.6g} after {round_number} rounds",
                accepted=f"at most {origin.row_radius:.6g}, start.tolerance x start.scale",
            )
            continue
        found = float(distances.max())
        require(
            found <= most + rounding,
            "adapter-too-far",
            "an adapter is further from its initial value than the plan's rounds can bring it",
            field=name,
            found=f"{found:.6g} after {round_number} rounds",
            accepted=f"at most {most:.6g}, for clip_range {plan.aggregation.clip_range:g}",
        )
    require(
        math.sqrt(squares) <= origin.radius * (1 + _NORM_ROUNDING),
        "adapter-too-far",
        "an adapter is longer than the plan's start and rounds can make it",
        found=f"{math.sqrt(squares):.6g} after {round_number} rounds, beyond what these can add",
        accepted=f"at most {origin.radius:.6g}, start.largest_norm",
    )


def _beyond(distances: Vector, reach: float) -> float:
    """The square of the Euclidean length of what lies beyond the reach of a plan's rounds."""
    return float(np.square(np.maximum(distances - reach, 0), dtype=np.float64).sum())
