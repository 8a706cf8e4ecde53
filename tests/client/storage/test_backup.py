"""`umbel-client backup` and `restore`: all of it or nothing; an old copy says that it is one."""

import math
import os
import resource
import shutil
import signal
import sqlite3
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import AttemptKey, RoundState
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_client.site.policy import Budget
from umbel_client.storage.journal import Journal, read_published
from umbel_common.errors import BudgetError, LedgerError, RemoteProtocolError, StorageError
from umbel_common.plans.statements import RoundHeader
from umbel_common.trust.identity import Identity, fingerprint
from umbel_host.files.keys import write_identity
from umbel_host.processes.lifecycle import locked

ZEROS = bytes(32)
IDENTITY = Identity(bytes([7]) * 32)
EVENT = DpEvent(1.0, 0.05, 10)
UNLIMITED = Budget(math.inf, 1e-5)
CLIENT_TOML = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"
[data]
path = "notes.jsonl"
public_size = 10000
[model]
path = "model"
[policy]
total_epsilon = 50
"""


def header(number: int, attempt: int = 1) -> RoundHeader:
    return RoundHeader("clinics", "job", number, attempt, ZEROS, ZEROS, ZEROS, ("a", "b", "c"))


def charge(state: Path, *numbers: int) -> None:
    """What a trainer writes in these rounds; of the last, an attempt is under way."""
    session = Journal(state / "session.sqlite")
    with Ledger.open(state / "ledger.sqlite", ZEROS) as ledger:
        for number in numbers:
            ledger.reserve("job", ZEROS, number, EVENT, UNLIMITED)
            ledger.record_delta("job", number, bytes([number]) * 32)
            session.open_attempt(header(number), ledger.head(), b"a secret", b"request", b"reply")
            ledger.keep_pace(session.published().answers)
    session.close()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site of two rounds, whose administrator works beside its client.toml."""
    folder = tmp_path / "north"
    kinds = ("decisions/approved", "adapters/job", "deltas", "cache", "releases")
    for name in (f"state/{kind}" for kind in kinds):
        (folder / name).mkdir(parents=True)
    (folder / "client.toml").write_text(CLIENT_TOML)
    write_identity(folder / "identity.pem", IDENTITY)
    (folder / "roster.json").write_text("the roster")
    (folder / f"roster-{'ab' * 32}.json").write_text("a former roster")
    (folder / "state/decisions/approved/plan").write_text("approved")
    (folder / "state/adapters/job/adapter.bin").write_bytes(bytes(1000))
    (folder / "state/deltas/1.safetensors").write_text("a delta")
    (folder / "state/cache/hidden").write_text("private data")
    (folder / "state/releases/job.safetensors").write_text("what an operator sends again")
    charge(folder / "state", 1, 2)
    monkeypatch.chdir(folder)
    return folder


def words(line: str) -> list[str]:
    """A command; a restore is agreed to by the fingerprint of the site's key."""
    named = ["--fingerprint", fingerprint(IDENTITY.public_key)] if line[:7] == "restore" else []
    return [*line.split(), *named]


