"""A job of distributed mode at the server: lost attempts, the floor of a sum, the last attempt."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from umbel_common.errors import JobFailed, PlanError
from umbel_common.plans.plan import Aggregation, DistributedPrivacy, NoOptimizer, Training
from umbel_common.plans.server_optimizer import ServerSgd
from umbel_common.protocol.verification import verify_transcript
from umbel_common.protocol.wire import Refusal, TrainRequest

MakeSetting = Callable[..., Any]
SITES = 4
PRIVACY = DistributedPrivacy(
    epsilon=8.0,
    delta=1e-5,
    clip_norm=1.0,
    sampling_rate=0.1,
    noise_bits=4,
    honest=2,
    least_survivors=3,
    most_attempts=4,
)


def sharing(make_setting: MakeSetting, count: int = SITES, **changes: Any) -> Any:
    """Sites of a plan of three rounds and four attempts."""
    return make_setting(
        count,
        server=ServerSgd(adapter_learning_rate=0.5),
        training=Training(rounds=3, local_steps=1, expected_batch_size=8, optimizer=NoOptimizer()),
        privacy=msgspec.structs.replace(PRIVACY, **changes),
        aggregation=Aggregation(threshold=3, clip_range=1.0, step=1e-5),
    )


@pytest.mark.parametrize("check", ["attempt-lost", "site-fault"])
def test_a_site_that_lost_an_attempt_takes_part_in_the_next(
    make_setting: MakeSetting, check: str
) -> None:
    """A site that refuses for another reason would refuse again, and is left out of the round."""
    setting = sharing(make_setting, 3)
    site = setting.sites["site-01"]
    honest = site.answer

    def lose_once(request: Any) -> Any:
        if isinstance(request, TrainRequest):
            site.answer = honest
            return Refusal(check=check)
        return honest(request)

    site.answer = lose_once
    if check == "attempt-lost":
        setting.job().run()
        assert setting.observer.aborts == [(1, 1, "too-few-adverts")]
        assert setting.observer.releases[0].survivors == tuple(sorted(setting.sites))
        job = verify_transcript(setting.journal.transcript("job"), setting.roster)
        assert (job.aborted_attempts, job.last.round) == (1, 3)
    else:
        with pytest.raises(JobFailed, match="round 1 failed"):
            setting.job().run()
        assert len(setting.journal.headers("job")) == 1


@pytest.mark.parametrize(("least", "aborts"), [(3, 0), (4, 1)])
def test_a_sum_below_the_floor_is_not_formed(
    make_setting: MakeSetting, least: int, aborts: int
) -> None:
    """Three of four sites reach the threshold; whether they are enough is the plan's word."""
    setting = sharing(make_setting, least_survivors=least)
    setting.link.lost = lambda step, site: (
        (step.stage, step.round, step.attempt, site) == ("mask", 2, 1, "site-03")
    )
    setting.job().run()
    assert setting.observer.aborts == [(2, 1, "too-few-vectors")] * aborts
    assert all(len(release.survivors) >= least for release in setting.observer.releases)


def test_no_attempt_is_opened_past_the_plans_most(make_setting: MakeSetting) -> None:
    setting = sharing(make_setting)
    setting.link.lost = lambda step, site: (
        step.stage == "mask" and step.round == 1 and step.attempt < 3
    )
    for _ in range(2):
        with pytest.raises(JobFailed, match="the plan's attempts are used up") as caught:
            setting.job().run()
        assert "round 3 cannot begin" in caught.value.message
        assert "more spare attempts" in str(caught.value.remedy)
        assert len(setting.journal.headers("job")) == PRIVACY.most_attempts
    assert [release.round for release in setting.observer.releases] == [1, 2]


def test_a_floor_that_the_roster_cannot_reach_is_refused_at_once(
    make_setting: MakeSetting,
) -> None:
    setting = sharing(make_setting, least_survivors=5)
    with pytest.raises(PlanError, match=r"privacy\.least_survivors"):
        setting.job()
