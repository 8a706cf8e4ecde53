"""The job queue: what is wanted and how far it is, over restarts and from several processes."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from umbel_common.errors import JobUnknown, RunExists, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.trust.identity import Identity, sign
from umbel_server.storage.job_queue import JobQueue, JobState, SiteAnswer, Times

MakePlan = Callable[..., TrainingPlan]
OPERATOR = Identity.generate(os.urandom)


@pytest.fixture
def queue(tmp_path: Path, make_plan: MakePlan) -> Iterator[JobQueue]:
    """With the jobs a and b, in this order."""
    opened = JobQueue(tmp_path / "queue.sqlite")
    for name in ("a", "b"):
        opened.add(name, sign(OPERATOR, make_plan(job=name)))
    yield opened
    opened.close()


def turn(queue: JobQueue) -> str | None:
    queued = queue.next_job()
    return None if queued is None else queued.job


def test_jobs_take_turns_in_the_order_in_which_they_came(queue: JobQueue) -> None:
    assert turn(queue) == "a"
    queue.set_state("a", JobState.FINISHED)
    assert turn(queue) == "b"
    queue.set_state("b", JobState.FAILED, "too few sites")
    assert turn(queue) is None


def test_the_job_under_way_goes_on_first(queue: JobQueue) -> None:
    queue.set_state("b", JobState.RUNNING)
    assert turn(queue) == "b"


def test_a_plan_that_nobody_approves_holds_nobody_up(queue: JobQueue) -> None:
    queue.set_state("a", JobState.WAITING, "awaiting approval")
    assert turn(queue) == "b"
    queue.set_state("b", JobState.WAITING, "awaiting approval")
    assert turn(queue) == "a"


def test_a_name_is_used_once(queue: JobQueue, make_plan: MakePlan) -> None:
    with pytest.raises(RunExists, match="resume it"):
        queue.add("a", sign(OPERATOR, make_plan(job="a")))
    assert [job.job for job in queue.jobs()] == ["a", "b"]


def test_a_job_that_nobody_started_is_unknown(queue: JobQueue) -> None:
    for ask in (queue.job, queue.ask_to_stop, queue.resume):
        with pytest.raises(JobUnknown, match="a, b"):
            ask("c")


def test_a_running_job_is_asked_to_stop_and_a_waiting_one_is_stopped(queue: JobQueue) -> None:
    queue.set_state("a", JobState.RUNNING)
    assert queue.ask_to_stop("a").stop
    assert queue.is_stop_wanted("a")
    assert queue.job("a").state is JobState.RUNNING
    assert queue.ask_to_stop("b").state is JobState.STOPPED
    queue.set_state("a", JobState.STOPPED)
    assert not queue.is_stop_wanted("a")


@pytest.mark.parametrize("state", [JobState.STOPPED, JobState.FAILED])
def test_what_stopped_or_failed_can_go_on(queue: JobQueue, state: JobState) -> None:
    queue.set_state("a", state, "reason")
    resumed = queue.resume("a")
    assert (resumed.state, resumed.detail, resumed.stop) == (JobState.WAITING, "", False)


def test_a_finished_job_stays_finished(queue: JobQueue) -> None:
    queue.set_state("a", JobState.FINISHED)
    assert queue.resume("a").state is JobState.FINISHED
    assert queue.ask_to_stop("a").state is JobState.FINISHED


def test_a_stop_that_was_not_carried_out_yet_can_be_taken_back(queue: JobQueue) -> None:
    queue.set_state("a", JobState.RUNNING)
    queue.ask_to_stop("a")
    assert not queue.resume("a").stop
    assert queue.job("a").state is JobState.RUNNING


def test_another_process_sees_what_was_written(queue: JobQueue, tmp_path: Path) -> None:
    queue.begin_stage("a", 2, 1, "mask")
    for site, refused in (("north", ""), ("east", "roster-digest"), ("south", "")):
        queue.add_answer("a", SiteAnswer(site, 2, 1, "mask", refused, 1.0))
    other = JobQueue(tmp_path / "queue.sqlite")
    found = other.job("a")
    other.ask_to_stop("a")
    other.close()
    assert (found.round, found.attempt, found.stage) == (2, 1, "mask")
    assert found.answered == ("north", "south")
    assert [(one.site, one.refused) for one in queue.answers("a")] == [
        ("east", "roster-digest"),
        ("north", ""),
        ("south", ""),
    ]
    assert queue.answers("b") == ()
    assert queue.job("a").state is JobState.STOPPED


def test_a_stage_that_begins_has_no_answers_and_a_round_its_time(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    for moment, (round_number, stage) in enumerate(
        [(0, "offer"), (1, "train"), (1, "share"), (1, "train"), (1, "mask")]
    ):
        now = 100.0 + 10 * moment
        queue.begin_stage("a", round_number, 1, stage)
        queue.add_answer("a", SiteAnswer("north", round_number, 1, stage, "", now))
    assert queue.job("a").answered == ("north",)
    # A second attempt belongs to the round that began with the first.
    assert queue.times("a") == Times(140.0, 110.0, 0.0)
    queue.end_round("a")
    assert queue.times("a").round_seconds == 30.0
    queue.begin_stage("a", 2, 1, "train")
    assert queue.job("a").answered == ()
    assert queue.times("a") == Times(140.0, 140.0, 30.0)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match=r"queue\.sqlite"):
        JobQueue(path)
