"""Each rule of the site's law, at its edge: what is just allowed passes, one more is refused."""

import math
from collections.abc import Callable
from datetime import time

import msgspec
import pytest
from support.shared_noise_plans import shared_noise_plan

from umbel_client.site.policy import (
    Budget,
    Policy,
    judge_header,
    judge_operator,
    judge_plan,
    judge_start,
    judge_survivors,
)
from umbel_common.errors import PolicyRefusal
from umbel_common.plans.plan import (
    Aggregation,
    BaseModel,
    CausalLm,
    Classification,
    LocalPrivacy,
    NoPrivacy,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.server_optimizer import ServerSgd
from umbel_common.plans.start import LabelNamesStart, ReleasedStart
from umbel_common.plans.statements import RoundHeader

MakePlan = Callable[..., TrainingPlan]

LAW = Policy(
    models=("00" * 32,),
    labels=("a", "b", "c"),
    max_rank=2,
    max_rounds=3,
    max_local_steps=2,
    max_epsilon=8.0,
    total_epsilon=8.0,
    max_delta=1e-5,
    minimum_cohort=2,
)


def header(*cohort: str) -> RoundHeader:
    return RoundHeader(
        federation="clinics",
        job="job",
        round=1,
        attempt=1,
        plan=bytes(32),
        roster=bytes(32),
        adapter=bytes(32),
        cohort=cohort,
    )


def refusal(law: Policy, plan: TrainingPlan) -> str:
    with pytest.raises(PolicyRefusal) as caught:
        judge_plan(law, plan)
    return caught.value.check


def test_a_plan_at_every_limit_is_allowed(make_plan: MakePlan) -> None:
    judge_plan(LAW, make_plan())


def test_the_defaults_refuse_every_model(make_plan: MakePlan) -> None:
    assert refusal(Policy(), make_plan()) == "model-not-allowed"


def test_a_model_that_writes_text_must_be_allowed_by_name(make_plan: MakePlan) -> None:
    plan = msgspec.structs.replace(make_plan(), task=CausalLm())
    assert refusal(LAW, plan) == "task-not-allowed"
    judge_plan(msgspec.structs.replace(LAW, tasks=("causal-lm",), labels=()), plan)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"models": ("11" * 32,)}, "model-not-allowed"),
        ({"tasks": ()}, "task-not-allowed"),
        ({"labels": ()}, "labels-not-allowed"),
        ({"max_tokens": (64, 256)}, "max-tokens-not-allowed"),
        ({"max_rank": 1}, "rank-too-large"),
        ({"target_modules": ("value", "dense")}, "targets-not-allowed"),
        ({"max_clip_range": 0.9}, "clip-range-too-large"),
        ({"max_rounds": 2}, "too-many-rounds"),
        ({"max_local_steps": 1}, "too-many-local-steps"),
        ({"max_epsilon": 7.99}, "epsilon-too-large"),
        ({"max_delta": 0.99e-5}, "delta-too-large"),
    ],
)
def test_a_plan_past_a_limit_is_refused_by_the_name_of_the_rule(
    make_plan: MakePlan, change: dict[str, object], check: str
) -> None:
    assert refusal(msgspec.structs.replace(LAW, **change), make_plan()) == check


def test_the_clip_range_bounds_the_servers_steps_too(make_plan2: MakePlan) -> None:
    """Three rounds of momentum 0.9 make a change 2.71 times as long."""

    def plan(rate: float) -> TrainingPlan:
        return make_plan2(server=ServerSgd(adapter_learning_rate=1e-3, head_learning_rate=rate))

    judge_plan(LAW, plan(1 / 2.72))
    assert refusal(LAW, plan(1 / 2.70)) == "clip-range-too-large"


@pytest.mark.parametrize("name", ["mini\x1b[8mlm", "mini\u202elm", "a\nb", "m" * 257])
def test_a_name_that_would_write_on_the_screen_is_refused_before_anybody_sees_it(
    make_plan: MakePlan, name: str
) -> None:
    assert refusal(LAW, make_plan(model=BaseModel(name=name, digest=bytes(32)))) == "model-name"
    judge_plan(LAW, make_plan(model=BaseModel(name="m" * 256, digest=bytes(32))))


