"""Who is sent a release as its difference, over the real job, journal and protocol with toy sites.

A toy site makes the adapter of the difference as a site does, and asserts its digest.
"""

from collections.abc import Callable
from typing import Any

import pytest

from umbel_common.adapters.vector import Vector
from umbel_common.errors import JobFailed
from umbel_common.plans.figures import ClassificationFigures, Evaluation
from umbel_common.plans.plan import Aggregation, Lora, ReleaseGate, Tensor, TrainingPlan
from umbel_common.plans.server_optimizer import Average
from umbel_common.protocol.verification import verify_transcript
from umbel_common.protocol.wire import Refusal, Request, TrainFromLastRequest, TrainRequest
from umbel_server.messaging.link import Step

THREE = Aggregation(threshold=3, clip_range=1.0, step=1e-6)
TENSORS = (
    Tensor(name="layer.query.lora_A.weight", shape=(2, 9_000), role="lora_A"),
    Tensor(name="layer.query.lora_B.weight", shape=(9_000, 2), role="lora_B"),
    Tensor(name="head.bias", shape=(3,), role="head"),
)
HALF = 4 * (18_000 + 3)
"""Bytes of what a round under `alternate` trains."""
LATE = "site-02"

# `Setting` lives in the conftest, which a test module cannot import.
MakeSetting = Callable[..., Any]


def lora_of(method: str) -> Lora:
    return Lora(
        rank=2,
        alpha=4.0,
        target_modules=("query",),
        layers=None,
        method=method,  # type: ignore[arg-type]  # one of the four
        seed=7,
        tensors=TENSORS,
    )


@pytest.fixture
def setting(make_setting: MakeSetting) -> Any:
    """Three sites, all of which the threshold needs; rounds alternate."""
    return make_setting(3, aggregation=THREE, lora=lora_of("alternate"))


def brought(setting: Any) -> dict[str, list[int | None]]:
    return {name: site.brought for name, site in setting.sites.items()}


def everyone(setting: Any, *expected: int | None) -> dict[str, list[int | None]]:
    return {name: list(expected) for name in setting.sites}


def answering(site: Any, kind: type[Request], check: str, times: int = 1) -> list[Request]:
    """Makes a site refuse requests of a kind, so many times; returns those that it refused."""
    honest, refused = site.answer, []

    def answer(request: Any) -> Any:
        if isinstance(request, kind) and len(refused) < times:
            refused.append(request)
            return Refusal(check=check)
        return honest(request)

    site.answer = answer
    return refused


def test_a_round_brings_what_the_round_before_trained(setting: Any) -> None:
    release = setting.job().run()
    assert brought(setting) == everyone(setting, None, HALF, HALF)
    assert all(site.started[-1] != site.started[-2] for site in setting.sites.values())
    whole, second, third = (
        setting.link.sizes[Step("train", number, 1), "site-00"] for number in (1, 2, 3)
    )
    assert second < 0.52 * whole
    assert third < 0.52 * whole
    assert verify_transcript(setting.journal.transcript("job"), setting.roster).last == release


@pytest.mark.parametrize("method", ["both", "fedsvd"])
def test_a_difference_that_is_not_smaller_is_not_sent(
    make_setting: MakeSetting, method: str
) -> None:
    """Under fedsvd a round trains B alone, and the release rotates A with it."""
    setting = make_setting(3, aggregation=THREE, server=Average(), method=method)
    setting.job().run()
    assert brought(setting) == everyone(setting, None, None, None)


@pytest.mark.parametrize("method", ["both", "alternate", "fedsvd"])
def test_a_site_that_has_verified_the_release_is_sent_nothing_again(
    make_setting: MakeSetting, method: str
) -> None:
    setting = make_setting(3, aggregation=THREE, server=Average(), method=method)
    setting.link.lost = lambda step, site: (
        step in (Step("mask", 1, 1), Step("mask", 2, 1)) and site == LATE
    )
    setting.job().run()
    assert setting.observer.aborts == [(1, 1, "too-few-vectors"), (2, 1, "too-few-vectors")]
    for sizes in brought(setting).values():
        first, first_again, _, second_again, _ = sizes
        assert (first, first_again, second_again) == (None, 0, 0)


