"""What a job's sites prepare for its next attempt, and what costs an attempt its preparation."""

from collections.abc import Callable
from typing import Any

import pytest

from umbel_common.plans.plan import Aggregation
from umbel_common.protocol.verification import verify_transcript
from umbel_common.protocol.wire import FillRequest, Refusal, ShareAgainRequest, ShareRequest
from umbel_server.messaging.link import Step

MakeSetting = Callable[..., Any]
THREE = Aggregation(threshold=3, clip_range=1.0, step=1e-6)
PREPARED = ["train", "mask", "confirm", "unmask"]
UNPREPARED = ["train", "share", "mask", "confirm", "unmask"]


def stages(setting: Any, round_number: int) -> list[str]:
    """The stages of a round, in the order in which they were asked."""
    return [
        step.stage
        for step in setting.link.steps
        if step.round == round_number and step.stage not in ("offer", "prepare", "fill", "finish")
    ]


def exact(setting: Any) -> None:
    """Each release has the sum of its survivors, and the transcript verifies."""
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert [release.round for release in job.releases] == [0, 1, 2, 3]


def test_every_round_of_a_job_is_prepared_and_has_four_stages(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE)
    setting.job().run()
    assert [step.stage for step in setting.link.steps[:3]] == ["offer", "prepare", "fill"]
    assert [stages(setting, number) for number in (1, 2, 3)] == [PREPARED] * 3
    # Nothing is prepared for a round that the plan does not have.
    last = [step.stage for step in setting.link.steps if step.stage in ("prepare", "fill")]
    assert last == ["prepare", "fill"]
    exact(setting)


def test_a_site_that_does_not_know_preparing_is_never_asked_together_with_a_stage(
    make_setting: MakeSetting,
) -> None:
    """It would refuse both, and be out of the sum."""
    setting = make_setting(4, aggregation=THREE)
    setting.sites["site-02"].knows_preparing = False
    setting.job().run()
    assert [stages(setting, number) for number in (1, 2, 3)] == [UNPREPARED] * 3
    everyone = tuple(setting.sites)
    assert [release.survivors for release in setting.observer.releases] == [everyone] * 3
    assert setting.observer.aborts == []


@pytest.mark.parametrize("stage", ["train", "mask", "confirm", "unmask"])
def test_the_round_after_a_dropout_is_not_prepared_and_the_one_after_that_is(
    make_setting: MakeSetting, stage: str
) -> None:
    setting = make_setting(4, aggregation=THREE)
    lost = Step(stage, 1, 1)
    setting.link.lost = lambda step, site: step == lost and site == "site-01"
    setting.job().run()
    assert [stages(setting, number) for number in (1, 2, 3)] == [PREPARED, UNPREPARED, PREPARED]
    exact(setting)


def test_a_site_that_lost_its_slot_costs_its_round_a_stage(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE)
    restarted = setting.sites["site-01"]
    lost = setting.link.lost

    def restart(step: Step, site: str) -> bool:
        if step == Step("train", 2, 1):
            restarted.slot = None
        return lost(step, site)

    setting.link.lost = restart
    setting.job().run()
    assert [stages(setting, number) for number in (1, 2, 3)] == [PREPARED, UNPREPARED, PREPARED]
    everyone = tuple(setting.sites)
    assert [release.survivors for release in setting.observer.releases] == [everyone] * 3
    exact(setting)


def test_a_round_that_is_tried_again_has_five_stages(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE)
    silent = {"site-01", "site-02"}
    setting.link.lost = lambda step, site: step == Step("mask", 2, 1) and site in silent
    setting.job().run()
    assert setting.observer.aborts == [(2, 1, "too-few-vectors")]
    assert stages(setting, 2) == ["train", "mask", *UNPREPARED]
    assert stages(setting, 3) == PREPARED
    exact(setting)


def test_a_resumed_job_has_nothing_prepared_and_asks_again(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE)

    class Stop(Exception):
        pass

    def stop(step: Step, site: str) -> bool:
        if step == Step("train", 2, 1):
            raise Stop
        return False

    setting.link.lost = stop
    with pytest.raises(Stop):
        setting.job().run()
    setting.link.lost = lambda step, site: False
    setting.link.steps.clear()
    setting.job().run()
    assert [step.stage for step in setting.link.steps[:3]] == ["offer", "prepare", "fill"]
    # The number of the interrupted attempt is used up.
    assert setting.link.steps[3] == Step("train", 2, 2)
    assert [stages(setting, number) for number in (2, 3)] == [PREPARED] * 2
    exact(setting)


