import os
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from support.distributed import distributed

from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.start import start_from_rows
from umbel_common.adapters.vector import Vector, adapter_digest, initial_vector, start_digest
from umbel_common.errors import VerificationError
from umbel_common.plans.figures import GateResult
from umbel_common.plans.plan import (
    Aggregation,
    DistributedPrivacy,
    FederatedEvaluation,
    NoPrivacy,
    ReleaseGate,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.server_optimizer import ServerSgd
from umbel_common.plans.start import LabelNamesStart
from umbel_common.plans.statements import EarlyEnd, Release, RoundHeader, chained, with_sum
from umbel_common.protocol import verification
from umbel_common.protocol.transcript import (
    GENESIS,
    AttemptAborted,
    Entry,
    JobFinished,
    JobStarted,
    RoundReleased,
    TranscriptEvent,
    append,
)
from umbel_common.protocol.verification import VerifiedJob, verify_transcript
from umbel_common.secagg.messages import KeyAdvert, Survivors, SurvivorSignature
from umbel_common.trust.identity import Identity, Roster, Signed, sign


class Story:
    """A job of one aborted and one released attempt; a test may change any part."""

    def __init__(
        self, plan: TrainingPlan, operator: Identity, sites: dict[str, Identity], roster: Roster
    ) -> None:
        self.plan, self.operator, self.sites, self.roster = plan, operator, sites, roster
        self.start = self.first_release()
        self.header = self.make_header()
        self.outcome = self.release()

    def release(self, **parts: Any) -> Release:
        fields: dict[str, Any] = {
            "federation": "clinics",
            "job": "job",
            "plan": self.plan.digest(),
            "round": 1,
            "attempt": 2,
            "context": self.header.context() if hasattr(self, "header") else bytes(32),
            "adapter": bytes([parts.get("round", 1)]) * 32,
            "survivors": tuple(self.sites),
            "total_weight": len(self.sites),
        }
        return Release(**{**fields, **parts})

    def first_release(self, **parts: Any) -> Release:
        fields: dict[str, Any] = {
            "round": 0,
            "attempt": 0,
            "context": bytes(32),
            "adapter": adapter_digest(self.plan.digest(), initial_vector(self.plan)),
            "survivors": (),
            "total_weight": 0,
        }
        return self.release(**{**fields, **parts})

    def make_header(self, **parts: Any) -> RoundHeader:
        fields: dict[str, Any] = {
            "federation": "clinics",
            "job": "job",
            "round": 1,
            "attempt": 2,
            "plan": self.plan.digest(),
            "roster": self.roster.digest(),
            "adapter": self.start.adapter,
            "cohort": tuple(self.sites),
        }
        return RoundHeader(**{**fields, **parts})

    def advert(self, site: str, **parts: Any) -> Signed:
        fields: dict[str, Any] = {
            "context": self.header.context(),
            "site": site,
            "cipher_key": os.urandom(32),
            "mask_key": os.urandom(32),
            "seed_commitment": bytes(32),
            "ledger_head": bytes(32),
        }
        return sign(self.sites[site], KeyAdvert(**{**fields, **parts}))

    def confirmation(self, site: str, **parts: Any) -> SurvivorSignature:
        fields: dict[str, Any] = {
            "context": self.header.context(),
            "sites": self.outcome.survivors,
        }
        return SurvivorSignature(
            site=site, signed=sign(self.sites[site], Survivors(**{**fields, **parts}))
        )

    def started(self, **parts: Any) -> JobStarted:
        fields: dict[str, Any] = {
            "plan": sign(self.operator, self.plan),
            "roster": self.roster.digest(),
            "release": sign(self.operator, self.start),
        }
        return JobStarted(**{**fields, **parts})

    def aborted(self) -> AttemptAborted:
        header = sign(self.operator, self.make_header(attempt=1))
        return AttemptAborted(header=header, check="too-few-shares", refusals=(("site-00", "x"),))

    def released(self, **parts: Any) -> RoundReleased:
        fields: dict[str, Any] = {
            "header": sign(self.operator, self.header),
            "adverts": tuple(self.advert(site) for site in self.sites),
            "confirmations": tuple(self.confirmation(site) for site in self.sites),
            "release": sign(self.operator, self.outcome),
        }
        return RoundReleased(**{**fields, **parts})

    def finished(self) -> JobFinished:
        return JobFinished(release=self.outcome.adapter, delivered=("site-00",))

    def entries(self, *events: TranscriptEvent) -> list[Signed]:
        head, signed = GENESIS, []
        for index, event in enumerate(events):
            head, entry = append(self.operator, index, head, event)
            signed.append(entry)
        return signed

    def refused(self, *events: TranscriptEvent) -> str:
        with pytest.raises(VerificationError) as refusal:
            verify_transcript(self.entries(*events), self.roster)
        return refusal.value.message


@pytest.fixture
def story(
    make_plan: Callable[..., TrainingPlan],
    make_federation: Callable[[int], tuple[Identity, dict[str, Identity], Roster]],
) -> Story:
    return Story(one_round(make_plan), *make_federation(4))


def one_round(make_plan: Callable[..., TrainingPlan], **parts: Any) -> TrainingPlan:
    """A plan of one round at threshold 3; keyword arguments replace its parts."""
    training = msgspec.structs.replace(make_plan().training, rounds=1)
    aggregation = Aggregation(threshold=3, clip_range=1.0, step=1e-6)
    return make_plan(**{"training": training, "aggregation": aggregation, **parts})


def test_an_honest_transcript_tells_what_happened(story: Story) -> None:
    entries = story.entries(story.started(), story.aborted(), story.released(), story.finished())
    job = verify_transcript(entries, story.roster)
    assert job.plan == story.plan
    assert job.releases == (story.start, story.outcome)
    assert job.aborted_attempts == 1
    assert job.delivered == ("site-00",)


def test_an_entry_cannot_be_left_out_swapped_or_repeated(story: Story) -> None:
    entries = story.entries(story.started(), story.aborted(), story.released(), story.finished())
    for changed in (
        [entries[0], *entries[2:]],
        [entries[0], entries[2], entries[1], entries[3]],
        [entries[0], entries[1], entries[1], *entries[2:]],
        [],
        entries[1:],
    ):
        with pytest.raises(VerificationError):
            verify_transcript(changed, story.roster)


def test_an_entry_by_anyone_else_does_not_verify(story: Story) -> None:
    stranger = Identity.generate(os.urandom)
    entry = Entry(index=0, previous=GENESIS, event=story.started())
    with pytest.raises(VerificationError, match="not signed"):
        verify_transcript([sign(stranger, entry)], story.roster)


def test_a_transcript_starts_once_and_nothing_follows_its_end(story: Story) -> None:
    assert "starts once" in story.refused(story.started(), story.started())
    assert "before the start" in story.refused(story.aborted())
    assert "follows the end" in story.refused(
        story.started(), story.released(), story.finished(), story.aborted()
    )


def test_the_first_release_belongs_to_the_plan(story: Story) -> None:
    other = story.release(round=0, plan=b"\x01" * 32)
    assert "another plan" in story.refused(story.started(release=sign(story.operator, other)))
    assert "another roster" in story.refused(story.started(roster=b"\x01" * 32))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"plan": b"\x01" * 32}, "another plan"),
        ({"roster": b"\x01" * 32}, "another roster"),
        ({"round": 2}, "does not follow"),
        ({"adapter": b"\x09" * 32}, "does not start from"),
    ],
)
def test_a_header_fits_the_release_before(
    story: Story, parts: dict[str, Any], message: str
) -> None:
    story.header = story.make_header(**parts)
    story.outcome = story.release(round=story.header.round)
    assert message in story.refused(story.started(), story.released())