class Scripted:
    """Finds the losses that a test gives."""

    stop_after = None

    def __init__(self, *losses: float) -> None:
        self.losses = list(losses)

    def check(self, plan: TrainingPlan) -> None:
        pass

    def evaluate(self, plan: TrainingPlan, adapter: Vector, before: Vector | None) -> Evaluation:
        figures = ClassificationFigures(accuracy=0.5, macro_f1=0.5)
        return Evaluation(records=1, mean_loss=self.losses.pop(0), figures=figures)


def test_after_a_round_that_was_held_back_there_is_nothing_to_send(
    make_setting: MakeSetting,
) -> None:
    gate = ReleaseGate(holdout=bytes(32), max_loss_increase=0.1)
    setting = make_setting(3, aggregation=THREE, lora=lora_of("both"), release_gate=gate)
    setting.job(evaluator=Scripted(1.0, 5.0, 0.9, 0.8)).run()
    assert brought(setting) == everyone(setting, None, 0, None)


def test_only_sites_that_answered_the_round_before_are_sent_a_difference(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(4, aggregation=THREE, lora=lora_of("alternate"))
    setting.link.lost = lambda step, site: step == Step("train", 1, 1) and site == "site-03"
    setting.job().run()
    expected = everyone(setting, None, HALF, HALF)
    expected["site-03"] = [None, HALF]
    assert brought(setting) == expected
    # Both went out in one stage of one attempt.
    trained = [step for step in setting.link.steps if step.stage == "train"]
    assert trained == [Step("train", number, 1) for number in (1, 2, 3)]


def test_a_site_that_missed_a_round_is_sent_the_whole(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE, lora=lora_of("alternate"))
    setting.link.lost = lambda step, site: step == Step("train", 2, 1) and site == "site-03"
    setting.job().run()
    assert brought(setting)["site-03"] == [None, None]
    assert brought(setting)["site-00"] == [None, HALF, HALF]


def test_a_server_that_starts_again_sends_the_whole(setting: Any) -> None:
    setting.link.lost = lambda step, site: step.round == 2 and step.stage == "mask"
    with pytest.raises(JobFailed):
        setting.job(attempts=1).run()
    setting.link.lost = lambda step, site: False
    setting.job().run()
    assert brought(setting) == everyone(setting, None, HALF, None, HALF)


def test_a_site_that_lost_its_copy_takes_part_in_the_next_attempt(setting: Any) -> None:
    """It would be left out of the round, and the round would fail, if it counted as unwilling."""
    site = setting.sites[LATE]
    honest = site.answer

    def lose(request: Any) -> Any:
        if isinstance(request, TrainFromLastRequest) and site.started == site.started[:1]:
            site.adapter = None
        return honest(request)

    site.answer = lose
    release = setting.job().run()
    assert setting.observer.aborts == [(2, 1, "too-few-adverts")]
    assert brought(setting)[LATE] == [None, HALF, None, HALF]
    assert brought(setting)["site-00"] == [None, HALF, 0, HALF]
    assert setting.observer.releases[1].survivors == tuple(sorted(setting.sites))
    assert release.round == 3


def test_an_older_site_is_sent_the_whole_from_then_on(setting: Any) -> None:
    refused = answering(setting.sites[LATE], TrainFromLastRequest, "malformed-message", times=9)
    setting.job().run()
    assert setting.observer.aborts == [(2, 1, "too-few-adverts")]
    assert len(refused) == 1
    assert brought(setting)[LATE] == [None, None, None]
    assert brought(setting)["site-00"] == [None, HALF, 0, HALF]


@pytest.mark.parametrize(
    ("kind", "round_number", "check"),
    [
        (TrainFromLastRequest, 2, "budget"),
        (TrainFromLastRequest, 2, "adapter-digest"),
        (TrainRequest, 1, "malformed-message"),
        (TrainRequest, 1, "release-missing"),
    ],
)
def test_whoever_would_refuse_the_whole_too_is_not_asked_again(
    setting: Any, kind: type[Request], round_number: int, check: str
) -> None:
    answering(setting.sites[LATE], kind, check)
    with pytest.raises(JobFailed, match=rf"round {round_number} failed.*\({check}\)"):
        setting.job().run()
    attempts = [step for step in setting.link.steps if step.stage == "train"]
    assert attempts[-1] == Step("train", round_number, 1)


def test_after_any_refusal_the_next_round_brings_the_whole(make_setting: MakeSetting) -> None:
    setting = make_setting(4, aggregation=THREE, lora=lora_of("alternate"))
    answering(setting.sites["site-03"], TrainFromLastRequest, "site-paused")
    setting.job().run()
    assert brought(setting)["site-03"] == [None, None]
