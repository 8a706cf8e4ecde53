"""Real processes that die, sites that vanish: the job finishes, and nothing is spent twice."""

import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from e2e.daemons import Clinics, Daemon, Site
from support.relays import whole
from support.waiting import HANGING

import umbel_client.relay.flower
import umbel_client.relay.server_clock
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.rows import Reservation
from umbel_client.ledger.spending import release_costs
from umbel_client.site.ipc import TrainerStub
from umbel_host.transport.sockets import is_healthy
from umbel_server.storage.job_queue import JobState


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Clinics]:
    """A federation that runs through all the tests of this file, and every fault in them."""
    made = Clinics(tmp_path_factory.mktemp("clinics"), tiny_model)
    made.start_all()
    for site in made.sites.values():
        site.status()
    yield made
    made.close()


@pytest.fixture
def impatient(clinics: Clinics) -> Iterator[None]:
    """The operator waits seconds for a site, because one stays away."""
    limits = (
        {"train_seconds": 20, "stage_seconds": 10},
        {"train_seconds": 300, "stage_seconds": 300},
    )
    for number, seconds in enumerate(limits):
        if number:
            yield
        clinics.rounds_process.stop()
        clinics.limit(**seconds)
        clinics.rounds_process.start()


@pytest.fixture
def job(clinics: Clinics) -> str:
    """A job of this test's own."""
    return clinics.add(job=f"job-{len(clinics.queue.jobs()) + 1}")


def finished(clinics: Clinics, job: str) -> None:
    """Waits until the job is over, and sees that every site has the same adapter."""
    queued = clinics.wait(job, JobState.FINISHED, JobState.FAILED, JobState.STOPPED)
    assert queued.state is JobState.FINISHED, (queued.detail, clinics.logs())


def reached(clinics: Clinics, job: str, round_number: int) -> None:
    """Waits until a round is under way."""
    deadline = time.monotonic() + HANGING
    while time.monotonic() < deadline:
        queued = clinics.queue.job(job)
        if queued.round >= round_number or queued.state in (JobState.FINISHED, JobState.FAILED):
            assert queued.state is JobState.RUNNING, (queued.detail, clinics.logs())
            return
        time.sleep(0.01)
    raise AssertionError(clinics.logs())


def adapters(clinics: Clinics, job: str, *sites: str) -> set[bytes]:
    folders = (clinics.sites[name].folder for name in sites or clinics.sites)
    files = (
        folder / "state" / "adapters" / job / "adapter_model.safetensors" for folder in folders
    )
    return {path.read_bytes() for path in files}


def charged(site: Site, job: str) -> list[int]:
    """The job's rounds in a site's ledger."""
    return [entry.round for entry in history(site) if entry.job == job]


def history(site: Site) -> Sequence[Reservation]:
    """Every reservation in a site's ledger, in its order."""
    return list(read_ledger(site.folder / "state" / "ledger.sqlite").rounds.values())


PROCESSES: dict[str, Callable[[Clinics], Daemon]] = {
    "port": lambda clinics: clinics.port_process,
    "rounds": lambda clinics: clinics.rounds_process,
    "relay": lambda clinics: clinics.sites["north"].relay,
    "trainer": lambda clinics: clinics.sites["north"].trainer,
}


@pytest.mark.parametrize(
    "victim",
    [
        "port",
        # In `make test`, a trainer is killed at every step in adversarial/test_killed_site.py; the
        # rounds' journal and a relay's message outlive their process in
        # server/jobs/test_job_faults.py and e2e/test_flower_transport.py.
        pytest.param("trainer", marks=pytest.mark.full),
        pytest.param("rounds", marks=pytest.mark.soak),
        pytest.param("relay", marks=pytest.mark.soak),
    ],
)
def test_a_process_that_is_killed_and_started_again_does_not_end_the_job(
    clinics: Clinics, victim: str
) -> None:
    """Killed in each of two rounds."""
    training = msgspec.structs.replace(clinics.plan().training, rounds=2)
    job = clinics.add(job=f"job-{len(clinics.queue.jobs()) + 1}", training=training)
    process = PROCESSES[victim](clinics)
    for number in (1, 2):
        reached(clinics, job, number)
        process.kill()
        time.sleep(0.5)
        process.start()
    finished(clinics, job)
    assert len(adapters(clinics, job)) == 1, clinics.logs()
    for site in clinics.sites.values():
        assert charged(site, job) == [1, 2]


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [20, 90])
def test_a_job_waits_for_a_superlink_that_is_away(
    tmp_path: Path, tiny_model: Path, seconds: int
) -> None:
    """Where the operator's patience is longer than that."""
    clinics = Clinics(tmp_path, tiny_model)
    clinics.limit(train_seconds=300, stage_seconds=300)
    try:
        clinics.start_all()
        for site in clinics.sites.values():
            site.status()
        job = clinics.add()
        reached(clinics, job, 2)
        clinics.port_process.kill()
        time.sleep(seconds)
        assert clinics.queue.job(job).state is JobState.RUNNING
        began = time.monotonic()
        clinics.port_process.start()
        finished(clinics, job)
        print(f"\nfinished {time.monotonic() - began:.0f} s after {seconds} s without a SuperLink")
        assert len(adapters(clinics, job)) == 1
        for site in clinics.sites.values():
            assert charged(site, job) == [1, 2, 3]
    finally:
        clinics.close()


