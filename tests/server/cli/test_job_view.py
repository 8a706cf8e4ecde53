"""What an operator sees of jobs: refusals, times, estimates, and who lags behind."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from support.enrolling import Enrolling
from typer.testing import CliRunner

import umbel_server.cli.command
from umbel_common.errors import PlanError, UmbelError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_to_json
from umbel_common.trust.identity import sign
from umbel_common.trust.roster_file import document_to_json
from umbel_server.cli import job_view
from umbel_server.messaging.carrier import Contact
from umbel_server.storage.job_queue import JobQueue, JobState, SiteAnswer

SITES = ("east", "north", "south")


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Enrolling(tmp_path_factory.mktemp("enrolled"))
    for site in SITES:
        made.ask(site)
        made.add(site)
    return made.folder


@pytest.fixture
def clinics(tmp_path: Path, enrolled: Path) -> Enrolling:
    shutil.copytree(enrolled, tmp_path, dirs_exist_ok=True)
    return Enrolling(tmp_path, new=False)


@pytest.fixture
def queue(clinics: Enrolling, make_plan: Callable[..., TrainingPlan]) -> Iterator[JobQueue]:
    """A job that runs its second round of three, under today's roster."""
    with closing(JobQueue(clinics.operator / "state" / "queue.sqlite")) as opened:
        add(opened, clinics, make_plan(federation="clinics"))
        yield opened


def add(queue: JobQueue, clinics: Enrolling, plan: TrainingPlan) -> None:
    queue.add(plan.job, sign(clinics.key(), plan))
    queue.keep_roster(plan.job, document_to_json(clinics.roster()))


def say(
    queue: JobQueue, site: str, refused: str = "", stage: str = "offer", when: float = 0
) -> None:
    queue.add_answer("job", SiteAnswer(site, int(stage != "offer"), 1, stage, refused, when))


