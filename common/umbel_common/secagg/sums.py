"""From the sum of a round to what is released: the server's work, which anybody can do again.

The law: the server and the verifier call the same functions, so that a release follows from its
sum, its plan and the releases before, or is found.
"""

import numpy as np

from umbel_common.adapters import fedsvd
from umbel_common.adapters.server_step import ServerState, take_step
from umbel_common.adapters.site_counts import SiteCounts, counts_of
from umbel_common.adapters.vector import Vector
from umbel_common.errors import require
from umbel_common.plans.plan import COUNTS, TrainingPlan
from umbel_common.secagg.encoding import (
    RingVector,
    add_mean,
    encoding_of,
    signed_part,
    total_weight,
)


def read_sum(plan: TrainingPlan, round_number: int, total: RingVector, *, cohort: int) -> int:
    """The total weight in a sum, after a check of the whole sum.

    Args:
        cohort: number of sites of the attempt.

    Raises:
        RemoteProtocolError: `sum-length` if it is not as long as the round's vectors;
            `total-weight` or `sum-out-of-range` if no honest vectors can have given it.
    """
    length = plan.vector_length(round_number) + 1
    require(
        total.size == length and 8 * total.itemsize == plan.aggregation.ring_bits,
        "sum-length",
        "a sum is not as long as the vectors of its round",
        found=f"{total.size} numbers of {8 * total.itemsize} bits",
        accepted=f"{length} numbers of {plan.aggregation.ring_bits} bits",
    )
    return total_weight(total, encoding_of(plan, cohort))


def move(
    plan: TrainingPlan,
    round_number: int,
    total: RingVector,
    adapter: Vector,
    state: ServerState,
) -> None:
    """Moves the adapter and the optimizer's state by a round's sum, in place.

    With the method fedsvd this is not all: `fedsvd.refactorise` follows.

    Args:
        total: a sum that `read_sum` accepted.
        adapter: float32[plan.lora.size], writeable.
    """
    take_step(plan, round_number, signed_part(total), int(total[0]), adapter, state)


def release_of(
    plan: TrainingPlan,
    round_number: int,
    total: RingVector,
    adapter: Vector,
    state: ServerState,
) -> None:
    """Makes the adapter that a round releases from the one that it started from, in place.

    Args:
        total: a sum that `read_sum` accepted.
        adapter: float32[plan.lora.size], writeable.
    """
    fedsvd.next_adapter(plan, round_number, signed_part(total), int(total[0]), adapter, state)


def counts_in(plan: TrainingPlan, total: RingVector, *, cohort: int, survivors: int) -> SiteCounts:
    """The sites' counts at the end of a sum that `read_sum` accepted.

    The plan must have an evaluation.
    """
    assert plan.evaluation is not None
    encoding = encoding_of(plan, cohort)
    shares = np.zeros(COUNTS, dtype=np.float32)
    last = np.concatenate([total[:1], total[-COUNTS:]])
    add_mean(last, encoding, [shares])
    return counts_of(shares, plan.aggregation, plan.evaluation, survivors)
