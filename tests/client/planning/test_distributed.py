"""Numbers of a plan in distributed mode: a site computes them again and finds the promise kept."""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from umbel_client.planning import distributed
from umbel_client.planning.distributed import (
    DraftAggregation,
    DraftDistributed,
    Numbers,
    numbers_of,
    planned,
)
from umbel_client.privacy.accounting import DpEvent, calibrate, epsilon
from umbel_client.privacy.attempt_cost import attempt_cost, judge_cost
from umbel_client.privacy.shared_noise import shares_of
from umbel_client.site.policy import Policy
from umbel_common.errors import PlanError, PolicyRefusal
from umbel_common.plans.check import check_plan
from umbel_common.plans.largest_sum import largest_cohort
from umbel_common.plans.plan import (
    Adam,
    DistributedPrivacy,
    FederatedEvaluation,
    Lora,
    NoOptimizer,
    Tensor,
    Training,
    TrainingPlan,
    TrainingPlan2,
    second_version,
)
from umbel_common.plans.server_optimizer import Average, ServerSgd
from umbel_common.secagg.encoding import encoding_of

PAGE = Path(__file__).parents[3] / "docs" / "operator.md"
TRAINING = Training(rounds=20, local_steps=1, expected_batch_size=64, optimizer=NoOptimizer())
AGGREGATION = DraftAggregation(threshold=3)
DRAFT = DraftDistributed(
    epsilon=3.0, delta=1e-5, clip_norm=0.5, sampling_rate=1.0, honest=2, least_survivors=3
)
SERVER = ServerSgd(adapter_learning_rate=0.5, head_learning_rate=1.0)
COUNTED = FederatedEvaluation(noise_multiplier=20.0, max_records=100)

MakePlan = Callable[..., TrainingPlan]


@pytest.fixture(autouse=True)
def calibrated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "calibrate", CALIBRATE)


CALIBRATE = functools.cache(calibrate)


def lora_of(coordinates: int) -> Lora:
    """An adapter of a round that trains so many numbers."""
    assert coordinates % 4 == 0
    size = coordinates // 4
    return Lora(
        rank=2,
        alpha=4.0,
        target_modules=("query",),
        layers=None,
        method="both",
        seed=7,
        tensors=(
            Tensor(name="query.lora_A.weight", shape=(2, size), role="lora_A"),
            Tensor(name="query.lora_B.weight", shape=(size, 2), role="lora_B"),
        ),
    )


def plan_of(
    make_plan: MakePlan,
    coordinates: int,
    draft: DraftDistributed = DRAFT,
    aggregation: DraftAggregation = AGGREGATION,
    training: Training = TRAINING,
    evaluation: FederatedEvaluation | None = None,
) -> TrainingPlan2:
    """The plan that a draft gives, as `umbel-server plan new` makes it."""
    lora = lora_of(coordinates)
    privacy, summed = planned(draft, aggregation, training, lora, evaluation)
    plan = make_plan(
        lora=lora, training=training, privacy=privacy, aggregation=summed, evaluation=evaluation
    )
    plan = second_version(plan, server=SERVER)
    check_plan(plan)
    return plan


def rounding_cost(plan: TrainingPlan) -> float:
    """How much more noise a plan has than one that rounds nothing, at the same sensitivity."""
    shares = shares_of(plan)
    return shares.sensitivity / (shares.clip_norm / shares.grid) - 1


