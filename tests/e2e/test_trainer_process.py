"""Trainers as processes without a network, asked over their sockets by a real job."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e.daemons import Clinics, Daemon, Once, SocketLink
from support.waiting import HANGING

from umbel_client.site.decisions import Decisions
from umbel_client.site.ipc import TrainerStub
from umbel_client.site.state_folder import StateFolder
from umbel_client.trainer.isolation import Network, network
from umbel_common.trust.identity import sign
from umbel_host.transport.sockets import is_healthy
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits
from umbel_server.storage.job_queue import JobState

PATIENT = Limits(attempts=3, offer_seconds=300, train_seconds=300, stage_seconds=300)


@pytest.fixture
def clinics(tmp_path: Path, tiny_model: Path) -> Iterator[Clinics]:
    made = Clinics(tmp_path, tiny_model)
    yield made
    made.close()


def link(clinics: Clinics, **hooks: object) -> Callable[[Callable[[], bool]], SocketLink]:
    return lambda stopped: SocketLink(clinics.sites, stopped, **hooks)  # type: ignore[arg-type]


def adapters(clinics: Clinics) -> set[bytes]:
    files = {
        site.folder / "state" / "adapters" / "triage" / "adapter_model.safetensors"
        for site in clinics.sites.values()
    }
    return {path.read_bytes() for path in files}


def test_a_job_runs_over_sockets_and_everybody_has_the_same_adapter(clinics: Clinics) -> None:
    clinics.start()
    job = clinics.run(clinics.rounds(link(clinics), PATIENT))
    assert job.state is JobState.FINISHED, job.detail
    assert len(adapters(clinics)) == 1
    for site in clinics.sites.values():
        status = site.status()
        assert status.epsilon is not None
        assert 0 < status.epsilon <= 8.0
        assert status.isolated or network() is Network.NONE
        assert is_healthy(site.socket, HANGING)
        assert site.trainer.stop() == 0
        assert not site.socket.exists()


@pytest.mark.soak
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_trainer_that_is_killed_before_or_after_its_answer_costs_nothing(
    clinics: Clinics, moment: str
) -> None:
    clinics.start()
    site = clinics.sites["north"]

    def restart() -> None:
        site.trainer.kill()
        site.trainer.start()

    steps = {
        "before": (("train", 1), ("mask", 2), ("unmask", 3)),
        "after": (("mask", 1), ("train", 2), ("confirm", 3)),
    }[moment]
    kills = [Once(stage, number, "north", restart) for stage, number in steps]

    def kill(step: Step, name: str) -> None:
        for once in kills:
            once(step, name)

    job = clinics.run(clinics.rounds(link(clinics, **{moment: kill}), PATIENT))
    assert job.state is JobState.FINISHED, job.detail
    assert all(once.done for once in kills)
    assert len(adapters(clinics)) == 1


def test_a_job_waits_for_people_and_goes_on_when_they_approved(
    tmp_path: Path, tiny_model: Path
) -> None:
    clinics = Clinics(tmp_path, tiny_model, policy="")
    try:
        clinics.start()
        rounds = clinics.rounds(link(clinics), PATIENT)
        plan = clinics.plan()
        clinics.queue.add(plan.job, sign(clinics.operator, plan))
        assert not rounds.run_next()
        waiting = clinics.queue.job(plan.job)
        assert waiting.state is JobState.WAITING
        assert "awaiting-approval" in waiting.detail
        for site in clinics.sites.values():
            assert site.status().waiting == ("triage",)
            Decisions(StateFolder(site.folder / "state")).approve(plan.digest())
        assert rounds.run_next()
        assert clinics.queue.job(plan.job).state is JobState.FINISHED
    finally:
        clinics.close()


def test_a_job_that_the_operator_stops_goes_on_later(clinics: Clinics) -> None:
    clinics.start()

    def stop() -> None:
        clinics.queue.ask_to_stop("triage")

    asked = Once("mask", 2, "north", stop)
    rounds = clinics.rounds(link(clinics, before=asked), PATIENT)
    job = clinics.run(rounds)
    assert (job.state, job.round) == (JobState.STOPPED, 2)
    assert clinics.queue.resume("triage").state is JobState.WAITING
    assert rounds.run_next()
    assert clinics.queue.job("triage").state is JobState.FINISHED
    assert len(adapters(clinics)) == 1


def test_a_job_whose_sites_are_too_few_fails_and_says_who_refused(clinics: Clinics) -> None:
    for name in ("east", "north"):
        config = clinics.sites[name].config
        config.write_text(config.read_text().replace("max_epsilon = 8.0", "max_epsilon = 1.0"))
    clinics.start()
    job = clinics.run(clinics.rounds(link(clinics), PATIENT))
    assert job.state is JobState.FAILED
    assert "east refused: epsilon-too-large" in job.detail


def test_a_second_trainer_on_one_state_folder_refuses_to_start(clinics: Clinics) -> None:
    site = clinics.sites["north"]
    site.trainer.start()
    site.status()
    second = Daemon(site.folder, "umbel_client.trainer_process", str(site.config))
    second.start()
    assert second.wait() == 50
    assert "is already running" in site.trainer.log.read_text()
    # The first one's socket is still its own.
    stub = TrainerStub(site.socket)
    assert stub.handle(b"garbage")
    stub.close()


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ("[relay]", "[reley]", 10, "did you mean relay?"),
        ('identity = "identity.pem"', 'identity = "nobody.pem"', 20, "nobody.pem"),
        ('path = "data.jsonl"', 'path = "nowhere.jsonl"', 11, "nowhere.jsonl"),
        ("public_size = 40", 'public_size = 40\nlabel_column = "text"', 11, "row 1 has a label"),
        ('state = "state"', 'state = "data.jsonl/state"', 50, "the state folder cannot be used"),
        ("[model]\n", '[model]\npath = "nowhere" #', 12, "nowhere"),
        ("minimum_cohort = 2", 'operators = ["aaaa-bbbb"]', 30, "operator"),
    ],
)
def test_a_wrong_configuration_ends_the_trainer_with_one_clear_error(
    clinics: Clinics, old: str, new: str, code: int, said: str
) -> None:
    site = clinics.sites["north"]
    text = site.config.read_text()
    assert old in text
    site.config.write_text(text.replace(old, new))
    site.trainer.start()
    assert site.trainer.wait() == code
    assert said in site.trainer.log.read_text()
