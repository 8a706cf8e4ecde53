"""What a plan of distributed mode costs: two figures, from the plan's own numbers and no others."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from support.shared_noise_plans import shared_noise_plan

from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.privacy.attempt_cost import AttemptCost, attempt_cost, judge_cost
from umbel_client.privacy.calibration import noise_for
from umbel_client.site.policy import Policy
from umbel_common.errors import CalibrationError, PolicyRefusal
from umbel_common.plans.plan import LoraAdapter, ScoreEvaluation, TrainingPlan

MakePlan = Callable[..., TrainingPlan]
LAW = Policy(max_epsilon=100.0)


def cost_of(plan: TrainingPlan) -> AttemptCost:
    found = attempt_cost(plan)
    assert found is not None
    return found


def with_privacy(plan: TrainingPlan, **changes: Any) -> TrainingPlan:
    privacy = msgspec.structs.replace(plan.privacy, **changes)
    return msgspec.structs.replace(plan, privacy=privacy)


def refusal(plan: TrainingPlan, law: Policy = LAW) -> str:
    with pytest.raises(PolicyRefusal) as caught:
        judge_cost(law, plan)
    return caught.value.check


@pytest.mark.parametrize(
    ("claim", "everybody"),
    [
        (1.0, {2: "1.5", 3: "2.0", 7: "3.7"}),
        (8.0, {2: "17", 3: "27", 7: "74"}),
    ],
)
def test_the_table_of_the_page(
    make_plan: MakePlan, claim: float, everybody: dict[int, str]
) -> None:
    """docs/privacy.md shows these figures; `tests/docs/test_two_totals.py` holds them there."""
    for honest, shown in everybody.items():
        plan = shared_noise_plan(
            make_plan(), epsilon=claim, honest=honest, least_survivors=honest + 1
        )
        found = cost_of(plan).epsilons(1e-5)
        assert 0.999 * claim < found.shared <= claim
        digits = 0 if "." not in shown else 1
        assert f"{found.everybody:.{digits}f}" == shown


def test_the_cost_follows_from_the_plan_and_from_no_size(make_plan: MakePlan) -> None:
    """Sizes that are wrong by ten times change no figure; in local mode they change the noise."""
    plan = shared_noise_plan(make_plan())
    cost = cost_of(plan)
    assert len({noise_for(plan, size) for size in (60, 600, 6000)}) == 1
    assert noise_for(plan, 600).sampling_rate == cost.everybody.sample_rate == 0.0927
    assert len({noise_for(make_plan(), size) for size in (60, 600, 6000)}) == 3


def test_the_round_that_trains_most_decides_the_number_of_coordinates(make_plan: MakePlan) -> None:
    plan = make_plan()
    small = shared_noise_plan(plan)
    lora = LoraAdapter(**msgspec.structs.asdict(plan.lora) | {"method": "alternate"})
    alternate = msgspec.structs.replace(small, lora=lora)
    sizes = {number: sum(t.size for t in alternate.trained_tensors(number)) for number in (1, 2)}
    assert sizes[1] == sizes[2]
    # A number of coordinates is worth half its root in steps of the grid.
    both, one = cost_of(small).everybody, cost_of(alternate).everybody
    apart = (math.sqrt(45) - math.sqrt(sizes[1])) / 2
    norm = small.privacy.clip_norm / small.aggregation.step  # type: ignore[union-attr]  # private
    assert one.noise_multiplier / both.noise_multiplier - 1 == pytest.approx(apart / norm, rel=0.01)


def test_counts_of_held_out_records_cost_the_same_whoever_looks(make_plan: MakePlan) -> None:
    evaluation = ScoreEvaluation(noise_multiplier=9.0, max_records=100)
    plan = shared_noise_plan(make_plan(), attempts=7, evaluation=evaluation)
    cost = cost_of(plan)
    counts = DpEvent(9.0, 1.0, 7)
    assert cost.for_everybody(7) == (msgspec.structs.replace(cost.everybody, steps=7), counts)
    assert cost.for_readers(7) == (msgspec.structs.replace(cost.shared, steps=7), counts)
    assert cost.for_readers(0) == ()


def test_a_plan_that_is_not_of_this_mode_has_no_such_cost(make_plan: MakePlan) -> None:
    assert attempt_cost(make_plan()) is None
    judge_cost(Policy(), make_plan())


def test_a_plan_that_costs_what_it_claims_passes(make_plan: MakePlan) -> None:
    judge_cost(LAW, shared_noise_plan(make_plan()))


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.99},
        {"delta": 0.9e-5},
        {"honest": 2},
        {"noise_bits": 19},
        {"sampling_rate": 0.094},
        {"most_attempts": 102},
        {"clip_norm": 1.01},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_plan_that_costs_more_than_it_claims_is_refused(
    make_plan: MakePlan, change: dict[str, Any]
) -> None:
    assert refusal(with_privacy(shared_noise_plan(make_plan()), **change)) == "claim-exceeded"


def test_counts_are_part_of_what_a_plan_claims(make_plan: MakePlan) -> None:
    evaluation = ScoreEvaluation(noise_multiplier=9.0, max_records=100)
    assert refusal(shared_noise_plan(make_plan(), evaluation=evaluation)) == "claim-exceeded"


def test_what_it_costs_against_everybody_is_held_to_max_epsilon(make_plan: MakePlan) -> None:
    plan = shared_noise_plan(make_plan())
    found = cost_of(plan).epsilons(1e-5).everybody
    assert refusal(plan, Policy(max_epsilon=0.999 * found)) == "epsilon-too-large"
    judge_cost(Policy(max_epsilon=1.001 * found), plan)


def test_noise_that_is_too_coarse_to_be_compared_is_refused(make_plan: MakePlan) -> None:
    plan = with_privacy(shared_noise_plan(make_plan()), noise_bits=2)
    with pytest.raises(CalibrationError, match="too few steps"):
        judge_cost(LAW, plan)


def test_each_attempt_is_an_event_of_its_own(make_plan: MakePlan) -> None:
    cost = cost_of(shared_noise_plan(make_plan(), attempts=2))
    both = [cost.shared, cost.shared]
    assert cost.epsilons(1e-5).shared == epsilon(both, 1e-5) > epsilon([cost.shared], 1e-5)