def test_a_release_is_of_its_attempt(story: Story) -> None:
    other = sign(story.operator, story.release(attempt=3))
    assert "does not belong to this attempt" in story.refused(
        story.started(), story.released(release=other)
    )


def test_keys_are_of_this_attempt_and_of_every_survivor(story: Story) -> None:
    stale = (story.advert("site-00", context=b"\x01" * 32),)
    assert "another attempt" in story.refused(story.started(), story.released(adverts=stale))
    some = tuple(story.advert(site) for site in list(story.sites)[:3])
    assert "never advertised" in story.refused(story.started(), story.released(adverts=some))


def test_enough_survivors_confirmed_one_and_the_same_set(story: Story) -> None:
    few = tuple(story.confirmation(site) for site in list(story.sites)[:2])
    assert "only 2 sites" in story.refused(story.started(), story.released(confirmations=few))
    twice = (few[0], few[0], few[1])
    assert "only 2 sites" in story.refused(story.started(), story.released(confirmations=twice))
    other = (
        *few,
        story.confirmation("site-02", sites=("site-00", "site-01", "site-02")),
    )
    assert "another survivor set" in story.refused(
        story.started(), story.released(confirmations=other)
    )


def test_statements_of_strangers_and_garbage_do_not_verify(story: Story) -> None:
    stranger = SurvivorSignature(site="stranger", signed=story.confirmation("site-00").signed)
    assert "roster" in story.refused(story.started(), story.released(confirmations=(stranger,)))
    garbage = (Signed(statement=b"garbage", signature=bytes(64)),)
    assert "decode" in story.refused(story.started(), story.released(adverts=garbage))


