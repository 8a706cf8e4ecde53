"""From the unmasked sum to the new global adapter: FedAvg (McMahan et al. 2017) on deltas.

This module is pure, and must stay so. It sees the sum, and never the vector of one site.
"""

import numpy as np

from umbel_common.adapters.site_counts import COORDINATES, SiteCounts, counts_of
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.errors import RemoteProtocolError, RoundAborted
from umbel_common.plans.plan import TrainingPlan
from umbel_common.secagg.encoding import add_mean, encoding_of, total_weight
from umbel_common.secagg.unmasking import Aggregate
from umbel_common.trust.identity import Roster


def expected_weight(plan: TrainingPlan, roster: Roster, survivors: tuple[str, ...]) -> int | None:
    """The sum of the survivors' weights if it is public; None if weights are masked counts."""
    match plan.aggregation.weights:
        case "equal":
            return len(survivors)
        case "size-class":
            return sum(roster.member(site).weight for site in survivors)
        case "examples":
            return None


def apply_sum(
    aggregate: Aggregate,
    plan: TrainingPlan,
    roster: Roster,
    round_number: int,
    cohort_size: int,
    adapter: Vector,
) -> tuple[int, SiteCounts | None]:
    """Makes the new global adapter from the one that the round started from.

    Args:
        adapter: float32[plan.lora.size], writeable. It is changed in place: a server that holds it
            and the sum has no room for a third vector.

    Returns:
        the weight behind it, and the sum of the sites' counts if the plan has an evaluation.

    Raises:
        RoundAborted: `weight-mismatch` if the weight in the sum is not the public weight of the
            survivors: the vector of some site is not what the plan requires.
    """
    encoding = encoding_of(plan, cohort_size)
    try:
        weight = total_weight(aggregate.total, encoding)
    except RemoteProtocolError as error:
        raise RoundAborted(error.check, error.message) from None
    expected = expected_weight(plan, roster, aggregate.survivors)
    if expected is not None and weight != expected:
        raise RoundAborted(
            "weight-mismatch",
            "the weights in the sum are not those of the surviving sites",
            found=weight,
            accepted=expected,
        )
    values = unflatten(adapter, plan.lora.tensors)
    trained = [values[tensor.name] for tensor in plan.trained_tensors(round_number)]
    if plan.evaluation is None:
        add_mean(aggregate.total, encoding, trained)
        return weight, None
    shares = np.zeros(COORDINATES, dtype=np.float32)
    add_mean(aggregate.total, encoding, [*trained, shares])
    return weight, counts_of(shares, plan.aggregation, plan.evaluation, len(aggregate.survivors))