def run(line: str) -> str:
    result = CliRunner().invoke(app, words(line), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(line: str, kind: type[StorageError | LedgerError | BudgetError] = StorageError) -> str:
    with pytest.raises(kind) as caught:
        CliRunner().invoke(app, words(line), catch_exceptions=False)
    return caught.value.diagnostics()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


STATE = "budget state-spend --by eve --why disk --rounds job="


def test_a_backup_holds_what_is_needed_and_no_key_delta_cache_or_adapter_of_a_job_under_way(
    site: Path,
) -> None:
    assert "2 rounds charged" in run("backup --out b.tar")
    assert (site / "b.tar").stat().st_mode & 0o777 == 0o600
    with tarfile.open(site / "b.tar") as archive:
        names = set(archive.getnames())
    assert names == {
        "manifest.json",
        "client.toml",
        "roster.json",
        f"rosters/roster-{'ab' * 32}.json",
        "state/ledger.sqlite",
        "state/session.sqlite",
        "state/decisions/approved/plan",
        "state/adapters/job/adapter.bin",
    }
    assert b"a secret" not in (site / "b.tar").read_bytes()
    run("backup --out keys.tar --with-keys")
    with tarfile.open(site / "keys.tar") as archive:
        assert set(archive.getnames()) == names | {"keys/identity.pem"}
    assert sorted(path.name for path in site.iterdir() if path.name.startswith(".")) == []


def test_what_was_backed_up_comes_back_to_an_empty_machine(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("backup --out ../b.tar --with-keys")
    before = files(site)
    shutil.rmtree(site)
    site.mkdir()
    monkeypatch.chdir(site)
    printed = run("restore ../b.tar")
    assert f"put back  {site}/client.toml\n" in printed
    assert "your key is not on this machine" in printed
    after = files(site)
    databases = {"state/ledger.sqlite", "state/session.sqlite"}
    gone = {"state/deltas/1.safetensors", "state/cache/hidden", "state/releases/job.safetensors"}
    assert {name: after[name] for name in before.keys() - databases - gone} == {
        name: before[name] for name in before.keys() - databases - gone
    }
    assert not gone & after.keys()
    for path in (site / "state").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (site / "identity.pem").stat().st_mode & 0o777 == 0o600
    assert [path for path in site.iterdir() if path.name.startswith(".")] == []


def test_keys_that_are_nowhere_are_named_and_files_that_are_there_are_kept(site: Path) -> None:
    run("backup --out b.tar")
    shutil.rmtree(site / "state")
    (site / "identity.pem").unlink()
    (site / "roster.json").write_text("a later roster")
    printed = run("restore b.tar")
    assert "identity.pem: bring your own copy" in printed
    assert "roster.json, which is there" in printed
    assert (site / "roster.json").read_text() == "a later roster"


@pytest.fixture
def restored(site: Path) -> Path:
    """The state of before round 3, put back after rounds 3 and 4; the path of the ledger."""
    run("backup --out b.tar")
    charge(site / "state", 3, 4)
    (site / "state").rename(site / "lost")
    run("restore b.tar")
    return site / "state" / "ledger.sqlite"


def test_a_restored_ledger_charges_nothing_until_the_spend_is_stated(restored: Path) -> None:
    with Ledger.open(restored, ZEROS) as ledger:
        for number in (2, 3):
            with pytest.raises(LedgerError, match="what was spent since is not known"):
                ledger.reserve("job", ZEROS, number, EVENT, UNLIMITED)
    assert "state what was spent since" in run("budget show")
    run(f"{STATE}4")
    with Ledger.open(restored, ZEROS) as ledger:
        assert ledger.spent(1e-5) == epsilon([EVENT] * 4, 1e-5)
        assert {one.state for one in ledger.history()} == {RoundState.LOST}
        ledger.reserve("job", ZEROS, 5, EVENT, UNLIMITED)
        ledger.record_delta("job", 5, b"\x05" * 32)
        assert ledger.spent(1e-5) == epsilon([EVENT] * 5, 1e-5)
    printed = " ".join(run("budget show").split())
    assert "stated job came to round 4 (eve," in printed
    assert "disk)" in printed
    run("budget verify")


def test_no_round_of_before_gets_another_delta_or_charge(restored: Path) -> None:
    run(f"{STATE}4")
    with Ledger.open(restored, ZEROS) as ledger:
        for number in (1, 2, 3, 4):
            assert ledger.reserve("job", ZEROS, number, EVENT, UNLIMITED).state is RoundState.LOST
            with pytest.raises(LedgerError, match="another delta"):
                ledger.record_delta("job", number, b"\x09" * 32)
        assert ledger.spent(1e-5) == epsilon([EVENT] * 4, 1e-5)


def test_a_restored_journal_answers_no_attempt_of_before(restored: Path) -> None:
    session = Journal(restored.with_name("session.sqlite"))
    for number in (1, 2):
        with pytest.raises(RemoteProtocolError, match="over at this site"):
            session.state(header(number).context())
        with pytest.raises(RemoteProtocolError, match="used or overtaken"):
            session.check_new(header(number))
    session.close()


def test_a_statement_is_a_row_of_the_chain(restored: Path) -> None:
    before = read_ledger(restored).head()
    run(f"{STATE}3")
    assert before in read_ledger(restored).heads
    with closing(sqlite3.connect(restored)) as database:
        (entry,) = database.execute("SELECT entry FROM rows ORDER BY position DESC").fetchone()
        assert b"eve" in entry
        forged = entry.replace(b"eve", b"bob")
        database.execute("UPDATE rows SET entry = ? WHERE entry = ?", (forged, entry))
        database.commit()
    assert "damaged" in refusal("budget verify", LedgerError)


def test_what_nobody_knows_is_everything(restored: Path) -> None:
    run("budget state-spend --by eve --why gone --everything")
    with Ledger.open(restored, ZEROS) as ledger:
        assert ledger.spent(1e-5) == math.inf
        with pytest.raises(BudgetError):
            ledger.reserve("job", ZEROS, 9, EVENT, Budget(1e6, 1e-5))


def test_nothing_has_to_be_stated_too(restored: Path) -> None:
    run("budget state-spend --by eve --why test --nothing")
    with Ledger.open(restored, ZEROS) as ledger:
        assert ledger.spent(1e-5) == epsilon([EVENT] * 2, 1e-5)
        ledger.reserve("job", ZEROS, 3, EVENT, UNLIMITED)


def test_a_job_of_which_nothing_is_known_needs_its_plan(restored: Path) -> None:
    line = "budget state-spend --by eve --why disk --rounds other=2"
    assert "--plan FILE" in refusal(line, BudgetError)
    assert read_ledger(restored).old_copy


@pytest.mark.parametrize(
    "options", ["", "--nothing --everything", "--rounds job", "--rounds job=0", "--rounds J=1"]
)
def test_half_a_statement_is_a_wrong_command_line(restored: Path, options: str) -> None:
    line = f"budget state-spend --by eve --why disk {options}"
    assert CliRunner().invoke(app, line.split()).exit_code == 2
    assert read_ledger(restored).old_copy


def test_a_restored_ledger_that_is_backed_up_and_restored_is_still_an_old_copy(
    restored: Path, site: Path
) -> None:
    run("backup --out again.tar")
    shutil.rmtree(restored.parent)
    run("restore again.tar")
    assert read_ledger(restored).old_copy


def test_nothing_is_restored_over_a_state(site: Path) -> None:
    run("backup --out b.tar")
    before = files(site)
    assert "empty state folder only" in refusal("restore b.tar")
    assert files(site) == before


def test_nothing_is_restored_while_a_trainer_runs(site: Path) -> None:
    run("backup --out b.tar")
    shutil.rmtree(site / "state")
    with locked(site / "state" / "trainer.lock", "a trainer"):
        assert "this site's trainer is already running" in refusal("restore b.tar")
    run("restore b.tar")


def test_a_lock_that_nobody_holds_is_no_state(site: Path) -> None:
    run("backup --out b.tar")
    shutil.rmtree(site / "state")
    with locked(site / "state" / "trainer.lock", "a trainer"):
        pass
    run("restore b.tar")
    assert read_ledger(site / "state" / "ledger.sqlite").old_copy


@contextmanager
def unchanged(site: Path) -> Iterator[None]:
    """Without a state folder, before and after."""
    shutil.rmtree(site / "state", ignore_errors=True)
    before = sorted(site.rglob("*"))
    yield
    assert sorted(site.rglob("*")) == before


def test_another_sites_backup_is_refused(site: Path) -> None:
    run("backup --out b.tar")
    text = (site / "client.toml").read_text()
    (site / "client.toml").write_text(text.replace("north", "south"))
    with unchanged(site):
        printed = refusal("restore b.tar")
    assert "found: north\n  accepted: south" in printed


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_backup_that_is_cut_short_is_refused(site: Path, share: float) -> None:
    run("backup --out b.tar")
    with tarfile.open(site / "b.tar") as archive:
        end = max(member.offset_data + member.size for member in archive)
    os.truncate(site / "b.tar", int(end * share))
    with unchanged(site):
        assert "nothing was changed" in refusal("restore b.tar")


def rewritten(backup: Path, change: dict[str, bytes | None]) -> None:
    """A backup with other content in some members; None: without it."""
    with tarfile.open(backup) as archive:
        members = {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]  # files
            for member in archive
        }
    with tarfile.open(backup, "w") as archive:
        for name, data in {**members, **change}.items():
            if data is not None:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, BytesIO(data))