def test_a_confirmation_forged_by_the_operator_does_not_count(story: Story) -> None:
    statement = Survivors(context=story.header.context(), sites=story.outcome.survivors)
    forged = SurvivorSignature(site="site-00", signed=sign(story.operator, statement))
    honest = tuple(story.confirmation(site) for site in list(story.sites)[1:])
    assert "not signed" in story.refused(
        story.started(), story.released(confirmations=(forged, *honest))
    )


def test_the_end_names_the_last_release(story: Story) -> None:
    finished = msgspec.structs.replace(story.finished(), release=b"\x05" * 32)
    assert "last release differs" in story.refused(story.started(), story.released(), finished)


GATE = ReleaseGate(holdout=bytes(32), max_loss_increase=0.5)
PASSED = GateResult(before=2.0, after=2.5, bound=0.5)
HELD_BACK = GateResult(before=2.0, after=2.6, bound=0.5)


@pytest.fixture
def gated(
    make_plan: Callable[..., TrainingPlan],
    make_federation: Callable[[int], tuple[Identity, dict[str, Identity], Roster]],
) -> Story:
    plan = one_round(make_plan, release_gate=GATE)
    training = msgspec.structs.replace(plan.training, rounds=2)
    plan = msgspec.structs.replace(plan, training=training)
    return Story(plan, *make_federation(3))


def round_two(story: Story, gate: GateResult, **parts: Any) -> RoundReleased:
    """The event after the release of round 1."""
    story.header = story.make_header(round=2, adapter=story.outcome.adapter)
    story.outcome = story.release(round=2, **parts)
    return story.released(gate=gate)


@pytest.mark.parametrize(
    ("before", "after", "passes"),
    [
        (2.0, 2.5, True),
        (2.0, 2.5000001, False),
        (2.0, 1.0, True),
        (2.0, None, False),
        (None, 9.0, True),
        (None, None, False),
        (2.0, float("nan"), False),
        (float("nan"), 2.0, False),
    ],
)
def test_a_gate_is_passed_within_its_bound(
    before: float | None, after: float | None, passes: bool
) -> None:
    assert GateResult(before=before, after=after, bound=0.5).passed() == passes


def test_a_round_that_was_held_back_keeps_its_predecessor(gated: Story) -> None:
    gated.outcome = gated.release(adapter=gated.start.adapter)
    first = gated.released(gate=HELD_BACK)
    second = round_two(gated, GateResult(before=2.0, after=1.5, bound=0.5))
    job = verify_transcript(gated.entries(gated.started(), first, second), gated.roster)
    assert job.held_back == (1,)
    assert [release.adapter for release in job.releases[:2]] == [gated.start.adapter] * 2


