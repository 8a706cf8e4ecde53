"""A server that makes the crowd small among which a delta hides."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from adversarial.extraction import keys_of, masks_of, remove_masks, secret_of
from adversarial.federation import Federation, moved
from adversarial.weaken import Stopped

from umbel_common.adapters.vector import adapter_digest
from umbel_common.plans.plan import Aggregation, NoPrivacy

SITE = "site-00"
ACCOMPLICE = "site-01"
OPEN = "allow_without_privacy = true"


@pytest.mark.attack(
    "threshold-below-minimum",
    "cohort-too-small",
    "too-few-adverts",
    "too-few-shares",
    "too-few-survivors",
)
def test_a_server_shrinks_the_cohort_to_a_site_and_an_accomplice(
    open_federation: Callable[..., Federation],
) -> None:
    federation = open_federation(3, aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-6))
    federation.offer()
    federation.play(ACCOMPLICE, own_keys=True)
    header = federation.header(cohort=(SITE, ACCOMPLICE))
    outcome = federation.drive(federation.attempt(header))
    assert federation.is_sum_of(outcome.aggregate.total, SITE)


@pytest.mark.attack("threshold-too-high")
def test_a_server_has_a_site_pay_for_a_cohort_that_cannot_reach_its_threshold(
    open_federation: Callable[..., Federation],
) -> None:
    """No sum can come of such an attempt, so nothing may be charged or trained for it."""
    federation = open_federation(3, aggregation=Aggregation(threshold=4, clip_range=1.0, step=1e-6))
    federation.offer()
    try:
        federation.ask(SITE, federation.train_request())
    except Stopped:
        assert federation.spent_rounds(SITE) == 0
        assert federation.observers[SITE].steps == 0
        raise
    assert federation.spent_rounds(SITE) == 1


@pytest.mark.attack("too-few-shares")
def test_a_server_pretends_that_only_an_accomplice_sent_shares(
    open_federation: Callable[..., Federation],
) -> None:
    """The victim then masks with the accomplice alone; its peers unmask in good faith."""
    federation = open_federation(4)
    federation.offer()
    federation.play(ACCOMPLICE, own_keys=True)
    attempt = federation.drive(federation.attempt(), until="mask")
    requests = attempt.requests()
    from_accomplice = tuple(share for share in requests[SITE].shares if share.sender == ACCOMPLICE)
    requests[SITE] = msgspec.structs.replace(requests[SITE], shares=from_accomplice)
    replies = {site: federation.ask(site, request) for site, request in requests.items()}
    attempt = federation.take(attempt, replies)
    # The victim need not be asked about the survivors.
    attempt = federation.drive(attempt, until="unmask", silent=SITE)
    revealed = federation.reveal(attempt)
    keys = keys_of(attempt)
    opened = remove_masks(
        masks_of(attempt),
        {site: keys[site] for site in (SITE, ACCOMPLICE)},
        [replies[SITE].vector],
        seeds={SITE: secret_of(SITE, "self-mask", attempt.header, revealed)},
        secrets={ACCOMPLICE: federation.puppets[ACCOMPLICE].mask_secret},
    )
    assert federation.is_sum_of(opened, SITE)


def strict(open_federation: Callable[..., Federation]) -> Federation:
    """Six sites, one of which wants all six in every sum; the plan asks for four."""
    four = Aggregation(threshold=4, clip_range=1.0, step=1e-6)
    federation = open_federation(6, {SITE: "minimum_cohort = 6"}, aggregation=four)
    federation.offer()
    return federation


FIVE = tuple(f"site-{index:02}" for index in range(5))


@pytest.mark.attack("threshold-below-minimum", "too-few-adverts", "too-few-shares")
def test_a_server_goes_on_with_fewer_sites_than_one_of_them_allows(
    open_federation: Callable[..., Federation],
) -> None:
    federation = strict(open_federation)
    attempt = federation.drive(federation.attempt(), until="confirm", silent="site-05")
    # Four are enough for the others; the strict site need not be asked about the survivors.
    attempt = federation.drive(attempt, until="unmask", silent=SITE)
    outcome = federation.drive(attempt)
    assert federation.is_sum_of(outcome.aggregate.total, *FIVE)


@pytest.mark.attack("threshold-below-minimum")
def test_a_server_holds_back_a_vector_and_does_not_ask_the_strict_site_to_confirm(
    open_federation: Callable[..., Federation],
) -> None:
    federation = strict(open_federation)
    attempt = federation.drive(federation.attempt(), until="mask")
    attempt = federation.drive(attempt, until="confirm", silent="site-05")
    attempt = federation.drive(attempt, until="unmask", silent=SITE)
    outcome = federation.drive(attempt)
    assert federation.is_sum_of(outcome.aggregate.total, *FIVE)


@pytest.mark.attack("threshold-below-minimum", "too-few-survivors")
def test_a_server_asks_a_site_to_confirm_fewer_survivors_than_it_allows(
    open_federation: Callable[..., Federation],
) -> None:
    federation = strict(open_federation)
    attempt = federation.drive(federation.attempt(), until="mask")
    attempt = federation.drive(attempt, until="confirm", silent="site-05")
    federation.ask(SITE, attempt.requests()[SITE])


def without_privacy(open_federation: Callable[..., Federation], policy: str = "") -> Federation:
    return open_federation(4, {"*": f"{OPEN}\n{policy}"}, privacy=NoPrivacy())


@pytest.mark.attack("survivors-differ")
def test_a_server_repeats_a_round_with_one_site_less(
    open_federation: Callable[..., Federation],
) -> None:
    """The difference of the two sums is the delta of that site, with its noise."""
    repeat_with_one_site_less(open_federation(4))


@pytest.mark.attack("survivors-differ", "cohort-difference")
def test_a_server_repeats_a_round_without_privacy_with_one_site_less(
    open_federation: Callable[..., Federation],
) -> None:
    repeat_with_one_site_less(without_privacy(open_federation))


def repeat_with_one_site_less(federation: Federation) -> None:
    """Reads the delta of the fourth site from two attempts at one round."""
    federation.offer()
    whole = federation.drive(federation.attempt())
    header = federation.header(attempt=2, cohort=("site-00", "site-01", "site-02"))
    less = federation.drive(federation.attempt(header))
    difference = (whole.aggregate.total - less.aggregate.total).view(np.int32)
    error = difference[1:] * federation.plan.aggregation.step - federation.delta("site-03")
    assert difference[0] == 1
    # The bound of all seven roundings together.
    assert np.abs(error).max() <= 7.01 * federation.plan.aggregation.step


@pytest.mark.attack("cohort-difference")
def test_a_server_runs_the_next_round_with_one_site_less(
    open_federation: Callable[..., Federation],
) -> None:
    federation = without_privacy(open_federation)
    federation.offer()
    federation.drive(federation.attempt())
    vector = moved(federation.plan, 0.1)
    digest = adapter_digest(federation.plan.digest(), vector)
    federation.releases[digest] = federation.release(vector, round=1)
    header = federation.header(round=2, adapter=digest, cohort=("site-00", "site-01", "site-02"))
    federation.drive(federation.attempt(header))


@pytest.mark.attack("own-site-missing")
def test_a_server_has_a_site_confirm_a_sum_that_it_is_not_in(
    open_federation: Callable[..., Federation],
) -> None:
    """The site has sent its vector, so by signing its own exclusion it helps to open it."""
    federation = open_federation(4)
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    _, attempt = federation.vectors(attempt)
    request = attempt.requests()[SITE]
    federation.ask(SITE, msgspec.structs.replace(request, survivors=request.survivors[1:]))
