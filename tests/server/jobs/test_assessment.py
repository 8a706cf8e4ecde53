"""The release gate and the early end, over the real job, journal and protocol, with toy sites."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from umbel_common.adapters.vector import Vector, initial_vector
from umbel_common.errors import ConfigError, DataError, JobFailed, UmbelError
from umbel_common.plans.figures import ClassificationFigures, Evaluation, Loss
from umbel_common.plans.plan import Adam, Aggregation, ReleaseGate, Training, TrainingPlan
from umbel_common.plans.statements import EarlyEnd
from umbel_common.protocol.verification import verify_transcript
from umbel_common.protocol.wire import FinishRequest
from umbel_common.trust.identity import open_signed

MakeSetting = Callable[..., Any]
THREE = Aggregation(threshold=3, clip_range=1.0, step=1e-6)
GATE = ReleaseGate(holdout=bytes(32), max_loss_increase=0.1)
GATED = {"aggregation": THREE, "release_gate": GATE}


def rounds(number: int) -> Training:
    return Training(
        rounds=number,
        local_steps=1,
        expected_batch_size=8,
        optimizer=Adam(adapter_learning_rate=1e-3),
    )


class Scripted:
    """Finds the losses that a test gives, in the order in which it is asked; an error is raised."""

    def __init__(self, *losses: Loss | Exception, stop_after: int | None = None) -> None:
        self.losses = list(losses)
        self.stop_after = stop_after
        self.seen: list[tuple[Vector, Vector | None]] = []

    def check(self, plan: TrainingPlan) -> None:
        pass

    def evaluate(self, plan: TrainingPlan, adapter: Vector, before: Vector | None) -> Evaluation:
        self.seen.append((adapter.copy(), None if before is None else before.copy()))
        loss = self.losses.pop(0)
        if isinstance(loss, Exception):
            raise loss
        return Evaluation(
            records=1,
            mean_loss=loss,
            figures=ClassificationFigures(accuracy=0.5, macro_f1=0.5),
        )


def adapters(setting: Any) -> list[bytes]:
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    return [release.adapter for release in job.releases]


def test_an_adapter_within_the_bound_is_released(make_setting: MakeSetting) -> None:
    setting = make_setting(3, **GATED)
    setting.job(evaluator=Scripted(1.0, 1.1, 1.2, 0.5)).run()
    assert len(set(adapters(setting))) == 4
    assert [one.held_back for one in setting.journal.evaluations("job")] == [False] * 4


def test_a_round_past_the_bound_releases_its_predecessor_and_sites_go_on_from_it(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, **GATED)
    evaluator = Scripted(1.0, 0.9, 5.0, 0.95)
    final = setting.job(evaluator=evaluator).run()
    first, second, third, last = adapters(setting)
    assert second == third
    assert len({first, second, last}) == 3
    assert final.adapter == last
    # The third round is compared with the first one's loss, and starts from its adapter.
    held = [one for one in setting.journal.evaluations("job") if one.held_back]
    assert [(one.round, str(one.gate)) for one in held] == [
        (2, "mean-loss 5 after 0.9, at most 0.1 more")
    ]
    for site in setting.sites.values():
        assert site.started[1] == site.started[2] != site.started[0]
    np.testing.assert_array_equal(evaluator.seen[3][1], evaluator.seen[1][0])
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert job.held_back == (2,)
    # Its adapter is in nobody's hands: not in the registry either.
    assert len(list((setting.folder / "registry").iterdir())) == 3


def test_an_adapter_whose_loss_is_no_number_is_held_back(make_setting: MakeSetting) -> None:
    setting = make_setting(3, **GATED)
    setting.job(evaluator=Scripted(1.0, None, None, 1.0)).run()
    assert [one.held_back for one in setting.journal.evaluations("job")] == [
        False,
        True,
        True,
        False,
    ]


def test_without_a_gate_the_worst_adapter_is_released(make_setting: MakeSetting) -> None:
    """What the gate prevents."""
    setting = make_setting(3, aggregation=THREE)
    setting.job(evaluator=Scripted(1.0, 5.0, None, 9.0)).run()
    assert len(set(adapters(setting))) == 4


def test_a_gated_plan_does_not_start_without_an_evaluator(make_setting: MakeSetting) -> None:
    setting = make_setting(3, **GATED)
    with pytest.raises(ConfigError, match="does not evaluate"):
        setting.job().run()
    assert setting.link.steps == []
    assert setting.journal.jobs() == []


def test_a_gated_plan_does_not_start_if_its_holdout_cannot_be_had(
    make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make_setting(3, **GATED)
    evaluator = Scripted()

    def check(plan: TrainingPlan) -> None:
        raise DataError("the holdout cannot be read")

    monkeypatch.setattr(evaluator, "check", check)
    with pytest.raises(DataError):
        setting.job(evaluator=evaluator).run()
    assert setting.journal.jobs() == []


CRASH = UmbelError("the evaluation of an adapter failed", found="signal 9")


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_failed_evaluation_stops_a_gated_job_which_resumes_there(
    make_setting: MakeSetting, at: int
) -> None:
    setting = make_setting(3, **GATED)
    losses: list[Loss | Exception] = [1.0, 0.9, 0.8, 0.7]
    with pytest.raises(JobFailed, match="signal 9"):
        setting.job(evaluator=Scripted(*losses[:at], CRASH)).run()
    assert len(setting.journal.releases("job")) == max(at, 1)
    assert len(setting.journal.evaluations("job")) == at
    setting.link.steps.clear()
    assert setting.job(evaluator=Scripted(*losses[at:])).run().round == 3
    trained = [step.round for step in setting.link.steps if step.stage == "train"]
    assert min(trained) == max(at, 1)
    assert len(adapters(setting)) == 4


def test_a_failed_evaluation_costs_a_job_without_a_gate_its_figures_only(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE)
    setting.job(evaluator=Scripted(CRASH, 1.0, CRASH, 1.0)).run()
    assert [one.round for one in setting.journal.evaluations("job")] == [1, 3]
    assert [number for number, _ in setting.observer.unevaluated_rounds] == [0, 2]


def test_a_job_ends_early_with_the_best_adapter(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE, training=rounds(9))
    final = setting.job(evaluator=Scripted(1.0, 0.7, 0.8, 0.6, 0.61, 0.65, stop_after=2)).run()
    assert final.round == 3
    assert setting.observer.early_ends == [(5, 3)]
    job = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert (job.final_round, len(job.releases)) == (3, 6)
    assert job.delivered == tuple(sorted(setting.sites))
    for site in setting.sites.values():
        (finish,) = [request for request in site.requests if isinstance(request, FinishRequest)]
        assert finish.early_end is not None
        end = open_signed(finish.early_end, EarlyEnd, setting.roster.operator)
        assert (end.plan, end.round) == (setting.plan.digest(), 3)
    setting.link.steps.clear()
    assert setting.job().run() == final
    assert setting.link.steps == []


def test_a_job_that_improves_slowly_goes_on_to_its_last_round(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE, training=rounds(4))
    final = setting.job(evaluator=Scripted(1.0, 1.1, 0.9, 1.0, 0.8, stop_after=2)).run()
    assert final.round == 4
    assert setting.observer.early_ends == []
    for site in setting.sites.values():
        (finish,) = [request for request in site.requests if isinstance(request, FinishRequest)]
        assert finish.early_end is None


def test_rounds_that_were_held_back_bring_nothing(make_setting: MakeSetting) -> None:
    setting = make_setting(3, **GATED, training=rounds(9))
    final = setting.job(evaluator=Scripted(1.0, 0.9, 3.0, 4.0, stop_after=2)).run()
    assert final.round == 1
    assert len(adapters(setting)) == 4


def test_a_job_that_was_stopped_before_its_early_end_ends_when_it_is_resumed(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE, training=rounds(9))

    def crash(step: Any, site: str) -> bool:
        if step.stage == "finish":
            raise KeyboardInterrupt
        return False

    setting.link.lost = crash
    with pytest.raises(KeyboardInterrupt):
        setting.job(evaluator=Scripted(1.0, 2.0, 3.0, stop_after=2)).run()
    setting.link.lost = lambda step, site: False
    final = setting.job(evaluator=Scripted(stop_after=2)).run()
    assert final.round == 0
    np.testing.assert_array_equal(
        setting.registry.load(setting.plan, final.adapter), initial_vector(setting.plan)
    )
    assert verify_transcript(setting.journal.transcript("job"), setting.roster).final_round == 0


def test_the_journal_keeps_what_was_found(make_setting: MakeSetting) -> None:
    setting = make_setting(3, **GATED)
    setting.job(evaluator=Scripted(1.0, 0.9, 5.0, None)).run()
    found = setting.journal.evaluations("job")
    assert [one.evaluation.mean_loss for one in found] == [1.0, 0.9, 5.0, None]
    assert [number for number, _, _ in setting.observer.evaluations] == [0, 1, 2, 3]
    assert msgspec.structs.replace(found[1].gate, before=1.0) == found[1].gate
