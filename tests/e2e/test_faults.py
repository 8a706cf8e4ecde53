"""Real processes that die, sites that vanish: the job finishes, and nothing is spent twice."""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from e2e.daemons import Clinics, Daemon, Site

import umbel_client.flower
from umbel_client.budget_view import release_costs
from umbel_client.ipc import TrainerStub
from umbel_client.ledger_file import read_ledger
from umbel_server.queue import State

MakeClinics = Callable[..., Clinics]


@pytest.fixture
def make_clinics(tmp_path: Path, tiny_model: Path) -> Iterator[MakeClinics]:
    """With these lines changed in the operator's limits."""
    made: list[Clinics] = []

    def make(**limits: float) -> Clinics:
        clinics = Clinics(tmp_path, tiny_model)
        made.append(clinics)
        path = clinics.operator_folder / "server.toml"
        text = path.read_text()
        for name, value in limits.items():
            (line,) = (line for line in text.splitlines() if line.startswith(f"{name} ="))
            text = text.replace(line, f"{name} = {value}")
        path.write_text(text)
        return clinics

    yield make
    for clinics in made:
        clinics.close()


def reached(clinics: Clinics, job: str, round_number: int) -> None:
    """Waits until a round is under way."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        queued = clinics.queue.job(job)
        if queued.round >= round_number or queued.state in (State.FINISHED, State.FAILED):
            assert queued.state is State.RUNNING, (queued.detail, clinics.logs())
            return
        time.sleep(0.01)
    raise AssertionError(clinics.logs())


def adapters(clinics: Clinics, job: str, *sites: str) -> set[bytes]:
    folders = (clinics.sites[name].folder for name in sites or clinics.sites)
    files = (
        folder / "state" / "adapters" / job / "adapter_model.safetensors" for folder in folders
    )
    return {path.read_bytes() for path in files}


def charged(site: Site) -> list[tuple[str, int]]:
    """Job and round of each reservation in a site's ledger."""
    contents = read_ledger(site.folder / "state" / "ledger.sqlite")
    return [(cost.job, cost.round) for cost in release_costs(contents, 1e-4)]


PROCESSES: dict[str, Callable[[Clinics], Daemon]] = {
    "port": lambda clinics: clinics.port_process,
    "rounds": lambda clinics: clinics.rounds_process,
    "relay": lambda clinics: clinics.sites["north"].relay,
    "trainer": lambda clinics: clinics.sites["north"].trainer,
}


@pytest.mark.parametrize("victim", PROCESSES)
def test_a_process_that_is_killed_and_started_again_does_not_end_the_job(
    make_clinics: MakeClinics, victim: str
) -> None:
    clinics = make_clinics(stage_seconds=15)
    clinics.start_all()
    job = clinics.add()
    for number in (1, 2):
        reached(clinics, job, number)
        process = PROCESSES[victim](clinics)
        process.kill()
        time.sleep(0.5)
        process.start()
    queued = clinics.wait(job, State.FINISHED, State.FAILED, State.STOPPED)
    assert queued.state is State.FINISHED, (queued.detail, clinics.logs())
    assert len(adapters(clinics, job)) == 1, clinics.logs()
    for site in clinics.sites.values():
        assert charged(site) == [(job, 1), (job, 2), (job, 3)]


def test_without_a_site_that_vanished_the_others_go_on(make_clinics: MakeClinics) -> None:
    clinics = make_clinics(train_seconds=10, stage_seconds=10)
    clinics.start_all()
    job = clinics.add()
    reached(clinics, job, 2)
    gone = clinics.sites["north"]
    gone.relay.kill()
    gone.trainer.kill()
    queued = clinics.wait(job, State.FINISHED, State.FAILED)
    assert queued.state is State.FINISHED, (queued.detail, clinics.logs())
    assert len(adapters(clinics, job, "east", "south")) == 1
    # What it spent it spent; nobody asked it for more.
    assert charged(gone) in ([(job, 1)], [(job, 1), (job, 2)])


@contextmanager
def full_disk(daemon: Daemon) -> Iterator[None]:
    """No file of the process can grow, as on a disk that is full."""
    before = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, before)


