"""Today's code opens files of each former schema version, with every row that they had."""

import math
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from umbel_client.ledger.file import SCHEMA as LEDGER
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import AttemptKey, RoundState
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_client.site.policy import Budget
from umbel_client.storage.journal import Journal as SiteJournal
from umbel_client.storage.journal import journal_schema, read_published
from umbel_common.canonical import decode_canonical
from umbel_common.errors import LedgerError, StorageError
from umbel_common.plans.statements import HEADER_VERSIONS, RoundHeader
from umbel_common.trust.identity import Signed
from umbel_host.files.database import Schema
from umbel_server.storage.job_queue import QUEUE_SCHEMA, JobQueue, JobState
from umbel_server.storage.journal import JOURNAL_SCHEMA
from umbel_server.storage.journal import Journal as ServerJournal

HERE = Path(__file__).parent
ZEROS = bytes(32)
EVENT = DpEvent(1.0, 0.05, 10)

KINDS: dict[str, tuple[Schema, Callable[[Path], object]]] = {
    "ledger": (LEDGER, lambda path: Ledger.open(path, ZEROS)),
    "session": (journal_schema(), SiteJournal),
    "journal": (JOURNAL_SCHEMA, ServerJournal),
    "queue": (QUEUE_SCHEMA, JobQueue),
}
STORED = sorted(path.name for path in HERE.glob("*.sqlite"))


def stored(name: str, folder: Path) -> Path:
    return Path(shutil.copy(HERE / name, folder))


def rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Everything in a file, by table."""
    with closing(sqlite3.connect(path)) as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {name: database.execute(f"SELECT * FROM {name}").fetchall() for (name,) in tables}


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def test_a_file_of_every_former_version_is_stored() -> None:
    for kind, (schema, _) in KINDS.items():
        former = {int(Path(name).stem.split("-")[1]) for name in STORED if name.startswith(kind)}
        assert former >= set(range(1, schema.version))


@pytest.mark.parametrize("name", STORED)
def test_every_row_is_kept_and_the_version_is_todays(name: str, tmp_path: Path) -> None:
    kind, number = Path(name).stem.split("-")
    path, (schema, opened) = stored(name, tmp_path), KINDS[kind]
    assert version(path) == int(number)
    before = rows(path)
    if kind == "journal" and number == "1":
        # `finished` became the round whose release ended the job, NULL while the job has not ended.
        before["jobs"] = [(*row[:-1], None) for row in before["jobs"] if row[-1] == 0]
    for _ in range(2):
        opened(path).close()  # type: ignore[attr-defined]  # all of them have it
        after = rows(path)
        assert {table: after[table] for table in before} == before
        assert version(path) == schema.version


@pytest.mark.parametrize("name", STORED)
def test_a_migrated_file_has_the_tables_of_a_new_one(name: str, tmp_path: Path) -> None:
    def tables(path: Path) -> dict[str, list[tuple[object, ...]]]:
        with closing(sqlite3.connect(path)) as database:
            return {
                table: database.execute(f"PRAGMA table_info({table})").fetchall()
                for table in rows(path)
            }

    path, (_, opened) = stored(name, tmp_path), KINDS[Path(name).stem.split("-")[0]]
    for file in (path, tmp_path / "new.sqlite"):
        opened(file).close()  # type: ignore[attr-defined]  # all of them have it
    assert tables(path) == tables(tmp_path / "new.sqlite")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_later_version_is_refused_and_left_as_it_is(kind: str, tmp_path: Path) -> None:
    schema, opened = KINDS[kind]
    path = tmp_path / "file.sqlite"
    opened(path).close()  # type: ignore[attr-defined]  # all of them have it
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {schema.version + 1}")
    before = path.read_bytes()
    with pytest.raises((StorageError, LedgerError)) as refusal:
        opened(path)
    assert refusal.value.message == f"a {schema.kind} was written by a later version of Umbel"
    assert (refusal.value.found, refusal.value.accepted) == (
        schema.version + 1,
        f"at most {schema.version}",
    )
    assert path.read_bytes() == before


def test_a_migration_that_fails_leaves_the_former_version(tmp_path: Path) -> None:
    path = stored("session-1.sqlite", tmp_path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE trained (x)")
    before = rows(path)
    with pytest.raises(StorageError, match="trained already exists"):
        SiteJournal(path)
    assert (version(path), rows(path)) == (1, before)


@pytest.mark.parametrize("name", ["ledger-1.sqlite", "ledger-2.sqlite"])
def test_a_former_ledger_is_charged_as_before_and_goes_on(name: str, tmp_path: Path) -> None:
    path = stored(name, tmp_path)
    read = read_ledger(path)
    assert version(path) == int(name[7])
    with Ledger.open(path, ZEROS) as ledger:
        assert tuple(read.rounds.values()) == ledger.history()
        assert [(one.round, one.state) for one in ledger.history()] == [
            (1, RoundState.SENT),
            (2, RoundState.COMPUTED),
        ]
        assert ledger.spent(1e-5) == epsilon([EVENT, EVENT], 1e-5)
        head = ledger.head()
        ledger.reserve("job", ZEROS, 3, EVENT, Budget(math.inf, 1e-5))
        ledger.keep_pace(9)
    with Ledger.open(path, ZEROS) as ledger:
        ledger.verify(head)
        assert len(ledger.history()) == 3


def test_a_ledger_of_version_3_keeps_its_statement_and_takes_attempts(tmp_path: Path) -> None:
    path = stored("ledger-3.sqlite", tmp_path)
    counts, cost = DpEvent(2.0, 1.0, 1), AttemptCost(EVENT, EVENT, 2, None, 5)
    read = read_ledger(path)
    assert (read.schema, read.answers, read.honest) == (3, 4, None)
    with Ledger.open(path, ZEROS) as ledger:
        assert tuple(read.rounds.values()) == ledger.history()
        assert [(one.job, one.round, one.state) for one in ledger.history()] == [
            ("job", 1, RoundState.LOST),
            ("job", 2, RoundState.LOST),
            ("job#evaluation", 1, RoundState.LOST),
            ("job", 3, RoundState.LOST),
            ("job", 4, RoundState.RESERVED),
        ]
        before = epsilon([EVENT] * 4 + [counts], 1e-5)
        assert ledger.spent(1e-5) == ledger.shared_spent(1e-5) == before
        head = ledger.head()
        ledger.reserve_attempt(
            AttemptKey("other", 1, 1), ZEROS, cost, Budget(math.inf, 1e-5, math.inf)
        )
    with Ledger.open(path, ZEROS) as ledger:
        ledger.verify(head)
        assert len(ledger.charges()) == 6
        assert ledger.spent(1e-5) > before


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_former_session_journal_answers_as_before(number: int, tmp_path: Path) -> None:
    path = stored(f"session-{number}.sqlite", tmp_path)
    published = read_published(path)
    session = SiteJournal(path)
    header = RoundHeader("clinics", "job", 2, 1, ZEROS, ZEROS, ZEROS, ("a", "b", "c"))
    assert session.answer(header.context(), "train", b"\x02" * 32) == b"reply"
    assert session.state(header.context()) == b"state 2"
    assert session.survivor_sets() == [("a", "b", "c")] * 2
    assert session.seconds_trained("job") == (3.0 if number == 3 else 0.0)
    assert session.published() == published
    # Version 1 did not count the answers that it had deleted; neither did its ledger.
    assert published.answers == (2 if number == 1 else 4)
    session.close()


def test_a_former_ledger_and_journal_belong_together_still(tmp_path: Path) -> None:
    for number in (1, 2):
        session = read_published(stored(f"session-{number}.sqlite", tmp_path))
        with Ledger.open(stored(f"ledger-{number}.sqlite", tmp_path), ZEROS) as ledger:
            assert session.ledger_head is not None
            ledger.verify(session.ledger_head)
            ledger.keep_pace(session.answers)


def test_a_former_round_journal_knows_what_it_knew(tmp_path: Path) -> None:
    with closing(ServerJournal(stored("journal-1.sqlite", tmp_path))) as store:
        assert store.jobs() == ["job"]
        assert store.next_attempt("job", 1) == 2
        assert len(store.transcript("job")) == 2
        (header,) = store.headers("job")
        assert decode_canonical(header.statement, HEADER_VERSIONS).attempt == 1
        assert store.last_adverts() == {}
        advert = Signed(statement=b"advert", signature=bytes(64))
        store.keep_advert("a", header, advert)
        assert store.last_adverts()["a"].advert == advert


def test_a_former_queue_has_its_jobs(tmp_path: Path) -> None:
    with closing(JobQueue(stored("queue-1.sqlite", tmp_path))) as queue:
        assert [(job.job, job.state) for job in queue.jobs()] == [
            ("job", JobState.FAILED),
            ("other", JobState.WAITING),
        ]