@pytest.mark.parametrize("labels", ["ab", "abcd", "abd", "acb", "abC"])
def test_a_plan_must_name_exactly_the_labels_of_the_site_in_its_order(
    make_plan: MakePlan, labels: str
) -> None:
    plan = make_plan(task=Classification(labels=tuple(labels)))
    assert refusal(LAW, plan) == "labels-not-allowed"
    judge_plan(msgspec.structs.replace(LAW, labels=tuple(labels)), plan)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"max_tokens": (64, 511, 513)}, "max-tokens-not-allowed"),
        ({"templates": ("plain",)}, "template-not-allowed"),
        ({"loss_on": ("all",)}, "loss-not-allowed"),
        ({"too_long": ("truncate",)}, "too-long-not-allowed"),
    ],
)
def test_how_a_language_models_records_are_read_is_the_sites_to_say(
    make_plan: MakePlan, change: dict[str, object], check: str
) -> None:
    law = msgspec.structs.replace(LAW, tasks=("causal-lm",))
    plan = msgspec.structs.replace(make_plan(), task=CausalLm())
    assert refusal(msgspec.structs.replace(law, **change), plan) == check
    exact = {"max_tokens": (512,), "templates": ("chat",), "loss_on": ("answer",)}
    judge_plan(msgspec.structs.replace(law, **exact, too_long=("refuse",)), plan)


def test_a_start_is_one_that_the_policy_names_within_its_numbers(make_plan: MakePlan) -> None:
    start = LabelNamesStart(tensor=bytes(32), names=("a", "b", "c"), scale=10.0, tolerance=0.02)
    law = msgspec.structs.replace(LAW, starts=("label-names",))
    judge_plan(law, second_version(make_plan(), start=start))
    assert refusal(law, make_plan()) == "start-not-allowed"
    for kind in (start, ReleasedStart(bytes(32), bytes(32), 1, 1.0)):
        assert refusal(LAW, second_version(make_plan(), start=kind)) == "start-not-allowed"
    for change, check in (
        ({"scale": 10.1}, "start-scale-too-large"),
        ({"tolerance": 0.021}, "start-tolerance-too-large"),
    ):
        other = msgspec.structs.replace(start, **change)
        assert refusal(law, second_version(make_plan(), start=other)) == check


@pytest.mark.parametrize("epsilon", [math.inf, math.nan])
def test_an_epsilon_that_promises_nothing_is_refused(make_plan: MakePlan, epsilon: float) -> None:
    plan = make_plan(privacy=LocalPrivacy(epsilon=epsilon, delta=1e-5, clip_norm=1.0))
    assert refusal(LAW, plan) == "epsilon-too-large"


def test_a_plan_without_privacy_must_be_allowed_by_name(make_plan: MakePlan) -> None:
    plan = make_plan(privacy=NoPrivacy())
    assert refusal(LAW, plan) == "privacy-required"
    judge_plan(msgspec.structs.replace(LAW, allow_without_privacy=True), plan)


def test_a_threshold_below_the_sites_smallest_cohort_is_refused(make_plan: MakePlan) -> None:
    strict = msgspec.structs.replace(LAW, minimum_cohort=3)
    assert refusal(strict, make_plan()) == "threshold-below-minimum"


def test_weights_by_number_of_records_must_be_allowed_by_name(make_plan: MakePlan) -> None:
    weights = Aggregation(
        threshold=2, clip_range=1.0, step=1e-6, weights="examples", max_weight=1000
    )
    plan = make_plan(aggregation=weights)
    assert refusal(LAW, plan) == "example-weights"
    judge_plan(msgspec.structs.replace(LAW, examples_as_weights=True), plan)