@pytest.mark.parametrize("ring_bits", [16, 32])
@pytest.mark.parametrize(
    "honest", [2, *(pytest.param(one, marks=pytest.mark.full) for one in (1, 7))]
)
@pytest.mark.parametrize("claim", [1.0, pytest.param(8.0, marks=pytest.mark.full)])
def test_a_plan_keeps_its_claim_and_fits_its_ring_for_every_size(
    make_plan: MakePlan, claim: float, honest: int, ring_bits: int
) -> None:
    aggregation = DraftAggregation(threshold=honest + 2, ring_bits=ring_bits)
    draft = msgspec.structs.replace(DRAFT, epsilon=claim, honest=honest, least_survivors=honest + 2)
    for coordinates in (4, 100, 20_000, 4_000_000):
        plan = None
        with nullcontext() if ring_bits == 32 or coordinates == 4 else suppress(PlanError):
            plan = plan_of(make_plan, coordinates, draft, aggregation)
        if plan is None:
            continue
        privacy = plan.privacy
        assert isinstance(privacy, DistributedPrivacy)
        cost = attempt_cost(plan)
        assert cost is not None
        found = epsilon(cost.for_readers(privacy.most_attempts), privacy.delta)
        assert 0.999 * claim < found <= claim
        judge_cost(Policy(max_epsilon=math.inf), plan)
        assert rounding_cost(plan) <= (0.1 if ring_bits == 16 else 0.02)
        most_sites = largest_cohort(aggregation.threshold)
        encoding_of(plan, most_sites).prove_headroom()
        # A unit at the clip norm is never cut.
        assert plan.aggregation.clip_range >= privacy.clip_norm


@pytest.mark.full
def test_a_claim_at_a_small_sampling_rate_holds_with_an_evaluation(make_plan: MakePlan) -> None:
    draft = msgspec.structs.replace(DRAFT, sampling_rate=0.05)
    plan = plan_of(make_plan, 400, draft, evaluation=COUNTED)
    cost = attempt_cost(plan)
    assert cost is not None
    assert cost.counts == DpEvent(COUNTED.noise_multiplier, 1.0, 1)
    assert 2.9 < cost.epsilons(1e-5).shared <= 3.0
    # The steps alone would have more noise than a plan without an evaluation.
    without = plan_of(make_plan, 400, draft)
    assert shares_of(plan).noise_multiplier(2) > shares_of(without).noise_multiplier(2)


@pytest.mark.parametrize(
    ("rounds", "spare", "attempts"), [(20, None, 22), (50, None, 55), (20, 0, 20), (20, 7, 27)]
)
def test_attempts_are_rounds_and_the_spare_ones(
    rounds: int, spare: int | None, attempts: int
) -> None:
    draft = msgspec.structs.replace(DRAFT, spare_attempts=spare)
    training = msgspec.structs.replace(TRAINING, rounds=rounds)
    assert numbers_of(draft, AGGREGATION, training, 100, None).privacy.most_attempts == attempts


def test_a_draft_names_no_step(make_plan: MakePlan) -> None:
    with pytest.raises(PlanError, match="the grid follows from the noise") as caught:
        plan_of(make_plan, 100, aggregation=DraftAggregation(threshold=3, step=1e-6))
    assert caught.value.field == "aggregation.step"


def test_a_ring_of_16_bits_has_no_room_for_many_numbers(make_plan: MakePlan) -> None:
    narrow = DraftAggregation(threshold=3, ring_bits=16)
    with pytest.raises(PlanError, match="costs too much noise") as caught:
        plan_of(make_plan, 100_000, aggregation=narrow)
    assert caught.value.field == "aggregation.ring_bits"
    plan_of(make_plan, 100_000)


def test_a_clip_range_past_the_ring_is_refused(make_plan: MakePlan) -> None:
    wide = DraftAggregation(threshold=3, ring_bits=32, clip_range=1e6)
    with pytest.raises(PlanError, match="no room for gradients"):
        plan_of(make_plan, 100, aggregation=wide)


def changed(plan: TrainingPlan2, part: str, **changes: Any) -> TrainingPlan2:
    """A plan with other fields in one of its parts; `part` may be empty, for the plan itself."""
    if not part:
        return msgspec.structs.replace(plan, **changes)
    value = msgspec.structs.replace(getattr(plan, part), **changes)
    return msgspec.structs.replace(plan, **{part: value})