def test_a_round_that_was_held_back_cannot_release_its_adapter(gated: Story) -> None:
    assert "does not keep the adapter before" in gated.refused(
        gated.started(), gated.released(gate=HELD_BACK)
    )
    verify_transcript(gated.entries(gated.started(), gated.released(gate=PASSED)), gated.roster)


def test_every_round_of_a_gated_plan_says_what_the_gate_found(gated: Story, story: Story) -> None:
    assert "does not say" in gated.refused(gated.started(), gated.released())
    assert "no release gate" in story.refused(story.started(), story.released(gate=PASSED))
    wider = GateResult(before=2.0, after=2.6, bound=0.7)
    assert "not the plan's" in gated.refused(gated.started(), gated.released(gate=wider))


@pytest.mark.parametrize(
    ("first", "kept", "other"),
    [(PASSED, 2.5, 2.0), (HELD_BACK, 2.0, 2.6)],
)
def test_a_round_is_compared_with_what_was_released_before(
    gated: Story, first: GateResult, kept: float, other: float
) -> None:
    held = {} if first.passed() else {"adapter": gated.start.adapter}
    gated.outcome = gated.release(**held)
    events = [gated.started(), gated.released(gate=first)]
    honest = round_two(gated, GateResult(before=kept, after=kept, bound=0.5))
    verify_transcript(gated.entries(*events, honest), gated.roster)
    lie = msgspec.structs.replace(
        honest, gate=GateResult(before=other, after=min(kept, other), bound=0.5)
    )
    assert "another loss" in gated.refused(*events, lie)


def early_end(story: Story, number: int, **parts: Any) -> Signed:
    fields = {"federation": "clinics", "job": "job", "plan": story.plan.digest(), "round": number}
    return sign(story.operator, EarlyEnd(**{**fields, **parts}))


def test_a_job_ends_before_its_plans_last_round_only_by_a_signed_early_end(gated: Story) -> None:
    events = [gated.started(), gated.released(gate=PASSED)]
    end = JobFinished(release=gated.outcome.adapter, delivered=())
    assert "before its last release" in gated.refused(*events, end)
    signed = msgspec.structs.replace(end, early_end=early_end(gated, 1))
    job = verify_transcript(gated.entries(*events, signed), gated.roster)
    assert job.final_round == 1
    # The adapter of an earlier round may be better.
    first = JobFinished(release=gated.start.adapter, delivered=(), early_end=early_end(gated, 0))
    assert verify_transcript(gated.entries(*events, first), gated.roster).final_round == 0
    for wrong, message in (
        (early_end(gated, 0), "last release differs"),
        (early_end(gated, 2), "before its last release"),
        (early_end(gated, 1, plan=bytes(32)), "another plan"),
    ):
        changed = msgspec.structs.replace(end, early_end=wrong)
        assert message in gated.refused(*events, changed)
    forged = sign(Identity.generate(os.urandom), EarlyEnd("clinics", "job", bytes(32), 1))
    assert "not signed" in gated.refused(*events, msgspec.structs.replace(end, early_end=forged))


def counted(story: Story) -> Story:
    """The story with an evaluation in its plan."""
    evaluation = FederatedEvaluation(noise_multiplier=1.0, max_records=100)
    plan = msgspec.structs.replace(story.plan, evaluation=evaluation)
    return Story(plan, story.operator, story.sites, story.roster)


def weighted(story: Story, weights: str) -> Story:
    """The story with other weights in its plan."""
    aggregation = msgspec.structs.replace(story.plan.aggregation, weights=weights, max_weight=50)
    plan = msgspec.structs.replace(story.plan, aggregation=aggregation, privacy=NoPrivacy())
    return Story(plan, story.operator, story.sites, story.roster)


def longer(story: Story) -> Story:
    """The story with a plan of two rounds."""
    training = msgspec.structs.replace(story.plan.training, rounds=2)
    plan = msgspec.structs.replace(story.plan, training=training)
    return Story(plan, story.operator, story.sites, story.roster)


