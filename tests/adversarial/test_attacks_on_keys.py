"""A server that puts itself between the sites, with keys or sites of its own."""

import os
from collections.abc import Callable

import msgspec
import pytest
from adversarial.extraction import keys_of, masks_of, remove_masks, secret_of
from adversarial.federation import Federation
from adversarial.weaken import Stopped

from umbel_common.errors import IdentityError
from umbel_common.plans.plan import LocalPrivacy
from umbel_common.protocol.wire import (
    MaskPreparedRequest,
    MaskReply,
    MaskRequest,
    ShareReply,
    TrainReply,
)
from umbel_common.trust.identity import Identity

SITE = "site-00"
CHEAP = LocalPrivacy(epsilon=1.0, delta=1e-4, clip_norm=1.0)
PEERS = ("site-01", "site-02")


@pytest.mark.attack("pinned-signature")
def test_a_server_replaces_the_peers_keys_by_its_own(federation: Federation) -> None:
    federation.offer()
    federation.play(*PEERS)
    outcome = federation.drive(federation.attempt())
    # The peers were puppets, so the sum is the victim's delta alone.
    assert federation.is_sum_of(outcome.aggregate.total, SITE)


@pytest.mark.attack("pinned-roster")
def test_a_server_shows_a_roster_with_sites_of_its_own(federation: Federation) -> None:
    federation.offer()
    federation.play("sybil-1", "sybil-2")
    federation.believe(SITE, federation.played_roster)
    header = federation.header(
        roster=federation.played_roster.digest(), cohort=(SITE, "sybil-1", "sybil-2")
    )
    outcome = federation.drive(federation.attempt(header))
    assert federation.is_sum_of(outcome.aggregate.total, SITE)


@pytest.mark.attack("not-in-roster")
def test_a_server_adds_sites_of_its_own_under_the_pinned_roster(federation: Federation) -> None:
    federation.offer()
    header = federation.header(cohort=(SITE, "sybil-1", "sybil-2"))
    assert isinstance(federation.ask(SITE, federation.train_request(header)), TrainReply)
    # The attempt can lead to nothing, and yet the site has paid for a round.
    assert federation.spent_rounds(SITE) == 1


@pytest.mark.attack("pinned-signature")
def test_somebody_without_the_operators_key_runs_a_round(federation: Federation) -> None:
    federation.operator = Identity.generate(os.urandom)
    federation.offer()
    outcome = federation.drive(federation.attempt())
    assert federation.is_sum_of(outcome.aggregate.total, SITE, *PEERS)


@pytest.mark.attack("own-advert")
def test_a_server_holds_back_a_sites_own_keys(
    open_federation: Callable[..., Federation],
) -> None:
    federation = open_federation(4)
    federation.offer()
    stage = "mask" if federation.prepares else "share"
    request = federation.drive(federation.attempt(), until=stage).requests()[SITE]
    others = tuple(advert for advert in request.adverts if SITE.encode() not in advert.statement)
    assert len(others) == 3
    # The site shares its secrets, or masks, although it cannot know which keys its peers were shown
    # for it.
    reply = federation.ask(SITE, msgspec.structs.replace(request, adverts=others))
    assert isinstance(reply, MaskReply if federation.prepares else ShareReply)


def relayed(federation: Federation, recipient: str) -> MaskRequest | MaskPreparedRequest:
    """A request to SITE with a share that its first peer made for its second."""
    attempt = federation.drive(federation.attempt(), until="mask")
    requests = attempt.requests()
    (stray,) = [share for share in requests[PEERS[1]].shares if share.sender == PEERS[0]]
    (honest,) = [share for share in requests[SITE].shares if share.sender == PEERS[1]]
    stray = msgspec.structs.replace(stray, recipient=recipient)
    request: MaskRequest | MaskPreparedRequest = requests[SITE]
    return msgspec.structs.replace(request, shares=(stray, honest))