def manifest_of(backup: Path) -> dict[str, object]:
    with tarfile.open(backup) as archive:
        text = archive.extractfile("manifest.json").read()  # type: ignore[union-attr]  # a file
    manifest: dict[str, object] = msgspec.json.decode(text)["manifest"]
    return manifest


def manifest_with(backup: Path, **values: object) -> bytes:
    """The manifest with other values, as nobody signed it (format 1)."""
    return msgspec.json.encode({**manifest_of(backup), **values})


def test_every_part_is_compared_with_the_manifest(site: Path) -> None:
    run("backup --out good.tar")
    backup = site / "b.tar"
    changes: list[dict[str, bytes | None]] = [
        {"state/ledger.sqlite": None},
        {"state/adapters/job/adapter.bin": b"\x01" * 1000},
        {"state/adapters/job/adapter.bin": b"short"},
        {"more": b"a stranger"},
        {"../outside": b"a stranger"},
        {"manifest.json": b"{}"},
        {"manifest.json": b"\xff"},
    ]
    for change in changes:
        shutil.copy(site / "good.tar", backup)
        rewritten(backup, change)
        with unchanged(site):
            assert "damaged" in refusal("restore b.tar"), change
    assert not (site.parent / "outside").exists()


def test_a_part_that_leads_out_of_the_folder_is_refused(site: Path) -> None:
    run("backup --out b.tar")
    part = {"name": "state/../../evil", "size": 0, "sha256": "00" * 32}
    rewritten(site / "b.tar", {"manifest.json": manifest_with(site / "b.tar", parts=[part])})
    with unchanged(site):
        assert "outside of the backup" in refusal("restore b.tar")


