"""A server that wants less noise in a sum than the plan of distributed mode promises."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from adversarial.federation import Federation
from adversarial.weaken import Stopped
from support.shared_noise_plans import shared_noise_plan

from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.rows import AttemptKey
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.privacy.attempt_cost import AttemptCost, attempt_cost
from umbel_client.storage.noisy_sums import NoisySums
from umbel_common.errors import PlanError
from umbel_common.plans import check
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import TrainingPlan, TrainingPlan2
from umbel_common.plans.server_optimizer import ServerSgd
from umbel_common.protocol.wire import OfferRequest
from umbel_common.secagg.encoding import RingVector
from umbel_common.trust.identity import sign

SITE, LAST = "site-00", "site-03"
ALLOWED = {"*": "max_shared_epsilon = 1.0\ntotal_shared_epsilon = 8.0"}
CLAIM, DELTA = 1.0, 1e-5
SHARING: dict[str, Any] = {
    "epsilon": CLAIM,
    "honest": 3,
    "least_survivors": 4,
    "sampling_rate": 1.0,
    "attempts": 2,
    "own_server": ServerSgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
}
"""Four sites, of which one may collude: the noise of three is relied on."""


def sharing(open_federation: Callable[..., Federation], **changes: Any) -> Federation:
    return open_federation(4, ALLOWED, sharing={**SHARING, **changes})


def attempts_of(federation: Federation, site: str) -> dict[AttemptKey, Any]:
    """The attempts in a site's ledger, which is closed for it."""
    federation.trainers[site].close()
    path = federation.folder / site / "state" / "ledger.sqlite"
    return dict(read_ledger(path).attempts) if path.exists() else {}


def is_sum_of(federation: Federation, total: RingVector, *sites: str, attempt: int = 1) -> bool:
    """Whether a ring vector is the sum of the noisy sums of these sites and no other."""
    found = total.view(np.int32)[1:].astype(np.int64)
    expected = np.zeros_like(found)
    for site in sites:
        known = attempts_of(federation, site)[AttemptKey(federation.plan.job, 1, attempt)]
        folder = federation.folder / site / "state" / "deltas" / federation.plan.job
        expected += NoisySums(folder).load(1, attempt, known.vector)[1]
    return bool(total[0] == len(sites) and np.array_equal(found, expected))


def epsilon_with(plan: TrainingPlan, honest: int) -> float:
    """What one attempt costs, where so many sites keep their noise."""
    privacy: Any = msgspec.structs.replace(plan.privacy, honest=honest)
    cost = cost_of(msgspec.structs.replace(plan, privacy=privacy))
    return epsilon([cost.shared], DELTA)


def cost_of(plan: TrainingPlan) -> AttemptCost:
    found = attempt_cost(plan)
    assert found is not None
    return found


@pytest.mark.attack("survivors-below-plan", "too-few-survivors")
def test_a_server_has_sites_confirm_a_sum_of_fewer_than_the_floor(
    open_federation: Callable[..., Federation],
) -> None:
    """The threshold, three, would open it; with an accomplice in it, two shares of noise are left
    where three were promised."""
    federation = sharing(open_federation)
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    requests = attempt.requests()
    replies = {site: federation.ask(site, requests[site]) for site in requests if site != LAST}
    outcome = federation.drive(federation.take(attempt, replies))
    survivors = outcome.aggregate.survivors
    assert len(survivors) == 3
    assert is_sum_of(federation, outcome.aggregate.total, *survivors)
    assert epsilon_with(federation.plan, 2) > 1.15 * epsilon_with(federation.plan, 3)


@pytest.mark.full
@pytest.mark.attack(
    "cohort-too-small",
    "too-few-adverts",
    "too-few-shares",
    "too-few-survivors",
    "survivors-below-plan",
)
def test_a_server_asks_for_a_cohort_below_the_floor(
    open_federation: Callable[..., Federation], kept: str | None
) -> None:
    federation = sharing(open_federation)
    federation.offer()
    cohort = tuple(sorted(federation.identities))[:3]
    try:
        outcome = federation.drive(federation.attempt(federation.header(cohort=cohort)))
    finally:
        # The first check refuses before anything is charged.
        charged = any(attempts_of(federation, site) for site in cohort)
        assert charged == (kept != "cohort-too-small")
    assert is_sum_of(federation, outcome.aggregate.total, *cohort)