@pytest.mark.attack("wrong-recipient", "share-authentication")
def test_a_server_relays_a_share_to_the_wrong_peer(federation: Federation) -> None:
    federation.offer()
    # The site takes noise for its peer's share, and will reveal it.
    assert isinstance(federation.ask(SITE, relayed(federation, PEERS[1])), MaskReply)


@pytest.mark.attack("share-authentication")
def test_a_server_relays_it_with_the_address_rewritten(federation: Federation) -> None:
    federation.offer()
    assert isinstance(federation.ask(SITE, relayed(federation, SITE)), MaskReply)


@pytest.mark.attack("self-mask")
def test_a_server_claims_that_a_late_site_dropped_out_and_opens_its_vector(
    open_federation: Callable[..., Federation],
) -> None:
    federation, late = open_federation(4), "site-03"
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    vector = federation.ask(late, attempt.requests()[late]).vector
    attempt = federation.drive(attempt, until="unmask", silent=late)
    revealed = federation.reveal(attempt)
    opened = remove_masks(
        masks_of(attempt),
        keys_of(attempt),
        [vector],
        seeds={late: bytes(32)},
        secrets={late: secret_of(late, "mask-key", attempt.header, revealed)},
    )
    if not federation.is_sum_of(opened, late):
        # Its self-mask is still on it, and nobody reveals the seed of a site that dropped out.
        raise Stopped("self-mask")


@pytest.mark.attack("revoked-key")
def test_a_thief_of_a_key_joins_the_cohort_after_its_owner_revoked_it(
    open_federation: Callable[..., Federation],
) -> None:
    federation = open_federation(3)
    federation.offer()
    thief = "site-02"
    federation.play(thief, own_keys=True)
    federation.revoke(SITE, federation.identities[thief])
    outcome = federation.drive(federation.attempt())
    assert federation.is_sum_of(outcome.aggregate.total, SITE, "site-01")


@pytest.mark.attack("revoked-key")
def test_a_thief_of_a_key_stays_in_an_attempt_under_way_when_it_is_revoked(
    open_federation: Callable[..., Federation],
) -> None:
    federation = open_federation(3)
    federation.offer()
    thief = "site-02"
    federation.play(thief, own_keys=True)
    attempt = federation.drive(federation.attempt(), until="mask")
    federation.revoke(SITE, federation.identities[thief])
    outcome = federation.drive(attempt)
    assert federation.is_sum_of(outcome.aggregate.total, SITE, "site-01")


@pytest.mark.attack("revoked-key")
def test_a_thief_of_the_operators_key_runs_a_round_after_it_was_revoked(
    federation: Federation,
) -> None:
    federation.offer()
    federation.revoke(SITE, federation.operator)
    assert isinstance(federation.ask(SITE, federation.train_request()), TrainReply)


@pytest.mark.parametrize("change", ["another key", "missing", "revoked"])
def test_a_site_that_the_others_would_not_believe_does_not_start(
    federation: Federation, change: str
) -> None:
    roster, revoked = federation.roster, frozenset[bytes]()
    match change:
        case "another key":
            others = {**federation.identities, SITE: Identity.generate(os.urandom)}
            roster = federation.make_roster(others)
        case "missing":
            roster = federation.make_roster({site: federation.identities[site] for site in PEERS})
        case "revoked":
            revoked = frozenset({federation.identities[SITE].public_key})
    with pytest.raises(IdentityError):
        federation.start(SITE, roster, revoked)


def test_a_new_key_of_the_operator_gets_new_jobs_done_where_old_plans_are_kept(
    federation: Federation,
) -> None:
    federation.offer()
    federation.operator = Identity.generate(os.urandom)
    federation.roster = federation.played_roster = federation.make_roster(federation.identities)
    for site in federation.identities:
        federation.start(site)
    federation.plan = federation.make_plan(job="second", privacy=CHEAP)
    federation.offer()
    outcome = federation.drive(federation.attempt())
    assert federation.is_sum_of(outcome.aggregate.total, *federation.identities)
