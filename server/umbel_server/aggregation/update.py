"""From the unmasked sum to the new global adapter.

This module is pure, and must stay so. It sees the sum, and never the vector of one site.
"""

from umbel_common.adapters.server_step import ServerState
from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.vector import Vector
from umbel_common.errors import RemoteProtocolError, RoundAborted
from umbel_common.plans.plan import TrainingPlan
from umbel_common.secagg import sums
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
    state: ServerState,
) -> tuple[int, SiteCounts | None]:
    """Makes the new global adapter from the one that the round started from.

    Args:
        adapter: float32[plan.lora.size], writeable. It is changed in place: a server that holds it
            and the sum has no room for a third vector.
        state: the optimizer's; it is changed in place too.

    Returns:
        the weight behind it, and the sum of the sites' counts if the plan has an evaluation.

    Raises:
        RoundAborted: `weight-mismatch` if the weight in the sum is not the public weight of the
            survivors: the vector of some site is not what the plan requires. Then neither adapter
            nor state was changed.
    """
    total, survivors = aggregate.total, len(aggregate.survivors)
    try:
        weight = sums.read_sum(plan, round_number, total, cohort=cohort_size)
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
    sums.release_of(plan, round_number, total, adapter, state)
    if plan.evaluation is None:
        return weight, None
    return weight, sums.counts_in(plan, total, cohort=cohort_size, survivors=survivors)
