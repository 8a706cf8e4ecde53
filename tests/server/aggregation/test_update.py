"""What the server demands of a sum before it moves the adapter by it."""

from collections.abc import Callable

import numpy as np
import pytest
from support.distributed import distributed

from umbel_common.adapters.server_step import ServerState
from umbel_common.adapters.vector import Vector, initial_vector
from umbel_common.errors import RoundAborted
from umbel_common.plans.largest_sum import largest_sum, noise_in_sum
from umbel_common.plans.plan import Aggregation, TrainingPlan
from umbel_common.plans.server_optimizer import ServerSgd
from umbel_common.secagg.unmasking import Aggregate
from umbel_common.trust.identity import Identity, Roster
from umbel_server.aggregation.update import apply_sum

MakePlan = Callable[..., TrainingPlan]
MakeFederation = Callable[[int], tuple[Identity, dict[str, Identity], Roster]]
SITES = ("site-00", "site-01", "site-02")
LEVELS = 100


def plan_of(make_plan2: MakePlan, *, shared: bool) -> TrainingPlan:
    """A plan with 100 levels; with `shared`, in distributed mode."""
    plan = make_plan2(
        server=ServerSgd(adapter_learning_rate=0.5, momentum=0.0),
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1.0 / LEVELS),
    )
    return distributed(plan) if shared else plan


def moved(plan: TrainingPlan, roster: Roster, largest: int, length: int | None = None) -> Vector:
    """How far a sum moves the adapter; its first coordinate is `largest`, the others are zero."""
    total = np.zeros(1 + (plan.lora.size if length is None else length), dtype="<u4")
    total[0] = len(SITES)
    total.view("<i4")[1] = largest
    adapter = initial_vector(plan)
    aggregate = Aggregate(survivors=SITES, total=total)
    weight, counts = apply_sum(aggregate, plan, roster, 1, 3, adapter, ServerState())
    assert (weight, counts) == (3, None)
    way: Vector = adapter - initial_vector(plan)
    return way


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shared", [False, True], ids=["local", "distributed"])
def test_no_coordinate_is_larger_than_clipped_sums_and_noise_allow(
    make_plan2: MakePlan, make_federation: MakeFederation, sign: int, shared: bool
) -> None:
    plan, (_, _, roster) = plan_of(make_plan2, shared=shared), make_federation(3)
    most = largest_sum(plan, weight=3, sites=3)
    noise = noise_in_sum(plan, 3)
    assert most == 3 * LEVELS + noise
    # The noise is 16 steps of each site: 2^-40 is eight of its standard deviations away.
    assert noise == 0 if not shared else 8 * 16 * 3**0.5 < noise < 10 * 16 * 3**0.5
    way = moved(plan, roster, sign * most)
    scale = -1 / LEVELS / 8 if shared else 1 / LEVELS / 3
    assert way[0] == pytest.approx(0.5 * sign * most * scale, rel=1e-6)
    assert not way[1:].any()
    with pytest.raises(RoundAborted) as refusal:
        moved(plan, roster, sign * (most + 1))
    assert refusal.value.check == "sum-out-of-range"


def test_a_sum_of_another_length_ends_the_attempt(
    make_plan2: MakePlan, make_federation: MakeFederation
) -> None:
    plan, (_, _, roster) = plan_of(make_plan2, shared=False), make_federation(3)
    with pytest.raises(RoundAborted) as refusal:
        moved(plan, roster, 1, length=plan.lora.size + 1)
    assert refusal.value.check == "sum-length"
