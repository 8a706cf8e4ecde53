"""The adapter that a job starts from, as each party knows it.

The law: a plan names its start so that nobody has to believe it. What follows from the plan alone
is recomputed here, bit for bit. A tensor is compared with its digest, its norms are bounded, and
what the start does not set is as the seed has it. What needs a model (the embeddings of the labels'
names) or a memory (an earlier release) is asked by a site, which has both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from umbel_common.adapters.vector import (
    Vector,
    adapter_digest,
    flatten,
    initial_tensors,
    initial_vector,
    start_digest,
    unflatten,
)
from umbel_common.errors import require
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.start import LabelNamesStart, ReleasedStart, SeedStart

LABEL_ROWS = "head.weight"
"""The tensor of a mean-pool head that has a row for each label."""
_ROUNDING = 1e-5
"""Relative rounding of a norm in float32."""


@dataclass(frozen=True, repr=False, eq=False)
class Origin:
    """What a party knows of the adapter that a job starts from."""

    values: Mapping[str, Vector]
    """The tensors of the adapter, or of one that it lies near, by name."""
    row_radius: float = 0.0
    """Largest Euclidean distance of a label's row of the head from that of `vector`."""
    radius: float = 0.0
    """Largest Euclidean distance of the whole adapter from `vector`."""


def origin_of(
    plan: TrainingPlan, vector: Vector, *, row_radius: float = 0.0, radius: float = 0.0
) -> Origin:
    """A start that is known as a whole.

    Args:
        vector: float32[plan.lora.size].
        row_radius, radius: as in `Origin`.
    """
    return Origin(unflatten(vector, plan.lora.tensors), row_radius, radius)


@lru_cache(maxsize=1)
def seed_origin(plan: TrainingPlan) -> Origin:
    """The start of a plan that starts from its seed; kept for the job's next round."""
    return Origin(initial_tensors(plan))


def start_from_rows(plan: TrainingPlan, rows: Vector) -> Vector:
    """The adapter of the seed, with a head that has these rows.

    Args:
        rows: float32[labels, hidden size].
    """
    vector = initial_vector(plan)
    unflatten(vector, plan.lora.tensors)[LABEL_ROWS][...] = rows
    return vector


def norm_of(vector: Vector) -> float:
    """The Euclidean norm of an adapter."""
    return math.sqrt(float(np.square(vector, dtype=np.float64).sum()))


def require_start(plan: TrainingPlan, vector: Vector) -> None:
    """Requires that an adapter is the start that a plan names, as far as that needs no model.

    Raises:
        RemoteProtocolError: `initial-adapter`: it is another adapter, or what the start does not
            set is not as the seed has it; `start-norm`: it is longer than the plan says.
    """
    match plan.start:
        case SeedStart():
            require(
                start_digest(vector)
                == start_digest(flatten(seed_origin(plan).values, plan.lora.tensors)),
                "initial-adapter",
                "release 0 does not follow from the plan's public seed",
            )
        case LabelNamesStart() as start:
            _require_named(start_digest(vector), start.tensor)
            rows = unflatten(vector, plan.lora.tensors)[LABEL_ROWS]
            require(
                start_digest(start_from_rows(plan, rows)) == start.tensor,
                "initial-adapter",
                "release 0 differs from the plan's public seed in more than its labels' rows",
            )
            norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
            worst = float(norms[np.abs(norms - start.scale).argmax()])
            require(
                abs(worst - start.scale) <= _ROUNDING * start.scale,
                "start-norm",
                "a label's row of release 0 does not have the length that the plan says",
                field="start.scale",
                found=worst,
                accepted=f"{start.scale:g}",
            )
        case ReleasedStart() as start:
            _require_named(adapter_digest(start.plan, vector), start.adapter)
            found = norm_of(vector)
            require(
                found <= start.largest_norm * (1 + _ROUNDING),
                "start-norm",
                "release 0 is longer than the plan says",
                field="start.largest_norm",
                found=found,
                accepted=f"at most {start.largest_norm:g}",
            )


def _require_named(found: bytes, accepted: bytes) -> None:
    require(
        found == accepted,
        "initial-adapter",
        "release 0 is not the adapter that the plan names as its start",
        found=found.hex(),
        accepted=accepted.hex(),
    )