def started_from(story: Story, **parts: Any) -> list[TranscriptEvent]:
    """A job whose release 0 has other fields."""
    story.start = story.first_release(**parts)
    return [story.started()]


def released_as(story: Story, **parts: Any) -> list[TranscriptEvent]:
    """A round whose release has other fields."""
    story.outcome = story.release(**parts)
    return [story.started(), story.released()]


def tried_as(story: Story, **parts: Any) -> list[TranscriptEvent]:
    """An aborted attempt whose header has other fields."""
    header = sign(story.operator, story.make_header(**parts))
    return [story.started(), AttemptAborted(header=header, check="x", refusals=())]


def refused_by(story: Story, *sites: str) -> list[TranscriptEvent]:
    """An aborted attempt that these sites refused."""
    refusals = tuple((site, "x") for site in sites)
    return [story.started(), msgspec.structs.replace(story.aborted(), refusals=refusals)]


def with_counts(story: Story, score: float, records: float) -> list[TranscriptEvent]:
    """A round with these counts."""
    story = counted(story)
    return [story.started(), story.released(counts=SiteCounts(score=score, records=records))]


def with_gate(story: Story, before: float, after: float) -> list[TranscriptEvent]:
    """A round whose release gate found these losses."""
    plan = msgspec.structs.replace(story.plan, release_gate=GATE)
    story = Story(plan, story.operator, story.sites, story.roster)
    story.outcome = story.release(adapter=story.start.adapter)
    gate = GateResult(before=before, after=after, bound=0.5)
    return [story.started(), story.released(gate=gate)]


def ended_as(story: Story, **parts: Any) -> list[TranscriptEvent]:
    """A job that ended with other fields."""
    return [
        story.started(),
        story.released(),
        msgspec.structs.replace(story.finished(), **parts),
    ]


def advertised_by(story: Story, *sites: str) -> list[TranscriptEvent]:
    """A round of three sites in which these advertised keys."""
    cohort = ("site-00", "site-01", "site-02")
    story.header = story.make_header(cohort=cohort)
    story.outcome = story.release(survivors=cohort, total_weight=3)
    adverts = tuple(story.advert(site) for site in sites)
    confirmations = tuple(story.confirmation(site) for site in cohort)
    return [story.started(), story.released(adverts=adverts, confirmations=confirmations)]