def test_a_refusal_tells_the_site_what_was_found_and_what_is_accepted(make_plan: MakePlan) -> None:
    with pytest.raises(PolicyRefusal) as caught:
        judge_plan(msgspec.structs.replace(LAW, max_epsilon=2.0), make_plan())
    text = caught.value.diagnostics()
    for part in ("policy.max_epsilon", "found: 8.0", "at most 2", "what to do"):
        assert part in text


def test_of_the_named_layers_a_plan_may_take_some(make_plan: MakePlan) -> None:
    judge_plan(msgspec.structs.replace(LAW, target_modules=("query", "value")), make_plan())


def test_only_an_operator_that_the_policy_names_is_worked_for() -> None:
    judge_operator(Policy(), "aaaa-bbbb")
    judge_operator(Policy(operators=("aaaa-bbbb",)), "aaaa-bbbb")
    with pytest.raises(PolicyRefusal, match="aaaa-bbbc"):
        judge_operator(Policy(operators=("aaaa-bbbb",)), "aaaa-bbbc")


def start_refusal(law: Policy, moment: str, seconds: float = 0.0) -> str | None:
    try:
        judge_start(law, time.fromisoformat(moment), seconds)
    except PolicyRefusal as error:
        return error.check
    return None


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("08:00-18:00", ("08:00", "12:00", "17:59:59"), ("07:59:59", "18:00", "00:00")),
        ("20:00-06:00", ("20:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "19:59")),
    ],
)
def test_a_round_begins_within_the_allowed_hours(
    hours: str, inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    law = Policy(allowed_hours=hours)
    assert {start_refusal(law, moment) for moment in inside} == {None}
    assert {start_refusal(law, moment) for moment in outside} == {"outside-hours"}
    assert start_refusal(Policy(), outside[0]) is None


def test_a_plan_has_so_many_hours_of_training_and_no_more() -> None:
    law = Policy(max_hours=0.5)
    assert start_refusal(law, "12:00", 1799.9) is None
    assert start_refusal(law, "12:00", 1800.0) == "too-many-hours"


@pytest.mark.parametrize("hours", ["8:00-18:00", "24:00-06:00", "20:00", "20:60-06:00", "x"])
def test_hours_that_are_none_are_no_policy(hours: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"allowed_hours": hours}, Policy)


def test_the_budget_is_the_total_of_the_data_set(make_plan: MakePlan) -> None:
    budget = LAW.budget(make_plan())
    assert (budget.epsilon, budget.delta) == (8.0, 1e-5)


def test_only_an_allowed_plan_without_privacy_has_no_budget(make_plan: MakePlan) -> None:
    open_law = msgspec.structs.replace(LAW, allow_without_privacy=True)
    plan = make_plan(privacy=NoPrivacy())
    assert LAW.budget(plan).epsilon == 8.0
    assert open_law.budget(plan).epsilon == math.inf
    assert open_law.budget(make_plan()).epsilon == 8.0


def header_refusal(law: Policy, plan: TrainingPlan, cohort: str) -> str | None:
    """The check that refuses a cohort of one-letter sites; None if none does."""
    try:
        judge_header(law, plan, header(*cohort))
    except PolicyRefusal as error:
        return error.check
    return None


def survivors_refusal(
    law: Policy,
    plan: TrainingPlan,
    survivors: str,
    *,
    same_round: tuple[str, ...] = (),
    ever: tuple[str, ...] = (),
) -> str | None:
    """The check that refuses a sum over one-letter sites; None if none does."""
    former = [tuple(names) for names in same_round]
    all_former = [tuple(names) for names in ever]
    try:
        judge_survivors(law, plan, tuple(survivors), same_round=former, ever=all_former)
    except PolicyRefusal as error:
        return error.check
    return None


def with_threshold(threshold: int) -> Aggregation:
    return Aggregation(threshold=threshold, clip_range=1.0, step=1e-6)


def test_a_cohort_must_have_the_minimum_size(make_plan: MakePlan) -> None:
    plan = make_plan(aggregation=with_threshold(3))
    strict = msgspec.structs.replace(LAW, minimum_cohort=3)
    assert header_refusal(strict, plan, "ab") == "cohort-too-small"
    assert header_refusal(strict, plan, "abc") is None