@pytest.mark.attack("most-attempts")
def test_a_server_asks_for_more_attempts_than_the_claim_covers(
    open_federation: Callable[..., Federation],
) -> None:
    federation = sharing(open_federation)
    federation.offer(None, SITE)
    most = SHARING["attempts"]
    for number in range(1, most + 2):
        request = federation.train_request(federation.header(attempt=number))
        try:
            federation.ask(SITE, request)
        except Stopped:
            assert number == most + 1
            assert len(attempts_of(federation, SITE)) == most
            raise
    charged = attempts_of(federation, SITE)
    assert len(charged) == most + 1
    assert epsilon([one.cost.shared for one in charged.values()], DELTA) > CLAIM


def two_sums(federation: Federation, second: int) -> tuple[RingVector, RingVector]:
    """The sums of two attempts at round 1: of all four sites, and of three, as attempt `second`."""
    everyone = tuple(sorted(federation.identities))
    first = federation.drive(federation.attempt(federation.header(cohort=everyone)))
    header = federation.header(cohort=everyone[:3], attempt=second)
    again = federation.drive(federation.attempt(header))
    return first.aggregate.total, again.aggregate.total


@pytest.mark.full
@pytest.mark.attack("attempt-reused", "unique-attempt", "survivors-differ")
def test_a_server_uses_an_attempt_number_twice_and_subtracts(
    open_federation: Callable[..., Federation],
) -> None:
    """A site computes an attempt once. Under two headers of one number it would send one vector
    into two sums, and their difference is another site's vector, under its own share alone."""
    federation = sharing(open_federation, honest=2, least_survivors=3)
    federation.offer()
    whole, part = two_sums(federation, 1)
    assert is_sum_of(federation, with_weight(whole - part), LAST)


@pytest.mark.full
@pytest.mark.attack("survivors-differ")
def test_two_attempts_of_one_round_have_nothing_in_common_to_subtract(
    open_federation: Callable[..., Federation],
) -> None:
    """This is no attack any more: each attempt has a batch and noise of its own, so the difference
    has the noise of all seven vectors. The check stands all the same."""
    federation = sharing(open_federation, honest=2, least_survivors=3)
    federation.offer()
    whole, part = two_sums(federation, 2)
    difference = with_weight(whole - part)
    assert not is_sum_of(federation, difference, LAST)
    noise = difference.view(np.int32)[1:].astype(np.float64)
    scale = 2.0**federation.plan.privacy.noise_bits
    assert math.sqrt(np.mean(noise**2)) > 0.8 * scale * math.sqrt(7)


def with_weight(difference: RingVector) -> RingVector:
    assert difference[0] == 1
    return difference


FALSE: list[tuple[str, dict[str, Any]]] = [
    ("privacy", {"honest": 2, "least_survivors": 3, "epsilon": 0.9}),
    ("privacy", {"noise_bits": 19}),
    ("privacy", {"most_attempts": 3}),
    ("aggregation", {}),
]


@pytest.mark.parametrize(
    ("part", "changes"),
    [FALSE[0], *(pytest.param(*one, marks=pytest.mark.full) for one in FALSE[1:])],
    ids=["honest", "bits", "attempts", "step"],
)
@pytest.mark.attack("claim-exceeded")
def test_a_server_offers_a_plan_whose_claim_is_false(
    open_federation: Callable[..., Federation], part: str, changes: dict[str, Any]
) -> None:
    federation = sharing(open_federation)
    if part == "aggregation":
        changes = {"step": 0.9 * federation.plan.aggregation.step}
    value: Any = msgspec.structs.replace(getattr(federation.plan, part), **changes)
    plan = msgspec.structs.replace(federation.plan, **{part: value})
    try:
        federation.offer(plan, SITE)
    finally:
        assert attempts_of(federation, SITE) == {}
    assert cost_of(plan).epsilons(plan.privacy.delta).shared > plan.privacy.epsilon


