"""`umbel-server backup` and `restore`: a journal, its adapters, and jobs that wait for people."""

import shutil
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from umbel_common.adapters.vector import initial_vector
from umbel_common.errors import StorageError, UmbelError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import Release
from umbel_common.protocol.transcript import JobStarted
from umbel_common.secagg.encoding import sum_digest
from umbel_common.trust.identity import Signed, fingerprint, sign
from umbel_host.files.keys import read_identity
from umbel_host.files.restore import require_inside
from umbel_host.processes.lifecycle import locked
from umbel_server.cli.command import app
from umbel_server.storage.job_queue import JobQueue, JobState
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

SUM = np.arange(7, dtype="<u4")
SIGNER: list[str] = []
"""The fingerprint of the operator's key."""


def words(line: str) -> list[str]:
    """A command; a restore is agreed to by that fingerprint."""
    return [*line.split(), *(["--fingerprint", *SIGNER] if line[:7] == "restore" else [])]


def run(line: str) -> str:
    result = CliRunner().invoke(app, words(line), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(line: str) -> str:
    with pytest.raises(StorageError) as caught:
        CliRunner().invoke(app, words(line), catch_exceptions=False)
    return caught.value.diagnostics()


def texts(folder: Path) -> dict[Path, bytes]:
    """Keys, certificates, configuration and roster."""
    found = [path for path in folder.rglob("*") if path.suffix in (".pem", ".toml", ".json")]
    return {path: path.read_bytes() for path in found if "registry" not in path.parts}


@pytest.fixture
def operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_plan: Callable[..., TrainingPlan]
) -> Path:
    """An operator's folder, with a job under way and one that waits."""
    monkeypatch.chdir(tmp_path)
    run("init --federation clinics --address 127.0.0.1:9443")
    folder = tmp_path / "operator"
    monkeypatch.chdir(folder)
    identity, plan = read_identity(folder / "identity.pem"), make_plan()
    SIGNER[:] = [fingerprint(identity.public_key)]
    registry = Registry(folder / "state" / "registry")
    adapter = registry.publish(plan, initial_vector(plan))
    half = registry.sum_file(registry.keep_sum(SUM)).with_suffix(".partial-1")
    half.write_bytes(b"half")
    release = sign(
        identity,
        Release(
            federation="clinics",
            job="job",
            plan=plan.digest(),
            round=0,
            attempt=0,
            context=bytes(32),
            adapter=adapter,
            survivors=(),
            total_weight=0,
        ),
    )
    signed = sign(identity, plan)
    event = JobStarted(plan=signed, roster=bytes(32), release=release)
    with closing(Journal(folder / "state" / "journal.sqlite")) as journal:
        journal.start_job(identity, "job", signed, adapter, release, event)
        journal.keep_advert("a", release, Signed(statement=b"advert", signature=bytes(64)))
    with closing(JobQueue(folder / "state" / "queue.sqlite")) as queue:
        for name, state in (("done", JobState.FINISHED), ("job", JobState.RUNNING)):
            queue.add(name, signed)
            queue.set_state(name, state)
        queue.add("next", signed)
    return folder