@pytest.mark.parametrize(
    ("sites", "colluding", "lowest"), [(3, 1, 3), (4, 1, 3), (5, 1, 4), (5, 0, 3), (5, 2, 4)]
)
def test_a_threshold_must_make_two_survivor_sets_share_an_honest_site(
    make_plan: MakePlan, sites: int, colluding: int, lowest: int
) -> None:
    law = msgspec.structs.replace(LAW, colluding_sites=colluding)
    cohort = "abcdefgh"[:sites]
    enough, too_low = with_threshold(lowest), with_threshold(lowest - 1)
    assert header_refusal(law, make_plan(aggregation=enough), cohort) is None
    assert header_refusal(law, make_plan(aggregation=too_low), cohort) == "threshold-too-low"


def test_a_cohort_must_be_able_to_reach_the_threshold(make_plan: MakePlan) -> None:
    plan = make_plan(aggregation=with_threshold(4))
    assert header_refusal(LAW, plan, "abc") == "threshold-too-high"
    assert header_refusal(LAW, plan, "abcd") is None


@pytest.mark.parametrize(
    ("survivors", "check"),
    [
        ("abcde", None),
        ("edcba", None),
        ("abcd", "cohort-difference"),
        ("abcdef", "cohort-difference"),
        ("abcdf", None),
        ("abc", None),
    ],
)
def test_without_privacy_survivors_may_not_differ_by_a_single_site(
    make_plan: MakePlan, survivors: str, check: str | None
) -> None:
    plan = make_plan(privacy=NoPrivacy())
    assert survivors_refusal(LAW, plan, survivors, ever=("abcde",)) == check


@pytest.mark.parametrize(
    ("least", "survivors", "check"),
    [
        (1, "abcd", None),
        (3, "abc", "cohort-difference"),
        (3, "abcdf", "cohort-difference"),
        (3, "ab", None),
        (3, "abcde", None),
    ],
)
def test_the_site_sets_by_how_many_sites_survivors_must_differ(
    make_plan: MakePlan, least: int, survivors: str, check: str | None
) -> None:
    law = msgspec.structs.replace(LAW, minimum_cohort_difference=least)
    plan = make_plan(privacy=NoPrivacy())
    assert survivors_refusal(law, plan, survivors, ever=("abcde",)) == check


def test_every_set_that_was_ever_confirmed_counts(make_plan: MakePlan) -> None:
    plan = make_plan(privacy=NoPrivacy())
    for ever in (("abcdgh", "abcde"), ("abcde", "abcdgh")):
        assert survivors_refusal(LAW, plan, "abcd", ever=ever) == "cohort-difference"
    # Nor does a set that was confirmed before excuse its difference from another one.
    assert survivors_refusal(LAW, plan, "abcd", ever=("abcd", "abcde")) == "cohort-difference"


def test_with_privacy_survivors_may_differ_from_round_to_round(make_plan: MakePlan) -> None:
    assert survivors_refusal(LAW, make_plan(), "abcd", ever=("abcde",)) is None


@pytest.mark.parametrize("private", [True, False])
def test_one_delta_goes_into_one_set_of_survivors(make_plan: MakePlan, private: bool) -> None:
    plan = make_plan() if private else make_plan(privacy=NoPrivacy())
    # Another set is refused within the round even where the policy allows any between rounds.
    lenient = msgspec.structs.replace(LAW, minimum_cohort_difference=1)
    for law in (LAW, lenient):
        assert survivors_refusal(law, plan, "abc") is None
        assert survivors_refusal(law, plan, "abc", same_round=("abc",), ever=("abc",)) is None
        for survivors in ("ab", "abcd", "def"):
            former = {"same_round": ("abc",), "ever": ("abc",)}
            assert survivors_refusal(law, plan, survivors, **former) == "survivors-differ"


