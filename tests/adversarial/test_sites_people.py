"""A server cannot get around what a site's people decided."""

from collections.abc import Callable
from datetime import datetime

from adversarial.federation import Federation

from umbel_client.site.decisions import Decisions
from umbel_client.site.policy_file import PolicyFile
from umbel_client.site.state_folder import StateFolder
from umbel_common.protocol.wire import OfferReply, OfferRequest, TrainReply
from umbel_common.trust.identity import Identity, sign

SITE = "site-00"
OpenFederation = Callable[..., Federation]


def decisions(federation: Federation) -> Decisions:
    return Decisions(StateFolder(federation.folder / SITE / "state"))


def offer(federation: Federation) -> OfferRequest:
    return OfferRequest(plan=sign(federation.operator, federation.plan))


def test_a_plan_runs_only_after_a_person_approved_it(open_federation: OpenFederation) -> None:
    federation = open_federation(policies={SITE: 'approval = "each-plan"'})
    assert federation.refusal(SITE, offer(federation)) == "awaiting-approval"
    # Nor does it help to begin without an offer.
    header = federation.header()
    assert federation.refusal(SITE, federation.train_request(header)) == "unknown-plan"
    assert federation.spent_rounds(SITE) == 0
    decisions(federation).approve(federation.plan.digest())
    assert isinstance(federation.send(SITE, offer(federation)), OfferReply)


def test_labels_run_only_after_people_put_them_into_the_policy(
    open_federation: OpenFederation,
) -> None:
    federation = open_federation(policies={SITE: 'approval = "each-plan"'})
    config = federation.folder / SITE / "client.toml"
    config.write_text(config.read_text().replace('labels = ["a", "b"]', "labels = []"))
    federation.start(SITE)
    # A person is asked about the plan and its labels; the approval alone is not enough.
    assert federation.refusal(SITE, offer(federation)) == "awaiting-approval"
    (waiting,) = decisions(federation).proposals()
    decisions(federation).approve(waiting.digest)
    assert federation.refusal(SITE, offer(federation)) == "site-not-ready"
    policy = PolicyFile(config)
    policy.add(policy.missing(waiting.plan))
    assert federation.refusal(SITE, offer(federation)) == "site-not-ready"
    assert federation.spent_rounds(SITE) == 0
    federation.start(SITE)
    assert isinstance(federation.send(SITE, offer(federation)), OfferReply)


def test_where_nobody_is_asked_a_policy_without_labels_refuses(
    open_federation: OpenFederation,
) -> None:
    federation = open_federation(policies={SITE: 'approval = "none"'})
    config = federation.folder / SITE / "client.toml"
    config.write_text(config.read_text().replace('labels = ["a", "b"]', "labels = []"))
    text = config.read_text()
    federation.start(SITE)
    assert federation.refusal(SITE, offer(federation)) == "labels-not-allowed"
    assert decisions(federation).proposals() == []
    assert config.read_text() == text


def test_a_paused_site_begins_nothing(federation: Federation) -> None:
    federation.offer()
    decisions(federation).pause()
    assert federation.refusal(SITE, offer(federation)) == "site-paused"
    request = federation.train_request(federation.header())
    assert federation.refusal(SITE, request) == "site-paused"
    assert federation.spent_rounds(SITE) == 0
    decisions(federation).resume()
    assert isinstance(federation.send(SITE, request), TrainReply)


def test_a_round_begins_only_in_the_sites_hours(open_federation: OpenFederation) -> None:
    federation = open_federation(policies={SITE: 'allowed_hours = "20:00-06:00"'})
    federation.offer()
    request = federation.train_request(federation.header())
    federation.start(SITE, clock=lambda: datetime(2026, 1, 1, 12, 0))
    assert federation.refusal(SITE, request) == "outside-hours"
    assert federation.spent_rounds(SITE) == 0
    federation.start(SITE, clock=lambda: datetime(2026, 1, 1, 23, 0))
    assert isinstance(federation.send(SITE, request), TrainReply)


def test_hours_of_training_are_counted_over_restarts(open_federation: OpenFederation) -> None:
    federation = open_federation(policies={SITE: "max_hours = 1e-9"})
    federation.offer()
    assert isinstance(
        federation.send(SITE, federation.train_request(federation.header())), TrainReply
    )
    federation.start(SITE)
    again = federation.train_request(federation.header(attempt=2))
    assert federation.refusal(SITE, again) == "too-many-hours"


def test_a_site_that_joins_does_not_disturb_a_job_under_way(federation: Federation) -> None:
    federation.offer()
    before = federation.roster
    newcomer = Identity.generate(lambda size: b"\x07" * size)
    grown = federation.make_roster({**federation.identities, "site-99": newcomer})
    federation.start(SITE, roster=grown, former=(before,))
    request = federation.train_request(federation.header(roster=before.digest()))
    assert isinstance(federation.send(SITE, request), TrainReply)


def test_a_site_that_left_ends_the_job_that_has_it(federation: Federation) -> None:
    federation.offer()
    before = federation.roster
    left = {name: key for name, key in federation.identities.items() if name != "site-02"}
    federation.start(SITE, roster=federation.make_roster(left), former=(before,))
    request = federation.train_request(federation.header(roster=before.digest()))
    assert federation.refusal(SITE, request) == "not-in-roster"


def test_a_site_with_another_key_since_ends_the_job_too(federation: Federation) -> None:
    federation.offer()
    before = federation.roster
    changed = {**federation.identities, "site-02": Identity.generate(lambda size: b"\x07" * size)}
    federation.start(SITE, roster=federation.make_roster(changed), former=(before,))
    request = federation.train_request(federation.header(roster=before.digest()))
    assert federation.refusal(SITE, request) == "not-in-roster"


def test_a_roster_that_this_site_never_pinned_is_none(federation: Federation) -> None:
    federation.offer()
    other = federation.make_roster(dict(list(federation.identities.items())[:2]))
    request = federation.train_request(federation.header(roster=other.digest()))
    assert federation.refusal(SITE, request) == "roster-digest"
