"""How large a coordinate of a round's sum can be, with the noise that sites add to it.

The law: one bound for every party, a pure function of the plan and the number of sites.
"""

import math

from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan, levels

MOST_SITES = 100
"""Most sites of a cohort."""


def largest_cohort(threshold: int) -> int:
    """Most sites of a cohort that can be aggregated with a threshold: of two survivor sets that
    gather as many signatures, both have an honest signer."""
    return min(2 * threshold - 1, MOST_SITES)


def largest_noise(bits: int, *, sites: int, draws: float) -> int:
    """A number of steps that the noise of `sites` sites exceeds with probability 2^-40 at most.

    The tail of a discrete Gaussian is no heavier than exp(-x^2 / (2 s^2)) on each side (Canonne,
    Kamath and Steinke 2020 prove that it is subgaussian), and neither is that of a sum.

    Args:
        draws: number of coordinates over all attempts of a job: the probability is that of any.
    """
    scale = math.sqrt(sites) * 2.0**bits
    return math.ceil(scale * math.sqrt(2 * math.log(2 * draws * 2.0**40)))


def noise_in_sum(plan: TrainingPlan, sites: int) -> int:
    """Bound of the noise that `sites` sites add to a coordinate of a sum, in steps of the plan.

    In local mode it is 0: a site's noise is in its delta, and is clipped with it. In distributed
    mode the noise is added after a coordinate is clipped. Any sum of the job goes past this bound
    with probability 2^-40 at most.
    """
    privacy = plan.privacy
    if not isinstance(privacy, DistributedPrivacy):
        return 0
    coordinates = max(plan.vector_length(number) for number in plan.kinds_of_rounds)
    draws = float(privacy.most_attempts) * coordinates
    return largest_noise(privacy.noise_bits, sites=sites, draws=draws)


def largest_sum(plan: TrainingPlan, *, weight: int, sites: int) -> int:
    """Largest magnitude of a coordinate of a sum, in steps of the plan.

    Args:
        weight: the total weight of the sites in the sum.
        sites: their number.
    """
    aggregation = plan.aggregation
    clipped = weight * levels(aggregation.clip_range, aggregation.step)
    return clipped + noise_in_sum(plan, sites)