SHARING = msgspec.structs.replace(
    LAW, max_shared_epsilon=1.0, total_shared_epsilon=2.0, colluding_sites=1, minimum_cohort=2
)


@pytest.mark.parametrize("missing", ["max_shared_epsilon", "total_shared_epsilon"])
def test_a_policy_that_does_not_name_shared_noise_refuses_it(
    make_plan: MakePlan, missing: str
) -> None:
    plan = shared_noise_plan(make_plan())
    judge_plan(SHARING, plan)
    with pytest.raises(PolicyRefusal) as caught:
        judge_plan(msgspec.structs.replace(SHARING, **{missing: None}), plan)
    assert (caught.value.check, caught.value.field) == (
        "distributed-not-allowed",
        f"policy.{missing}",
    )


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"max_shared_epsilon": 0.999}, "claim-too-large"),
        ({"max_delta": 0.99e-5}, "delta-too-large"),
        ({"colluding_sites": 2}, "too-many-honest"),
        ({"minimum_cohort": 5}, "survivors-below-minimum"),
    ],
)
def test_shared_noise_past_a_limit_is_refused(
    make_plan: MakePlan, change: dict[str, object], check: str
) -> None:
    """At these limits, with three honest sites of at least four, the plan is allowed."""
    plan = shared_noise_plan(make_plan())
    # The floor of survivors is another number than the threshold of shares.
    aggregation = msgspec.structs.replace(plan.aggregation, threshold=5)
    plan = msgspec.structs.replace(plan, aggregation=aggregation)
    judge_plan(msgspec.structs.replace(SHARING, minimum_cohort=4), plan)
    assert refusal(msgspec.structs.replace(SHARING, **change), plan) == check


@pytest.mark.parametrize("sent", [{"clip_range": 1e6}, {"step": 1.0}], ids=["range", "noise"])
def test_a_short_clip_norm_hides_no_long_range_and_no_long_noise(
    make_plan: MakePlan, sent: dict[str, float]
) -> None:
    plan = shared_noise_plan(make_plan())
    privacy = msgspec.structs.replace(plan.privacy, clip_norm=1e-4)
    plan = msgspec.structs.replace(plan, privacy=privacy)
    judge_plan(SHARING, plan)
    aggregation = msgspec.structs.replace(plan.aggregation, **sent)
    plan = msgspec.structs.replace(plan, aggregation=aggregation)
    assert refusal(SHARING, plan) == "clip-range-too-large"


def test_the_budget_of_a_plan_has_both_totals(make_plan: MakePlan) -> None:
    open_law = msgspec.structs.replace(SHARING, allow_without_privacy=True)
    assert open_law.budget(make_plan()) == Budget(8.0, 1e-5, 2.0)
    assert open_law.budget(make_plan(privacy=NoPrivacy())) == Budget(math.inf, 1e-5)
    assert LAW.budget(make_plan()) == Budget(8.0, 1e-5)


def test_a_site_confirms_no_sum_with_fewer_shares_of_noise_than_the_plan_says(
    make_plan: MakePlan,
) -> None:
    plan = shared_noise_plan(make_plan())
    judge_survivors(SHARING, plan, ("a", "b", "c", "d"), same_round=(), ever=())
    for few in (("a", "b", "c"), ("a", "b", "c", "c")):
        with pytest.raises(PolicyRefusal) as caught:
            judge_survivors(SHARING, plan, few, same_round=(), ever=())
        assert caught.value.check == "survivors-below-plan"


def test_attempts_that_share_no_noise_may_have_other_survivors(make_plan: MakePlan) -> None:
    first, second = ("a", "b", "c", "d"), ("a", "b", "c", "e")
    earlier = {"same_round": (first,), "ever": (first,)}
    judge_survivors(SHARING, shared_noise_plan(make_plan()), second, **earlier)
    with pytest.raises(PolicyRefusal) as caught:
        judge_survivors(SHARING, make_plan(), second, **earlier)
    assert caught.value.check == "survivors-differ"