@pytest.mark.parametrize(
    ("part", "changes", "field"),
    [
        ("training", {"local_steps": 2}, "training.local_steps"),
        (
            "training",
            {"optimizer": Adam(adapter_learning_rate=1e-3, head_learning_rate=1e-2)},
            "training.optimizer",
        ),
        ("training", {"average_decay": 0.9}, "training.average_decay"),
        ("training", {"final_learning_rate": 0.5}, "training.final_learning_rate"),
        ("", {"own_server": Average()}, "server.optimizer"),
        ("aggregation", {"weights": "size-class", "max_weight": 3}, "aggregation.weights"),
        ("aggregation", {"weights": "examples", "max_weight": 3}, "aggregation.weights"),
        ("aggregation", {"threshold": 4}, "privacy.least_survivors"),
        ("aggregation", {"step": 1e-9}, "aggregation.step"),
        ("aggregation", {"ring_bits": 16}, "aggregation.ring_bits"),
        ("privacy", {"noise_bits": 3}, "privacy.noise_bits"),
        ("aggregation", {"clip_range": 1e6}, "aggregation.ring_bits"),
        ("privacy", {"honest": 4}, "privacy.honest"),
        ("privacy", {"most_attempts": 19}, "privacy.most_attempts"),
    ],
)
def test_what_the_proof_does_not_cover_is_no_plan(
    make_plan: MakePlan, part: str, changes: dict[str, Any], field: str
) -> None:
    plan = plan_of(make_plan, 100)
    with pytest.raises(PlanError) as caught:
        check_plan(changed(plan, part, **changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("privacy", {"epsilon": 2.9}),
        ("privacy", {"honest": 1}),
        ("privacy", {"noise_bits": 10}),
        ("privacy", {"most_attempts": 23}),
        ("privacy", {"clip_norm": 0.6}),
        ("aggregation", {"step": 1e-7}),
    ],
)
def test_numbers_that_promise_too_little_are_refused_by_a_site(
    make_plan: MakePlan, part: str, changes: dict[str, Any]
) -> None:
    plan = plan_of(make_plan, 100)
    law = Policy(max_epsilon=math.inf)
    judge_cost(law, plan)
    with pytest.raises(PolicyRefusal) as caught:
        judge_cost(law, changed(plan, part, **changes))
    assert caught.value.check == "claim-exceeded"


def most_numbers(sites: int, claim: float) -> tuple[int, int]:
    """The threshold of the page, and whether a number of coordinates still fits, by its table."""
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("|")]
    column = {1.0: 3, 3.0: 4, 8.0: 5}[claim]
    for row in rows:
        cells = [cell.strip().replace(",", "") for cell in row]
        if len(cells) == 6 and cells[0] == str(sites) and cells[1].isdigit():
            return int(cells[1]), int(cells[column])
    raise AssertionError(f"no row for {sites} sites")


def fitted(threshold: int, claim: float, coordinates: int) -> Numbers:
    draft = DraftDistributed(
        epsilon=claim,
        delta=1e-5,
        clip_norm=1.0,
        sampling_rate=0.05,
        honest=threshold - 1,
        least_survivors=threshold,
    )
    training = msgspec.structs.replace(TRAINING, rounds=300, expected_batch_size=512)
    aggregation = DraftAggregation(threshold=threshold, ring_bits=16)
    numbers = numbers_of(draft, aggregation, training, coordinates, None)
    aggregation.shared(draft, training, numbers)
    return numbers


@pytest.mark.parametrize(
    "claim", [8.0, *(pytest.param(one, marks=pytest.mark.full) for one in (1.0, 3.0))]
)
def test_the_page_says_for_which_numbers_16_bits_serve(claim: float) -> None:
    for sites in (4, 10):
        threshold, most = most_numbers(sites, claim)
        assert 2 * threshold > sites + 1 >= 2 * (threshold - 1)
        fitted(threshold, claim, most)
        with pytest.raises(PlanError):
            fitted(threshold, claim, math.ceil(1.1 * most))