def command(clinics: Enrolling, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[str, str]:
    monkeypatch.chdir(clinics.operator)
    done = CliRunner().invoke(umbel_server.cli.command.app, list(words), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout, done.stderr


def test_a_running_job_shows_stage_times_estimate_and_each_site(
    clinics: Enrolling, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.set_state("job", JobState.RUNNING)
    now = time.time()
    contacts = {"north": Contact(now - 5), "east": Contact(now, now, ("192.0.2.1", "192.0.2.2\n"))}
    contacts["north"] = Contact(now - 5, now - 90, ("192.0.2.3",))
    monkeypatch.setattr(job_view, "look", lambda _: job_view.Server(True, contacts))
    monkeypatch.setattr("umbel_server.cli.job.look", job_view.look)
    for began, number in ((now - 300, 1), (now - 80, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda at=began: at)
            queue.begin_stage("job", number, 1, "train")
            patch.setattr(time, "time", lambda at=began: at + 200)
            if number == 1:
                queue.end_round("job")
    say(queue, "north", stage="train", when=now)
    say(queue, "south", "site-paused", stage="train", when=now)
    shown, _ = command(clinics, monkeypatch, "job", "status", "job")
    assert "2 of 3, attempt 1, train, for 1 min 20 s of at most 1 h" in shown
    assert "about 5 min 20 s left, at 3 min 20 s a round" in shown
    assert "refused train of round 1: site-paused" in shown
    assert "5 s ago" in shown
    assert "none since the server started" in shown
    # The process with the port may say anything, and forges no line.
    assert "east IS CONNECTED TWICE, from 192.0.2.1 and 192.0.2.2\\n, last" in shown
    assert "north WAS CONNECTED TWICE, from 192.0.2.3, last seen" in shown
    found = json.loads(command(clinics, monkeypatch, "job", "status", "job", "--json")[0])
    assert found["roster"]["federation"] == "clinics"
    assert (found["rounds"], found["round"], found["server_running"]) == (3, 2, True)
    assert 300 < found["left_seconds"] < 330
    assert found["changed"].endswith("Z")
    by_site = {one["site"]: one for one in found["sites"]}
    assert by_site["south"]["refused"] == "site-paused"
    assert by_site["north"]["refused"] is None
    assert by_site["east"]["connected_twice"] is not None
    assert by_site["south"]["last_contact"] is None
    assert by_site["north"]["answered_at"].endswith("Z")
    queue.begin_stage("job", 3, 0, "finish")
    shown, _ = command(clinics, monkeypatch, "job", "status", "job")
    assert "3 of 3, finish, for" in shown
    assert "estimate" not in shown


def test_why_a_job_failed_has_a_line_for_each_part(
    clinics: Enrolling, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = UmbelError("too few", field="job", found="east refused:\nbudget", remedy="agree")
    queue.set_state("job", JobState.FAILED, error.diagnostics())
    shown, _ = command(clinics, monkeypatch, "job", "status", "job")
    lines = [line.split("  ", 1)[1].strip() for line in shown.splitlines() if "  " in line]
    start = lines.index("too few")
    assert lines[start : start + 4] == [
        "too few",
        "field: job",
        "found: east refused:\\nbudget",
        "what to do: agree",
    ]


def test_commands_say_that_no_server_runs_and_print_the_rest_as_ever(
    clinics: Enrolling, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.set_state("job", JobState.FAILED)
    for words in (("status",), ("status", "job"), ("resume", "job")):
        shown, said = command(clinics, monkeypatch, "job", *words)
        assert "No server is running" in said
        assert "No server" not in shown


def test_a_start_names_the_sites_whose_last_known_roster_is_another(
    clinics: Enrolling,
    queue: JobQueue,
    make_plan: Callable[..., TrainingPlan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(job: str) -> str:
        plan = make_plan(federation="clinics", job=job)
        signed = plan_to_json(plan, sign(clinics.key(), plan).signature)
        (clinics.operator / f"{job}.json").write_text(signed)
        return command(clinics, monkeypatch, "job", "start", f"{job}.json")[1]

    # Nothing is known of a site that never answered, or refused before it was asked.
    say(queue, "east", "labels-not-allowed", when=3)
    say(queue, "north", "awaiting-approval", when=3)
    assert "had not approved" not in start("second")
    say(queue, "south", "roster-digest", when=3)
    assert "when they last answered: south." in start("third")
    clinics.ask("west")
    clinics.add("west")
    assert "when they last answered: north, south." in start("fourth")
    # Under today's roster, north and south have answered since.
    add(queue, clinics, msgspec.structs.replace(make_plan(federation="clinics"), job="fifth"))
    for site in ("north", "south"):
        queue.add_answer("fifth", SiteAnswer(site, 0, 0, "offer", "", 4.0))
    assert "had not approved" not in start("sixth")


@pytest.mark.parametrize("answer", ["yes\n", "no\n", ""])
def test_a_plan_that_is_not_signed_is_signed_by_a_typed_yes_only(
    clinics: Enrolling,
    make_plan: Callable[..., TrainingPlan],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
) -> None:
    plan = make_plan(federation="clinics", job="later")
    (clinics.operator / "later.json").write_text(plan_to_json(plan))

    def queued() -> list[str]:
        path = clinics.operator / "state" / "queue.sqlite"
        with closing(JobQueue(path)) as queue:
            return [job.job for job in queue.jobs()]

    with pytest.raises(PlanError, match="a plan is not signed"):
        command(clinics, monkeypatch, "job", "start", "later.json")

    def typed(*_: object, declined: UmbelError, **__: object) -> None:
        if answer != "yes\n":
            raise declined

    monkeypatch.setattr("umbel_server.cli.job.confirm", typed)
    if answer == "yes\n":
        shown, _ = command(clinics, monkeypatch, "job", "start", "later.json")
        assert plan.digest().hex() in shown
        assert queued() == ["later"]
    else:
        with pytest.raises(UmbelError, match="nothing was changed"):
            command(clinics, monkeypatch, "job", "start", "later.json")
        assert queued() == []
