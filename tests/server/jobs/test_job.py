from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from umbel_common.adapters.vector import Vector, adapter_digest, initial_vector, merge
from umbel_common.errors import JobFailed, PlanError
from umbel_common.plans.plan import Aggregation, FederatedEvaluation
from umbel_common.protocol.verification import verify_transcript
from umbel_common.protocol.wire import (
    FinishRequest,
    MaskPreparedRequest,
    MaskRequest,
    OfferReply,
    OfferUnderRoster,
    Refusal,
    TrainRequest,
    UnmaskReply,
    request_digest,
    seal_reply,
)
from umbel_server.messaging.link import Step

THREE = Aggregation(threshold=3, clip_range=1.0, step=1e-6)

# `Setting` lives in the conftest, which a test module cannot import.
MakeSetting = Callable[..., Any]


def expected_adapter(setting: Any, survivors: list[list[str]]) -> Vector:
    """FedAvg in plain numpy over the deltas of each round's survivors."""
    vector = initial_vector(setting.plan)
    for number, sites in enumerate(survivors, start=1):
        deltas = [setting.sites[site].delta(number).astype(np.float64) for site in sites]
        vector = merge(vector, np.mean(deltas, axis=0).astype(np.float32), setting.plan, number)
    return vector


def test_a_job_releases_the_mean_of_all_deltas_round_after_round(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE)
    release = setting.job().run()
    adapter = setting.registry.load(setting.plan, release.adapter)
    expected = expected_adapter(setting, [sorted(setting.sites)] * 3)
    # Stochastic rounding moves each delta by less than one step; the mean too.
    assert np.abs(adapter - expected).max() < 3 * setting.plan.aggregation.step + 1e-6
    assert release.round == 3
    assert release.total_weight == 4


def test_its_transcript_verifies_and_ends_with_the_release(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE)
    release = setting.job().run()
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert job.releases[-1] == release
    assert job.delivered == tuple(sorted(setting.sites))
    assert job.aborted_attempts == 0


@pytest.mark.parametrize("stage", ["train", "share", "mask", "confirm", "unmask"])
def test_a_site_that_falls_silent_at_any_stage_does_not_stop_the_others(
    make_setting: MakeSetting, stage: str
) -> None:
    setting = make_setting(4, aggregation=THREE)
    order = ["train", "share", "mask", "confirm", "unmask"]
    setting.link.lost = lambda step, site: (
        site == "site-01" and step.round == 2 and step.stage in order[order.index(stage) :]
    )
    release = setting.job().run()
    others = ["site-00", "site-02", "site-03"]
    # A vector that arrived stays in the sum, whoever sent it falls silent afterwards.
    second = others if stage in ("train", "share", "mask") else sorted(setting.sites)
    assert setting.observer.releases[1].survivors == tuple(second)
    adapter = setting.registry.load(setting.plan, release.adapter)
    expected = expected_adapter(setting, [sorted(setting.sites), second, sorted(setting.sites)])
    assert np.abs(adapter - expected).max() < 1e-5


def test_an_attempt_with_too_few_sites_is_aborted_and_tried_again(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE)
    setting.link.lost = lambda step, site: step == Step("mask", 1, 1) and site == "site-00"
    release = setting.job().run()
    assert setting.observer.aborts == [(1, 1, "too-few-vectors")]
    assert release.round == 3
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert job.aborted_attempts == 1
    assert job.releases[1].attempt == 2


def test_a_round_that_keeps_failing_fails_the_job_which_resumes_there(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE)
    setting.link.lost = lambda step, site: step.round == 2 and site == "site-00"
    with pytest.raises(JobFailed, match="too-few-adverts"):
        setting.job(attempts=2).run()
    setting.link.lost = lambda step, site: False
    setting.link.steps.clear()
    release = setting.job().run()
    assert release.round == 3
    # Round 1 is not done again, and no attempt number is used twice.
    assert min(step.round for step in setting.link.steps if step.stage == "train") == 2
    assert setting.observer.releases[1].attempt == 3