LIES: dict[str, tuple[Callable[[Story], list[TranscriptEvent]], str]] = {
    "a planted initial adapter": (
        lambda story: started_from(story, adapter=b"\x07" * 32),
        "public seed",
    ),
    "an initial adapter with survivors": (
        lambda story: started_from(story, survivors=("site-00",), total_weight=1),
        "public seed",
    ),
    "an initial adapter of an attempt": (
        lambda story: started_from(story, attempt=1, context=b"\x01" * 32),
        "public seed",
    ),
    "an initial adapter of another job": (
        lambda story: started_from(story, job="other"),
        "public seed",
    ),
    "a larger weight": (lambda story: released_as(story, total_weight=400), "its weight is"),
    "no weight": (lambda story: released_as(story, total_weight=0), "its weight is"),
    "a weight of other size classes": (
        lambda story: released_as(weighted(story, "size-class"), total_weight=5),
        "its weight is",
    ),
    "more records than sites may count": (
        lambda story: released_as(weighted(story, "examples"), total_weight=201),
        "its weight is",
    ),
    "fewer records than sites": (
        lambda story: released_as(weighted(story, "examples"), total_weight=3),
        "its weight is",
    ),
    "a release of another job": (
        lambda story: released_as(story, job="other"),
        "does not belong to this attempt",
    ),
    "a release of another federation": (
        lambda story: released_as(story, federation="other"),
        "does not belong to this attempt",
    ),
    "an attempt of another job": (lambda story: tried_as(story, job="other"), "another job"),
    "an attempt with another roster": (
        lambda story: tried_as(story, roster=b"\x01" * 32),
        "another roster",
    ),
    "an attempt at a later round": (
        lambda story: tried_as(longer(story), round=2),
        "does not follow",
    ),
    "an attempt from another adapter": (
        lambda story: tried_as(story, adapter=b"\x07" * 32),
        "does not start from",
    ),
    "one attempt aborted twice": (
        lambda story: [story.started(), story.aborted(), story.aborted()],
        "does not follow the attempt before",
    ),
    "an earlier attempt aborted later": (
        lambda story: [*tried_as(story), story.aborted()],
        "does not follow the attempt before",
    ),
    "a refusal of a stranger": (lambda story: refused_by(story, "stranger"), "not asked"),
    "two refusals of one site": (
        lambda story: refused_by(story, "site-00", "site-00"),
        "not asked",
    ),
    "keys of a site outside the cohort": (
        lambda story: advertised_by(story, "site-00", "site-01", "site-02", "site-03"),
        "not in the cohort",
    ),
    "two keys of one site": (
        lambda story: advertised_by(story, "site-00", "site-01", "site-02", "site-02"),
        "advertised keys twice",
    ),
    "counts that are no numbers": (
        lambda story: with_counts(story, float("nan"), 10.0),
        "its counts",
    ),
    "a score above all records": (lambda story: with_counts(story, 401.0, 10.0), "its counts"),
    "too many records": (lambda story: with_counts(story, 1.0, float("inf")), "its counts"),
    "a loss that is no number": (
        lambda story: with_gate(story, float("nan"), 1.0),
        "not a loss",
    ),
    "a loss below zero": (lambda story: with_gate(story, -1e9, 1.0), "not a loss"),
    "a delivery to a stranger": (
        lambda story: ended_as(story, delivered=("stranger",)),
        "to a stranger",
    ),
    "two deliveries to one site": (
        lambda story: ended_as(story, delivered=("site-00", "site-00")),
        "to a stranger",
    ),
    "an early end of another job": (
        lambda story: ended_as(story, early_end=early_end(story, 1, job="other")),
        "another job",
    ),
}
"""What an operator may sign though it is not so, and the words with which it is refused."""


