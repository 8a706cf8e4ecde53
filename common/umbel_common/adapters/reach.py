"""How far an adapter can be from its initial value: what a release cannot honestly be.

The law: one bound for every party, a pure function of plan and round.

Each coordinate of a delta is clipped to the plan's clip range and rounded to one of its levels, so
a mean of deltas is at most that large, whatever the sites send. A tensor changes only in the rounds
that train it. An adapter that lies further away is not a mean of deltas: its signer made it. Sites
and the verifier compare the adapter with this bound. The server holds each step to it before it
signs: it refuses a sum with a coordinate above its weight's (`secagg.encoding.total_weight`).
"""

from collections import Counter
from functools import lru_cache

import numpy as np

from umbel_common.adapters.vector import Vector, initial_vector, unflatten
from umbel_common.errors import require
from umbel_common.plans.plan import TrainingPlan

_ROUNDING = 1e-6
"""Rounding of each addition in float32, relative to the largest value that is added to."""


def require_reachable(plan: TrainingPlan, round_number: int, vector: Vector) -> None:
    """Requires that an adapter can be what a plan's rounds lead to.

    Args:
        round_number: the number of rounds that the adapter comes after.
        vector: float32[plan.lora.size], finite.

    Raises:
        RemoteProtocolError: `adapter-too-far`.
    """
    rounds = Counter(
        tensor.name
        for number in range(1, round_number + 1)
        for tensor in plan.trained_tensors(number)
    )
    start = unflatten(_initial(plan), plan.lora.tensors)
    for name, values in unflatten(vector, plan.lora.tensors).items():
        most = rounds[name] * plan.aggregation.largest_change
        rounding = _ROUNDING * rounds[name] * (most + float(np.abs(start[name]).max()))
        found = float(np.abs(values - start[name]).max())
        require(
            found <= most + rounding,
            "adapter-too-far",
            "an adapter is further from its initial value than the plan's rounds can bring it",
            field=name,
            found=f"{found:.6g} after {round_number} rounds",
            accepted=f"at most {most:.6g}, for clip_range {plan.aggregation.clip_range:g}",
        )


@lru_cache(maxsize=1)
def _initial(plan: TrainingPlan) -> Vector:
    """The plan's initial adapter, kept for its next round: it takes longer than the comparison."""
    vector = initial_vector(plan)
    vector.flags.writeable = False
    return vector