def test_a_site_whose_disk_is_full_sits_out_and_comes_back(make_clinics: MakeClinics) -> None:
    clinics = make_clinics(train_seconds=30, stage_seconds=15)
    clinics.start_all()
    job = clinics.add()
    reached(clinics, job, 1)
    site = clinics.sites["north"]
    with full_disk(site.trainer):
        reached(clinics, job, 3)
    queued = clinics.wait(job, State.FINISHED, State.FAILED)
    assert queued.state is State.FINISHED, (queued.detail, clinics.logs())
    assert site.trainer.running
    assert len(adapters(clinics, job, "east", "south")) == 1
    rounds = charged(site)
    assert sorted(set(rounds)) == rounds
    assert charged(clinics.sites["east"]) == [(job, 1), (job, 2), (job, 3)]


def test_a_server_whose_disk_is_full_goes_on_when_there_is_room(make_clinics: MakeClinics) -> None:
    clinics = make_clinics()
    clinics.start_all()
    job = clinics.add()
    reached(clinics, job, 1)
    with full_disk(clinics.rounds_process):
        time.sleep(12)
        assert clinics.rounds_process.running
        assert clinics.queue.job(job).state is State.RUNNING
    queued = clinics.wait(job, State.FINISHED, State.FAILED)
    assert queued.state is State.FINISHED, (queued.detail, clinics.logs())
    assert len(adapters(clinics, job)) == 1
    for site in clinics.sites.values():
        assert charged(site) == [(job, 1), (job, 2), (job, 3)]


def test_two_jobs_one_after_the_other_are_charged_to_one_ledger(
    make_clinics: MakeClinics,
) -> None:
    clinics = make_clinics()
    clinics.start_all()
    first = clinics.add()
    second = clinics.add(job="triage-2")
    for job in (first, second):
        queued = clinics.wait(job, State.FINISHED, State.FAILED)
        assert queued.state is State.FINISHED, (queued.detail, clinics.logs())
    for site in clinics.sites.values():
        contents = read_ledger(site.folder / "state" / "ledger.sqlite")
        costs = release_costs(contents, 1e-4)
        assert [(cost.job, cost.round) for cost in costs] == [
            (job, number) for job in (first, second) for number in (1, 2, 3)
        ]
        spent = [cost.epsilon for cost in costs]
        assert spent == sorted(spent)
        assert spent[-1] > spent[2] > 0


def test_a_job_that_failed_goes_on_when_the_operator_resumes_it(
    make_clinics: MakeClinics,
) -> None:
    clinics = make_clinics(attempts=1, train_seconds=6, stage_seconds=6)
    clinics.start_all()
    job = clinics.add()
    reached(clinics, job, 2)
    for name in ("north", "south"):
        clinics.sites[name].relay.kill()
    queued = clinics.wait(job, State.FAILED, State.FINISHED)
    assert queued.state is State.FAILED
    assert "the job resumes" in queued.detail
    for name in ("north", "south"):
        clinics.sites[name].relay.start()
    clinics.queue.resume(job)
    queued = clinics.wait(job, State.FINISHED, State.FAILED)
    assert queued.state is State.FINISHED, (queued.detail, clinics.logs())
    for site in clinics.sites.values():
        assert charged(site) == [(job, 1), (job, 2), (job, 3)]


@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_relay_whose_clock_is_wrong_by_ten_minutes_works_all_the_same(
    make_clinics: MakeClinics, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.now(UTC) + timedelta(minutes=minutes)

    clinics = make_clinics()
    clinics.start_all()
    site = clinics.sites["north"]
    site.relay.stop()
    monkeypatch.setattr(umbel_client.flower, "datetime", Wrong)
    stopping = threading.Event()
    stub = TrainerStub(site.socket)
    relay = threading.Thread(
        target=umbel_client.flower.serve,
        args=(
            umbel_client.flower.Connection(
                server=f"127.0.0.1:{clinics.port}",
                server_ca=site.folder / "relay" / "server-ca.pem",
                certificate=site.folder / "relay" / "certificate.pem",
                key=site.folder / "relay" / "key.pem",
            ),
            stub.handle,
            stopping,
            lambda _: None,
        ),
    )
    relay.start()
    try:
        job = clinics.add()
        queued = clinics.wait(job, State.FINISHED, State.FAILED)
        assert queued.state is State.FINISHED, (queued.detail, clinics.logs())
        assert charged(site) == [(job, 1), (job, 2), (job, 3)]
    finally:
        stopping.set()
        relay.join(60)
        stub.close()