@pytest.mark.parametrize(
    ("part", "changes", "field"),
    [
        ("privacy", {"noise_bits": 3}, "privacy.noise_bits"),
        ("aggregation", {"ring_bits": 16}, "aggregation.ring_bits"),
        ("privacy", {"honest": 5}, "privacy.honest"),
    ],
    ids=["noise", "ring", "honest"],
)
def test_a_plan_that_contradicts_itself_is_refused_by_its_check(
    open_federation: Callable[..., Federation], part: str, changes: dict[str, Any], field: str
) -> None:
    """Before the policy and the accountant look at it."""
    federation = sharing(open_federation)
    value: Any = msgspec.structs.replace(getattr(federation.plan, part), **changes)
    plan = msgspec.structs.replace(federation.plan, **{part: value})
    offer = OfferRequest(plan=sign(federation.operator, plan))
    assert federation.refusal(SITE, offer) == "contradictory-plan"
    assert federation.observers[SITE].errors[-1].field == field
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert caught.value.field == field


def test_without_its_refusal_a_plan_of_two_local_steps_has_its_false_claim_accepted(
    make_plan: Callable[..., TrainingPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = two_steps(make_plan)
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert caught.value.field == "training.local_steps"
    monkeypatch.setattr(check, "_require_shared", lambda *_, **__: None)
    check_plan(plan)


def two_steps(make_plan: Callable[..., TrainingPlan]) -> TrainingPlan2:
    plan = shared_noise_plan(
        make_plan(),
        honest=SITES,
        least_survivors=SITES,
        sampling_rate=1.0,
        attempts=3,
        own_server=SHARING["own_server"],
    )
    training = msgspec.structs.replace(plan.training, local_steps=2)
    return msgspec.structs.replace(plan, training=training)


SITES, RECORDS, GAMES = 100, 1000, 4000
MULTIPLIER = 2.0
"""Of the noise of each sum, in clip norms; each of 100 sites adds a tenth of it."""
Sums = npt.NDArray[np.float64]


def sums_read(steps: int, *, present: bool, seed: int) -> Sums:
    """What the reader of one round's sums sees in each game, in clip norms: float64[games].

    One site has a record of the attacker's choice, or not, and 1000 others; all other sites have
    none. A parameter starts at 0. The record pushes it by one clip norm. The others do not, until
    it has moved: past one half of a clip norm their gradients have the clip norm and one sign, and
    below it the other. A steep loss does that, and no clipping bounds it: each gradient is clipped.

    Args:
        steps: local steps that each site takes in the round, each with its share of the noise.
    """
    random = np.random.default_rng(seed)
    share = MULTIPLIER / math.sqrt(SITES)
    own = np.full(GAMES, float(present)) + random.normal(0, share, GAMES)
    others = random.normal(0, share * math.sqrt(SITES - 1), GAMES)
    if steps == 1:
        return own + others
    # The second gradient is taken at a point that the site's own share alone covers.
    second = RECORDS * np.sign(own - 0.5) + random.normal(0, share, GAMES)
    return own + second + others + random.normal(0, share * math.sqrt(SITES - 1), GAMES)


def best_violation(claimed: float, with_it: Sums, without: Sums) -> float:
    """The most that a threshold's true positive rate exceeds e^epsilon times its false one."""
    limits = np.quantile(np.concatenate([with_it, without]), np.linspace(0.01, 0.99, 99))
    right = (with_it[:, None] > limits).mean(axis=0)
    wrong = (without[:, None] > limits).mean(axis=0)
    return float((right - math.exp(claimed) * wrong).max())


@pytest.mark.parametrize("steps", [1, 2], ids=["one step", "two steps"])
def test_a_second_step_shows_what_only_a_sites_own_share_covers(steps: int) -> None:
    """Counting two steps with the noise of the sum, as for one, is the false claim."""
    claimed = epsilon([DpEvent(MULTIPLIER, 1.0, steps)], DELTA)
    with_it, without = (sums_read(steps, present=one, seed=one) for one in (True, False))
    violation = best_violation(claimed, with_it, without)
    if steps == 1:
        assert violation <= DELTA + 0.01
    else:
        assert violation > 0.5
        right, wrong = (with_it > 0).mean(), (without > 0).mean()
        assert right > 0.98
        assert wrong < 0.02