@pytest.mark.parametrize(
    "later", [{"version": 3}, {"schemas": {"state/ledger.sqlite": 9}}, {"schemas": {"new.db": 1}}]
)
def test_a_backup_of_a_later_version_is_refused(site: Path, later: dict[str, object]) -> None:
    run("backup --out b.tar")
    rewritten(site / "b.tar", {"manifest.json": manifest_with(site / "b.tar", **later)})
    with unchanged(site):
        assert "later version of Umbel" in refusal("restore b.tar")


def test_an_operators_backup_is_no_sites(site: Path) -> None:
    run("backup --out b.tar")
    manifest = manifest_with(site / "b.tar", program="umbel-server")
    rewritten(site / "b.tar", {"manifest.json": manifest})
    with unchanged(site):
        assert "not made by umbel-client" in refusal("restore b.tar")


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("most_bytes", [100, 5000, 60_000])
def test_a_full_disk_leaves_nothing_of_a_backup(site: Path, most_bytes: int) -> None:
    before = sorted(site.rglob("*"))
    with full_disk(most_bytes):
        refusal("backup --out b.tar")
    assert [path for path in sorted(site.rglob("*")) if path not in before] == []


@pytest.mark.parametrize("most_bytes", [100, 5000, 15_000])
def test_a_full_disk_leaves_nothing_of_a_restore(site: Path, most_bytes: int) -> None:
    run("backup --out b.tar")
    with unchanged(site), full_disk(most_bytes):
        refusal("restore b.tar")
    run("restore b.tar")


def test_a_backup_is_never_written_over_a_file(site: Path) -> None:
    (site / "b.tar").write_text("precious")
    assert "never overwritten" in refusal("backup --out b.tar")
    assert (site / "b.tar").read_text() == "precious"


def test_a_state_that_contradicts_itself_is_not_backed_up(site: Path) -> None:
    (site / "old").mkdir()
    shutil.copy(site / "state" / "session.sqlite", site / "old")
    charge(site / "state", 3)
    shutil.copy(site / "old" / "session.sqlite", site / "state")
    assert "journal is older" in refusal("backup --out b.tar", LedgerError)
    assert not (site / "b.tar").exists()


def test_a_site_without_a_ledger_has_nothing_to_back_up(site: Path) -> None:
    shutil.rmtree(site / "state")
    assert "no privacy ledger" in refusal("backup --out b.tar", LedgerError)


def test_backups_of_a_site_that_trains_are_each_of_one_moment(site: Path) -> None:
    done = threading.Event()

    def train() -> None:
        session = Journal(site / "state" / "session.sqlite")
        with Ledger.open(site / "state" / "ledger.sqlite", ZEROS) as ledger:
            number = 3
            while not done.is_set():
                ledger.reserve("job", ZEROS, number, EVENT, UNLIMITED)
                session.open_attempt(header(number), ledger.head(), b"s", b"request", b"reply")
                ledger.keep_pace(session.published().answers)
                number += 1
                done.wait(0.05)
        session.close()

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for number in range(4):
            run(f"backup --out {number}.tar")
    finally:
        done.set()
        trainer.join()
    for number in range(4):
        shutil.rmtree(site / "state")
        run(f"restore {number}.tar")
        contents = read_ledger(site / "state" / "ledger.sqlite")
        published = read_published(site / "state" / "session.sqlite")
        assert published.ledger_head in contents.heads
        assert published.answers >= contents.answers


def test_a_backup_keeps_both_totals_and_a_restored_attempt_never_leaves(site: Path) -> None:
    cost = AttemptCost(EVENT, DpEvent(2.0, 0.05, 10), honest=4, counts=None, most_attempts=9)
    key = AttemptKey("shared", 1, 1)
    path = site / "state" / "ledger.sqlite"
    with Ledger.open(path, ZEROS) as ledger:
        ledger.reserve_attempt(key, ZEROS, cost, Budget(math.inf, 1e-5, math.inf))
        ledger.record_vector(key, b"\x07" * 32)
        totals = ledger.spent(1e-5), ledger.shared_spent(1e-5)
    assert "2 rounds and 1 attempts charged" in run("backup --out b.tar")
    (site / "state").rename(site / "lost")
    run("restore b.tar")
    with pytest.raises(BudgetError, match="have to be counted"):
        run("budget state-spend --by eve --why disk --rounds shared=1")
    run("budget state-spend --by eve --why disk --rounds shared=1 --attempts shared=1")
    with Ledger.open(path, ZEROS) as ledger:
        assert (ledger.spent(1e-5), ledger.shared_spent(1e-5)) == totals
        assert totals[1] < totals[0]
        with pytest.raises(LedgerError, match="no vector to send"):
            ledger.record_vector_sent(key)