def test_a_site_that_is_silent_when_it_is_to_prepare_takes_part_all_the_same(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(4, aggregation=THREE)
    setting.link.lost = lambda step, site: step.stage == "prepare" and site == "site-03"
    setting.job().run()
    assert [stages(setting, number) for number in (1, 2, 3)] == [UNPREPARED] * 3
    everyone = tuple(setting.sites)
    assert [release.survivors for release in setting.observer.releases] == [everyone] * 3


def test_a_site_that_forgets_preparing_is_not_asked_together_any_more(
    make_setting: MakeSetting,
) -> None:
    """As one that was put back to an older version within a job: it loses one round."""
    setting = make_setting(4, aggregation=THREE)
    older = setting.sites["site-03"]

    def put_back(step: Step, site: str) -> bool:
        older.knows_preparing &= step != Step("confirm", 1, 1)
        return False

    setting.link.lost = put_back
    setting.job().run()
    assert [stages(setting, number) for number in (1, 2, 3)] == [PREPARED, UNPREPARED, UNPREPARED]
    survivors = [release.survivors for release in setting.observer.releases]
    # Its vector of round 1 was in before it refused to confirm.
    assert survivors == [tuple(setting.sites)] * 3
    assert setting.observer.aborts == []


def test_wrong_prepared_keys_cost_their_attempt_the_preparation_only(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(4, aggregation=THREE)
    liar, honest = setting.sites["site-00"], setting.sites["site-01"]
    answer = liar.prepare
    keys: list[Any] = []
    kept = honest.prepare

    def keep(request: Any) -> Any:
        reply = kept(request)
        if not isinstance(reply, Refusal):
            keys.append(reply)
        return reply

    def lie(request: Any) -> Any:
        reply = answer(request)
        return keys[-1] if keys else reply

    honest.prepare, liar.prepare = keep, lie
    setting.job().run()
    everyone = tuple(setting.sites)
    assert [release.survivors for release in setting.observer.releases] == [everyone] * 3
    assert stages(setting, 3) == UNPREPARED
    assert setting.observer.aborts == []


@pytest.mark.parametrize("stage", ["prepare", "fill"])
def test_a_resumed_job_finds_no_slots_of_the_one_before(
    make_setting: MakeSetting, stage: str
) -> None:
    """The server dies between what it prepared and the attempt, and resumes without a reply: sites
    that still had a slot would share in no way that this server asks for."""
    setting = make_setting(4, aggregation=THREE)

    class Stop(Exception):
        pass

    def stop(release: Any, adapter: Any) -> None:
        raise Stop

    released, setting.observer.on_released = setting.observer.on_released, stop
    with pytest.raises(Stop):
        setting.job().run()
    setting.observer.on_released = released
    setting.link.lost = lambda step, site: step.stage == stage and site == "site-03"
    setting.job().run()
    assert stages(setting, 2)[-5:] == UNPREPARED
    everyone = tuple(setting.sites)
    assert [release.survivors for release in setting.observer.releases] == [everyone] * 2
    assert setting.observer.aborts == []
    exact(setting)


def test_shares_whose_reply_was_lost_leave_a_slot_at_their_site(make_setting: MakeSetting) -> None:
    """All share again: masks of a site that prepared are bound to the adverts."""
    setting = make_setting(4, aggregation=THREE)
    kept = type(setting.sites["site-03"]).handle

    def forgetful(sealed: bytes) -> bytes:
        reply = kept(setting.sites["site-03"], sealed)
        lost = isinstance(setting.sites["site-03"].requests[-1], FillRequest)
        return b"" if lost else reply

    setting.link.sites["site-03"] = forgetful
    setting.job().run()
    asked = [type(request) for request in setting.sites["site-00"].requests]
    assert asked.count(ShareAgainRequest) == 1
    assert ShareRequest not in asked
    assert stages(setting, 1) == UNPREPARED
    assert stages(setting, 2) == stages(setting, 3) == PREPARED
    everyone = tuple(setting.sites)
    assert [release.survivors for release in setting.observer.releases] == [everyone] * 3
    exact(setting)