@pytest.mark.soak
@pytest.mark.usefixtures("impatient")
def test_without_a_site_that_vanished_the_others_go_on(clinics: Clinics, job: str) -> None:
    reached(clinics, job, 2)
    gone = clinics.sites["north"]
    gone.relay.kill()
    gone.trainer.kill()
    finished(clinics, job)
    assert len(adapters(clinics, job, "east", "south")) == 1
    # What it spent it spent; nobody asked it for more.
    assert charged(gone, job) in ([1], [1, 2])
    gone.trainer.start()
    gone.relay.start()
    gone.status()


@contextmanager
def full_disk(daemon: Daemon) -> Iterator[None]:
    """No file of the process can grow, as on a disk that is full."""
    before = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, before)


def test_a_site_whose_disk_is_full_sits_out_and_comes_back(clinics: Clinics, job: str) -> None:
    reached(clinics, job, 1)
    site = clinics.sites["north"]
    with full_disk(site.trainer):
        reached(clinics, job, 3)
    finished(clinics, job)
    assert site.trainer.running
    assert len(adapters(clinics, job, "east", "south")) == 1
    rounds = charged(site, job)
    assert sorted(set(rounds)) == rounds
    assert charged(clinics.sites["east"], job) == [1, 2, 3]


@pytest.mark.soak
def test_a_server_whose_disk_is_full_goes_on_when_there_is_room(clinics: Clinics, job: str) -> None:
    reached(clinics, job, 1)
    with full_disk(clinics.rounds_process):
        time.sleep(12)
        assert clinics.rounds_process.running
        assert clinics.queue.job(job).state is JobState.RUNNING
        assert not is_healthy(clinics.operator_folder / "state" / "rounds.sock", HANGING)
    finished(clinics, job)
    assert is_healthy(clinics.operator_folder / "state" / "rounds.sock", HANGING)
    assert len(adapters(clinics, job)) == 1
    for site in clinics.sites.values():
        assert charged(site, job) == [1, 2, 3]


# In `make test`, client/relay/test_hostile_answers.py holds what a relay makes of a server's date.
@pytest.mark.soak
@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_relay_whose_clock_is_wrong_by_ten_minutes_works_all_the_same(
    clinics: Clinics, job: str, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.now(UTC) + timedelta(minutes=minutes)

    site = clinics.sites["north"]
    site.relay.stop()
    for module in (umbel_client.relay.flower, umbel_client.relay.server_clock):
        monkeypatch.setattr(module, "datetime", Wrong)
    stopping = threading.Event()
    stub = TrainerStub(site.socket)
    connection = umbel_client.relay.flower.Connection(
        server=f"127.0.0.1:{clinics.port}",
        server_ca=site.folder / "relay" / "server-ca.pem",
        certificate=site.folder / "relay" / "certificate.pem",
        key=site.folder / "relay" / "key.pem",
    )
    relay = threading.Thread(
        target=umbel_client.relay.flower.serve,
        args=(connection, whole(stub.handle), stopping, lambda _: None),
    )
    relay.start()
    try:
        finished(clinics, job)
        assert charged(site, job) == [1, 2, 3]
    finally:
        stopping.set()
        relay.join(HANGING)
        stub.close()
        site.relay.start()


@pytest.mark.soak
@pytest.mark.usefixtures("impatient")
def test_a_job_that_failed_goes_on_when_the_operator_resumes_it(clinics: Clinics, job: str) -> None:
    reached(clinics, job, 2)
    away = [clinics.sites[name].relay for name in ("north", "south")]
    for relay in away:
        relay.kill()
    queued = clinics.wait(job, JobState.FAILED, JobState.FINISHED)
    assert queued.state is JobState.FAILED
    assert "the job resumes" in queued.detail
    for relay in away:
        relay.start()
    clinics.queue.resume(job)
    finished(clinics, job)
    for site in clinics.sites.values():
        assert charged(site, job) == [1, 2, 3]


def test_all_these_jobs_are_charged_to_one_ledger_each_release_once(clinics: Clinics) -> None:
    """After everything above."""
    for site in clinics.sites.values():
        entries = history(site)
        releases = [(entry.job, entry.round) for entry in entries]
        assert len(set(releases)) == len(releases)
        jobs = list(dict.fromkeys(entry.job for entry in entries))
        assert len(jobs) >= 2
        # One job after the other: what came later was charged on top of what came before.
        assert [job for job, _ in releases] == sorted((job for job, _ in releases), key=jobs.index)
        contents = read_ledger(site.folder / "state" / "ledger.sqlite")
        spent = [cost.epsilon for cost in release_costs(contents, 1e-4)[:9]]
        assert spent == sorted(spent)
        assert spent[0] < spent[-1]