def test_an_operator_comes_back_on_an_empty_machine_with_its_jobs_stopped(
    operator: Path, make_plan: Callable[..., TrainingPlan]
) -> None:
    # The server may be serving meanwhile: its lock stands in nobody's way.
    with locked(operator / "state" / "rounds.lock", "the process with the jobs"):
        run("backup --out ../b.tar --with-keys")
    before = texts(operator)
    for path in list(operator.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "\nstopped: job, next\n" in run("restore ../b.tar")
    assert texts(operator) == before
    plan = make_plan()
    with closing(Journal(operator / "state" / "journal.sqlite")) as journal:
        number, adapter, _ = journal.last_release("job")
        assert number == 0
        registry = Registry(operator / "state" / "registry")
        assert registry.load(plan, adapter).size == plan.lora.size
        kept = registry.sum_file(sum_digest(SUM))
        assert np.array_equal(registry.load_sum(plan, sum_digest(SUM)), SUM)
        # What a killed server left half-written stays behind.
        assert list(kept.parent.iterdir()) == [kept]
        assert journal.last_adverts()["a"].advert.statement == b"advert"
    with closing(JobQueue(operator / "state" / "queue.sqlite")) as queue:
        assert [job.state for job in queue.jobs()] == [
            JobState.FINISHED,
            JobState.STOPPED,
            JobState.STOPPED,
        ]
        assert "restored from the backup of" in queue.job("job").detail
    assert (operator / "identity.pem").stat().st_mode & 0o777 == 0o600
    assert run("job resume job") == "job: waiting\n"


def test_without_keys_a_backup_holds_none_and_names_those_that_are_missing(operator: Path) -> None:
    run("backup --out b.tar")
    secrets = [(operator / name).read_bytes() for name in ("identity.pem", "ca/key.pem")]
    assert not any(secret in (operator / "b.tar").read_bytes() for secret in secrets)
    shutil.rmtree(operator / "state")
    (operator / "identity.pem").unlink()
    assert f"missing   {operator}/identity.pem: bring your own copy\n" in run("restore b.tar")


def test_another_operators_backup_is_refused(operator: Path) -> None:
    run("backup --out b.tar")
    run("init --federation clinics --address 127.0.0.1:9443 --folder other")
    assert "to another party" in refusal("restore b.tar --config other/server.toml")
    assert not (operator / "other" / "state").exists()


def test_nothing_is_restored_over_a_state_or_under_a_server(operator: Path) -> None:
    run("backup --out b.tar")
    assert "empty state folder only" in refusal("restore b.tar")
    shutil.rmtree(operator / "state")
    with locked(operator / "state" / "rounds.lock", "it"):
        assert "is already running" in refusal("restore b.tar")
    run("restore b.tar")


def test_an_operator_without_a_job_has_a_backup_too(operator: Path) -> None:
    shutil.rmtree(operator / "state")
    run("backup --out b.tar")
    run("restore b.tar")
    with closing(Journal(operator / "state" / "journal.sqlite")) as journal:
        assert journal.jobs() == []


def test_a_backup_names_no_place_outside_its_folder(
    operator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replace_everywhere: Callable[[object, object], None],
) -> None:
    """Even one that the operator's key signed; without the fix it writes there."""
    text = (operator / "server.toml").read_text()
    (operator / "roster.json").rename(tmp_path / "roster.json")
    assert 'roster = "roster.json"' in text
    text = text.replace('roster = "roster.json"', f'roster = "{tmp_path}/roster.json"')
    (operator / "server.toml").write_text(text)
    run("backup --out ../b.tar")
    (tmp_path / "roster.json").unlink()
    new = tmp_path / "new"
    new.mkdir()
    monkeypatch.chdir(new)
    assert "outside the folder that it is restored into" in refusal("restore ../b.tar")
    assert list(new.iterdir()) == []
    assert not (tmp_path / "roster.json").exists()
    replace_everywhere(require_inside, lambda folder, places: None)
    run("restore ../b.tar")
    assert (tmp_path / "roster.json").exists()


def test_nothing_is_restored_that_nobody_agreed_to(operator: Path) -> None:
    run("backup --out b.tar")
    shutil.rmtree(operator / "state")
    with pytest.raises(UmbelError, match="by a person at a terminal"):
        CliRunner().invoke(app, ["restore", "b.tar"], catch_exceptions=False)
    SIGNER[:] = [fingerprint(bytes(32))]
    assert "not signed by the key that was named" in refusal("restore b.tar")
    assert not (operator / "state").exists()


def test_a_backup_follows_no_link(operator: Path) -> None:
    """Root backs up: where a link of the port's user leads, only root may be able to read."""
    folder, _ = sorted((operator / "state" / "registry").iterdir())
    (folder / "shadow").symlink_to(operator / "identity.pem")
    run("backup --out b.tar")
    with tarfile.open(operator / "b.tar") as archive:
        assert not [name for name in archive.getnames() if name.endswith("/shadow")]
        assert [name for name in archive.getnames() if name.endswith("/plan.json")]