def test_an_attempt_that_sites_refused_for_its_cohort_spoils_no_transcript(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(6, aggregation=THREE)
    with pytest.raises(
        JobFailed, match=r"round 1 failed: 6 of 6 sites refused \(threshold-too-low\)"
    ):
        setting.job().run()
    # Of five sites, three are more than half.
    setting.link.lost = lambda step, site: site == "site-05"
    release = setting.job().run()
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert job.last == release
    assert job.aborted_attempts == 1


def test_a_crash_in_mid_round_costs_an_attempt_number_and_nothing_else(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE)

    def crash(step: Step, site: str) -> bool:
        if step.round == 2 and step.stage == "confirm":
            raise KeyboardInterrupt
        return False

    setting.link.lost = crash
    with pytest.raises(KeyboardInterrupt):
        setting.job().run()
    setting.link.lost = lambda step, site: False
    release = setting.job().run()
    adapter = setting.registry.load(setting.plan, release.adapter)
    expected = expected_adapter(setting, [sorted(setting.sites)] * 3)
    assert np.abs(adapter - expected).max() < 1e-5
    assert [r.attempt for r in setting.observer.releases] == [1, 2, 1]
    verify_transcript(setting.journal.transcript("job"), setting.roster)


def test_a_finished_job_is_not_run_again(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE)
    release = setting.job().run()
    setting.link.steps.clear()
    assert setting.job().run() == release
    assert setting.link.steps == []


def test_too_few_accepting_sites_fail_the_job_with_each_reason(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE)
    site = setting.sites["site-01"]
    setting.link.sites["site-01"] = lambda sealed: seal_reply(
        site.identity,
        "site-01",
        Refusal(check="epsilon-too-large"),
        request_digest(sealed),
    )
    with pytest.raises(JobFailed, match="site-01 refused: epsilon-too-large"):
        setting.job().run()


@pytest.mark.parametrize(
    ("check", "advice", "waits"),
    [
        ("roster-digest", "umbel-server roster export", True),
        ("awaiting-approval", "umbel-client approve", True),
        ("site-not-ready", "its own log says", True),
        ("budget", "agree on a smaller epsilon", False),
        ("malformed-message", "an older Umbel", False),
        ("labels-not-allowed", "the log of each site that refused says why", False),
    ],
)
def test_an_operator_reads_what_to_do_about_each_refusal(
    make_setting: MakeSetting, check: str, advice: str, waits: bool
) -> None:
    setting = make_setting(3, aggregation=THREE)
    site = setting.sites["site-01"]
    setting.link.sites["site-01"] = lambda sealed: seal_reply(
        site.identity, "site-01", Refusal(check=check), request_digest(sealed)
    )
    with pytest.raises(JobFailed) as caught:
        setting.job().run()
    assert caught.value.found == f"site-01 refused: {check}"
    assert advice in str(caught.value.remedy)
    assert caught.value.may_accept == (("site-01",) if waits else ())
    # The roster that the site judged is the one that the job runs under.
    (offer,) = setting.sites["site-00"].requests
    assert isinstance(offer, OfferUnderRoster)
    assert offer.roster == setting.roster.digest()


def test_a_failed_round_says_who_refused_who_was_silent_and_when(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(4, aggregation=THREE)
    site = setting.sites["site-01"]
    honest = setting.link.sites["site-01"]

    def refusing(sealed: bytes) -> bytes:
        if setting.link.steps[-1].stage != "train":
            return honest(sealed)
        refusal = Refusal(check="roster-digest")
        return seal_reply(site.identity, "site-01", refusal, request_digest(sealed))

    setting.link.sites["site-01"] = refusing
    setting.link.lost = lambda step, name: step.stage == "train" and name == "site-03"
    with pytest.raises(JobFailed) as caught:
        setting.job(attempts=1).run()
    assert caught.value.message == "round 1 failed: 1 of 4 sites refused (roster-digest)"
    assert caught.value.found == (
        "attempt 1, too-few-adverts: site-01 refused: roster-digest; site-03 did not answer (train)"
    )
    assert "umbel-server roster export" in str(caught.value.remedy)
    assert f"umbel-server job resume {setting.plan.job}" in str(caught.value.remedy)


def test_a_reply_sealed_by_another_site_is_none(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE)
    forger = setting.sites["site-02"].identity
    setting.link.sites["site-01"] = lambda sealed: seal_reply(
        forger, "site-01", OfferReply(plan=setting.plan.digest()), request_digest(sealed)
    )
    release = setting.job().run()
    assert ("site-01", "pinned-signature") in setting.observer.strays
    assert "site-01" not in setting.observer.releases[0].survivors
    assert release.total_weight == 3


def test_every_site_gets_the_release_that_its_round_starts_from_and_the_last_one(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE)
    release = setting.job().run()
    for site in setting.sites.values():
        trained = [request for request in site.requests if isinstance(request, TrainRequest)]
        assert len(trained) == 3
        (finish,) = [request for request in site.requests if isinstance(request, FinishRequest)]
        vector = np.frombuffer(finish.adapter, dtype="<f4")
        assert adapter_digest(setting.plan.digest(), vector) == release.adapter


def test_a_job_name_belongs_to_one_plan(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE)
    setting.job().run()
    other = Aggregation(threshold=3, clip_range=0.5, step=1e-6)
    setting.plan = msgspec.structs.replace(setting.plan, aggregation=other)
    with pytest.raises(PlanError, match="exists with another plan"):
        setting.job().run()


def test_a_threshold_past_the_roster_is_refused_at_once(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=Aggregation(threshold=4, clip_range=1.0, step=1e-6))
    with pytest.raises(PlanError, match=r"aggregation\.threshold"):
        setting.job()


def test_a_site_that_was_wronged_by_a_peer_is_asked_again(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE)
    victim = setting.sites["site-01"]
    honest = victim.answer

    def refuse_once(request: Any) -> Any:
        if isinstance(request, MaskRequest | MaskPreparedRequest):
            victim.answer = honest
            return Refusal(check="share-decrypt")
        return honest(request)

    victim.answer = refuse_once
    setting.job().run()
    assert setting.observer.aborts == [(1, 1, "too-few-vectors")]
    assert setting.observer.releases[0].survivors == tuple(sorted(setting.sites))


def test_a_site_whose_key_is_revoked_is_asked_for_nothing(make_setting: Any) -> None:
    setting = make_setting(4, aggregation=THREE)
    revoked = setting.roster.member("site-01").public_key
    release = setting.job(revoked=frozenset({revoked})).run()
    assert release.survivors == ("site-00", "site-02", "site-03")
    assert setting.sites["site-01"].requests == []


def test_a_threshold_that_the_sites_without_revoked_keys_cannot_reach_is_refused(
    make_setting: Any,
) -> None:
    setting = make_setting(3, aggregation=THREE)
    revoked = setting.roster.member("site-01").public_key
    with pytest.raises(PlanError, match="threshold"):
        setting.job(revoked=frozenset({revoked}))


def test_an_operator_is_told_of_a_wrong_share_that_did_no_harm(make_setting: Any) -> None:
    setting = make_setting(5, aggregation=THREE)
    liar = setting.sites["site-00"]
    honest = liar.answer

    def answer(request: Any) -> Any:
        reply = honest(request)
        if isinstance(reply, UnmaskReply):
            wrong = msgspec.structs.replace(reply.shares[1], share=bytes(32))
            shares = (reply.shares[0], wrong, *reply.shares[2:])
            reply = msgspec.structs.replace(reply, shares=shares)
        return reply

    liar.answer = answer
    setting.job().run()
    assert setting.observer.aborts == []
    assert {(share.owner, share.site) for share in setting.observer.disputes} == {
        ("site-01", "site-00")
    }


def test_a_refusal_that_was_recorded_evicts_nobody_from_a_later_attempt(
    make_setting: MakeSetting,
) -> None:
    """Whoever reaches a site has it refuse garbage, and plays the refusal back ever after."""
    setting = make_setting(3, aggregation=THREE)
    site = setting.sites["site-01"]
    recorded = seal_reply(
        site.identity, "site-01", Refusal(check="malformed-message"), request_digest(b"garbage")
    )
    exchange = setting.link.exchange

    def with_replay(step: Step, requests: Any, seconds: float) -> Any:
        for position, answer in enumerate(exchange(step, requests, seconds)):
            if position == 1:
                yield "site-01", recorded
            yield answer

    setting.link.exchange = with_replay
    setting.job().run()
    assert setting.observer.aborts == []
    assert all(len(release.survivors) == 3 for release in setting.observer.releases)
    assert ("site-01", "pinned-signature") in setting.observer.strays


def test_counts_of_the_sites_are_summed_beside_the_adapter(make_setting: MakeSetting) -> None:
    evaluation = FederatedEvaluation(noise_multiplier=1.0, max_records=100)
    setting = make_setting(4, aggregation=THREE, evaluation=evaluation)
    release = setting.job().run()
    found = setting.observer.counts
    assert [(number, sites) for number, _, sites in found] == [(1, 4), (2, 4), (3, 4)]
    for _, counts, _ in found:
        assert (counts.score, counts.records) == pytest.approx((120, 160), abs=0.01)
    adapter = setting.registry.load(setting.plan, release.adapter)
    expected = expected_adapter(setting, [sorted(setting.sites)] * 3)
    assert np.abs(adapter - expected).max() < 1e-5
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert job.releases[-1] == release