@pytest.mark.parametrize("name", LIES)
def test_what_follows_from_the_plan_is_recomputed(
    story: Story, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie, words = LIES[name]
    events = lie(story)
    require = verification.require_that
    with monkeypatch.context() as patch:
        patch.setattr(
            verification, "require_that", lambda holds, what: require(holds or words in what, what)
        )
        verify_transcript(story.entries(*events), story.roster)
    assert words in story.refused(*events)


def test_attempts_that_the_operator_does_not_tell_of_are_counted(story: Story) -> None:
    told = [story.started(), story.aborted(), story.released(), story.finished()]
    silent = [told[0], *told[2:]]
    for events, untold in ((told, 0), (silent, 1)):
        job = verify_transcript(story.entries(*events), story.roster)
        assert (job.aborted_attempts, job.untold_attempts) == (1 - untold, untold)


def test_a_plan_and_its_roster_are_of_one_federation(story: Story) -> None:
    plan = msgspec.structs.replace(story.plan, federation="other")
    assert "another federation" in story.refused(
        Story(plan, story.operator, story.sites, story.roster).started()
    )


def test_a_plan_that_no_site_would_accept_has_no_transcript(story: Story) -> None:
    aggregation = msgspec.structs.replace(story.plan.aggregation, max_weight=7)
    plan = msgspec.structs.replace(story.plan, aggregation=aggregation)
    other = Story(plan, story.operator, story.sites, story.roster)
    assert "each weight is 1" in other.refused(other.started())


def test_no_attempt_is_past_the_plans_last_round(story: Story) -> None:
    events = [story.started(), story.released()]
    story.header = story.make_header(round=2, adapter=story.outcome.adapter)
    story.outcome = story.release(round=2)
    assert "past the plan's last" in story.refused(*events, story.released())


def test_a_cohort_is_of_the_roster_and_has_one_survivor_set(story: Story) -> None:
    assert "not in the roster" in story.refused(
        *tried_as(story, cohort=("site-00", "site-01", "site-02", "stranger"))
    )
    story.header = story.make_header(cohort=("site-00", "site-01"))
    story.outcome = story.release(survivors=story.header.cohort, total_weight=2)
    assert "cannot reach the threshold" in story.refused(story.started(), story.released())


def test_two_survivor_sets_of_one_cohort_cannot_both_be_signed(
    make_plan: Callable[..., TrainingPlan],
    make_federation: Callable[[int], tuple[Identity, dict[str, Identity], Roster]],
) -> None:
    story = Story(one_round(make_plan), *make_federation(6))
    assert "two survivor sets" in story.refused(story.started(), story.released())
    # Sites refuse such an attempt, and an honest operator says so.
    verify_transcript(story.entries(story.started(), story.aborted()), story.roster)


@pytest.mark.parametrize("weight", [4, 137, 200])
def test_a_masked_weight_is_within_what_its_sites_may_count(story: Story, weight: int) -> None:
    other = weighted(story, "examples")
    other.outcome = other.release(total_weight=weight)
    verify_transcript(other.entries(other.started(), other.released()), other.roster)


@pytest.mark.parametrize("count", [-400.0, 0.0, 400.0])
def test_noise_may_carry_counts_to_their_bounds(story: Story, count: float) -> None:
    other = counted(story)
    released = other.released(counts=SiteCounts(score=count, records=count))
    verify_transcript(other.entries(other.started(), released), other.roster)


def test_a_start_that_is_a_tensor_is_verified_as_far_as_that_needs_no_model(
    story: Story, make_plan: Callable[..., TrainingPlan]
) -> None:
    plan = make_plan()
    rows = np.eye(3, 6, dtype=np.float32)
    start = start_from_rows(plan, rows)
    named = LabelNamesStart(
        tensor=start_digest(start), names=("a", "b", "c"), scale=1.0, tolerance=0.01
    )
    story.plan = second_version(plan, start=named)

    def verified(released: Vector, tensor: Vector | None) -> VerifiedJob:
        adapter = adapter_digest(story.plan.digest(), released)
        first = with_sum(story.first_release(adapter=adapter), bytes(32))
        event = story.started(release=sign(story.operator, first))
        return verify_transcript(story.entries(event), story.roster, start=tensor)

    embedded = "whether the head's rows are the embeddings of the labels' names"
    assert verified(start, start).believed == (embedded,)
    planted = start_from_rows(plan, rows[::-1])
    # Without the tensor nobody can tell, and the verifier says so.
    assert verified(planted, None).believed == (
        "the start itself, whose tensor is not at hand",
        embedded,
    )
    with pytest.raises(VerificationError, match="does not follow from the plan's start"):
        verified(planted, start)
    with pytest.raises(VerificationError, match="not the adapter that the plan names"):
        verified(planted, planted)


def test_no_job_of_distributed_mode_has_more_attempts_than_its_plan(
    story: Story, make_plan2: Callable[..., TrainingPlan]
) -> None:
    """Its claim is for so many, those included that its operator does not tell of."""
    server = ServerSgd(adapter_learning_rate=0.1)
    aggregation = Aggregation(threshold=2, clip_range=1.0, step=1e-6)
    story.plan = distributed(one_round(partial(make_plan2, server), aggregation=aggregation))
    assert isinstance(story.plan.privacy, DistributedPrivacy)
    most = story.plan.privacy.most_attempts
    adapter = adapter_digest(story.plan.digest(), initial_vector(story.plan))
    first = with_sum(story.first_release(), bytes(32))
    started = story.started(release=sign(story.operator, first))
    before, _ = append(story.operator, 0, GENESIS, started)

    def aborted(attempt: int) -> list[Signed]:
        header = chained(story.make_header(adapter=adapter, attempt=attempt), before)
        event = AttemptAborted(
            header=sign(story.operator, header), check="too-few-shares", refusals=()
        )
        return story.entries(started, event)

    found = verify_transcript(aborted(most), story.roster)
    assert (found.aborted_attempts, found.untold_attempts) == (1, most - 1)
    with pytest.raises(VerificationError, match=f"attempt {most + 1} of the job"):
        verify_transcript(aborted(most + 1), story.roster)
