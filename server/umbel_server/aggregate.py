"""From the unmasked sum to the new global adapter: FedAvg (McMahan et al. 2017) on deltas."""

from umbel_common.adapter import Vector, merge
from umbel_common.errors import RemoteProtocolError, RoundAborted
from umbel_common.identity import Roster
from umbel_common.plan import TrainingPlan
from umbel_common.quantise import decode_sum, encoding_of
from umbel_common.secagg.coordinator import Aggregate
from umbel_common.site_counts import SiteCounts, split_mean


def expected_weight(plan: TrainingPlan, roster: Roster, survivors: tuple[str, ...]) -> int | None:
    """The sum of the survivors' weights where it is public; None for masked example counts."""
    match plan.aggregation.weights:
        case "equal":
            return len(survivors)
        case "size-class":
            return sum(roster.member(site).weight for site in survivors)
        case "examples":
            return None


def apply(
    aggregate: Aggregate,
    plan: TrainingPlan,
    roster: Roster,
    round_number: int,
    cohort_size: int,
    adapter: Vector,
) -> tuple[Vector, int, SiteCounts | None]:
    """The new global adapter, float32[plan.lora.size], the weight behind it, and the sum of the
    sites' counts if the plan has an evaluation.

    Raises:
        RoundAborted: `weight-mismatch` where the weight in the sum is not the public weight of the
            survivors: some site's vector is not what its plan says.
    """
    try:
        weight, mean = decode_sum(aggregate.total, encoding_of(plan.aggregation, cohort_size))
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
    delta, counts = split_mean(mean, plan, len(aggregate.survivors))
    return merge(adapter, delta, plan, round_number), weight, counts
