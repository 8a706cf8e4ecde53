"""The site's protocol journal: what is answered is on disk before it is sent (Bonawitz et al. 2017
assume that a client answers each stage once; a restart must not break that).

One SQLite file at the site. For each attempt it keeps the header, the current secret state of
secure aggregation, and each stage's answer with the digest of the request it answers. The same
request again gets the same bytes again; another request for an answered stage is refused, also
after a restart. Secret state is deleted when the attempt is over; the file lies beside the data
itself and needs the same protection.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec

from umbel_client.snapshot import read_only
from umbel_common.canonical import Value, decode_canonical, encode
from umbel_common.errors import RemoteProtocolError, StorageError, require
from umbel_common.identity import Signed
from umbel_common.statements import RoundHeader

SCHEMA_VERSION = 3
_PIECE_BYTES = 1 << 20

_SCHEMA = """
CREATE TABLE plans (job TEXT PRIMARY KEY, plan BLOB NOT NULL) STRICT;
CREATE TABLE attempts (
    context BLOB PRIMARY KEY, job TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    header BLOB NOT NULL, ledger_head BLOB NOT NULL, state BLOB, survivors BLOB,
    UNIQUE (job, round, attempt)
) STRICT;
CREATE TABLE answers (
    context BLOB NOT NULL, stage TEXT NOT NULL, request BLOB NOT NULL, reply BLOB NOT NULL,
    PRIMARY KEY (context, stage)
) STRICT;
CREATE TABLE answered (total INTEGER NOT NULL) STRICT;
INSERT INTO answered VALUES (0);
CREATE TABLE trained (job TEXT PRIMARY KEY, seconds REAL NOT NULL) STRICT;
CREATE TABLE releases (
    job TEXT NOT NULL, round INTEGER NOT NULL, release BLOB NOT NULL, PRIMARY KEY (job, round)
) STRICT;
"""


class Published(Value, frozen=True):
    """What this site has said of its ledger and let out, which the ledger must know of."""

    ledger_head: bytes | None
    """That it signed last, 32 bytes; None before its first attempt."""
    answers: int
    """That it ever recorded, those of attempts that are over included."""


class Session:
    """The journal of one site; used by one process and thread at a time."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the journal, readable by its owner only.

        Raises:
            StorageError: it is corrupt, of another schema version, or cannot be written.
        """
        self._path = path
        with self._storage_errors():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            # Deleted secrets are overwritten in the file, not only unlinked.
            self._database.execute("PRAGMA secure_delete = ON")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._database.executescript(
                    f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
                )
            elif version != SCHEMA_VERSION:
                raise StorageError(
                    "a session journal has another schema version",
                    file=path,
                    found=version,
                    accepted=SCHEMA_VERSION,
                    remedy="use it with the version of umbel-client that made it",
                )

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def check_plan(self, job: str, plan: Signed) -> None:
        """Refuses a second plan for a job: it has one for ever.

        Raises:
            RemoteProtocolError: `job-has-other-plan`.
        """
        known = self.plan(job)
        require(
            known is None or known.statement == plan.statement,
            "job-has-other-plan",
            f"job {job} was accepted otherwise",
        )

    def accept_plan(self, job: str, plan: Signed) -> None:
        """Keeps the plan of a job.

        Raises:
            RemoteProtocolError: `job-has-other-plan`.
        """
        self.check_plan(job, plan)
        if self.plan(job) is None:
            with self._transaction():
                self._database.execute("INSERT INTO plans VALUES (?, ?)", (job, encode(plan)))

    def plan(self, job: str) -> Signed | None:
        """The accepted plan of a job."""
        with self._storage_errors():
            row = self._database.execute("SELECT plan FROM plans WHERE job = ?", (job,)).fetchone()
            return None if row is None else decode_canonical(row[0], Signed)

    def plans(self) -> list[Signed]:
        """Every plan that was ever accepted."""
        return self._signed("SELECT plan FROM plans ORDER BY job")

    def releases(self, job: str) -> list[Signed]:
        """The releases of a job that this site has seen, in the order of their rounds."""
        return self._signed("SELECT release FROM releases WHERE job = ? ORDER BY round", job)

    def check_new(self, header: RoundHeader) -> None:
        """Refuses an attempt number that was used, or lies behind one that was used.

        Raises:
            RemoteProtocolError: `attempt-reused`.
        """
        with self._storage_errors():
            row = self._database.execute(
                "SELECT MAX(attempt) FROM attempts WHERE job = ? AND round = ?",
                (header.job, header.round),
            ).fetchone()
        require(
            row[0] is None or header.attempt > row[0],
            "attempt-reused",
            f"attempt {header.attempt} of round {header.round} was used or overtaken",
        )

    def header(self, context: bytes) -> RoundHeader:
        """The header of an open or past attempt.

        Raises:
            RemoteProtocolError: `unknown-attempt`.
        """
        with self._storage_errors():
            row = self._database.execute(
                "SELECT header FROM attempts WHERE context = ?", (context,)
            ).fetchone()
        if row is None:
            raise RemoteProtocolError("unknown-attempt", "a stage of an attempt that never began")
        return decode_canonical(row[0], RoundHeader)

    def state(self, context: bytes) -> bytes:
        """The secret state of an open attempt.

        Raises:
            RemoteProtocolError: `attempt-over`.
        """
        with self._storage_errors():
            row = self._database.execute(
                "SELECT state FROM attempts WHERE context = ?", (context,)
            ).fetchone()
        if row is None or row[0] is None:
            raise RemoteProtocolError("attempt-over", "this attempt is over at this site")
        return bytes(row[0])

    def answer(self, context: bytes, stage: str, request: bytes) -> bytes | None:
        """The recorded reply to this very request; None if the stage was not answered yet.

        Args:
            request: digest of the request.

        Raises:
            RemoteProtocolError: `second-answer` if the stage was answered to another request.
        """
        with self._storage_errors():
            row = self._database.execute(
                "SELECT rowid, request FROM answers WHERE context = ? AND stage = ?",
                (context, stage),
            ).fetchone()
            if row is None:
                return None
            require(
                row[1] == request, "second-answer", f"stage {stage} was answered to another request"
            )
            with self._database.blobopen("answers", "reply", row[0], readonly=True) as blob:
                return blob.read()

    def published(self) -> Published:
        """What the privacy ledger is held against."""
        with self._storage_errors():
            return _published(self._database)

    def open(
        self, header: RoundHeader, ledger_head: bytes, state: bytes, request: bytes, reply: bytes
    ) -> None:
        """Burns an attempt number together with the answer to its first stage.

        Whatever earlier attempts of the job still held is deleted: their time is over.
        """
        with self._transaction():
            self._database.execute(
                "DELETE FROM answers WHERE context IN (SELECT context FROM attempts WHERE job = ?)",
                (header.job,),
            )
            self._database.execute("UPDATE attempts SET state = NULL WHERE job = ?", (header.job,))
            self._database.execute(
                "INSERT INTO attempts (context, job, round, attempt, header, ledger_head, state)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    header.context(),
                    header.job,
                    header.round,
                    header.attempt,
                    encode(header),
                    ledger_head,
                    state,
                ),
            )
            self._insert_answer(header.context(), "train", request, reply)
        self._forget()

    def burn(
        self, context: bytes, stage: str, request: bytes, reply: bytes, state: bytes | None
    ) -> None:
        """Records an answer and the state that follows it; None ends the attempt here."""
        with self._transaction():
            self._insert_answer(context, stage, request, reply)
            self._database.execute(
                "UPDATE attempts SET state = ? WHERE context = ?", (state, context)
            )
        self._forget()

    def end_job(self, job: str) -> None:
        """Deletes what the attempts of a job still hold: its last release is out."""
        with self._transaction():
            self._database.execute("UPDATE attempts SET state = NULL WHERE job = ?", (job,))
        self._forget()

    def confirm(self, context: bytes, survivors: tuple[str, ...]) -> None:
        """Records the survivor set that is about to be confirmed."""
        with self._transaction():
            self._database.execute(
                "UPDATE attempts SET survivors = ? WHERE context = ?",
                (msgspec.msgpack.encode(survivors), context),
            )

    def confirmed(self, header: RoundHeader | None = None) -> list[tuple[str, ...]]:
        """The survivor sets that were confirmed, in any attempt of the header's round or ever."""
        query = "SELECT survivors FROM attempts WHERE survivors IS NOT NULL"
        values: tuple[str | int, ...] = ()
        if header is not None:
            query += " AND job = ? AND round = ?"
            values = (header.job, header.round)
        with self._storage_errors():
            rows = self._database.execute(query, values).fetchall()
        return [msgspec.msgpack.decode(row[0], type=tuple[str, ...]) for row in rows]

    def trained(self, job: str) -> float:
        """Seconds that this site has trained for a job."""
        with self._storage_errors():
            row = self._database.execute(
                "SELECT seconds FROM trained WHERE job = ?", (job,)
            ).fetchone()
        return 0.0 if row is None else float(row[0])

    def add_trained(self, job: str, seconds: float) -> None:
        """Counts time that this site has trained for a job."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO trained VALUES (?, ?)"
                " ON CONFLICT (job) DO UPDATE SET seconds = seconds + excluded.seconds",
                (job, seconds),
            )

    def keep_release(self, job: str, round_number: int, release: Signed) -> None:
        """Keeps a signed release as evidence.

        Raises:
            RemoteProtocolError: `two-releases` if the operator signed another one for this round.
        """
        with self._storage_errors():
            row = self._database.execute(
                "SELECT release FROM releases WHERE job = ? AND round = ?", (job, round_number)
            ).fetchone()
        if row is None:
            with self._transaction():
                self._database.execute(
                    "INSERT INTO releases VALUES (?, ?, ?)", (job, round_number, encode(release))
                )
        else:
            require(
                decode_canonical(row[0], Signed).statement == release.statement,
                "two-releases",
                f"the operator signed two releases of round {round_number}",
            )

    def _signed(self, statement: str, *values: str) -> list[Signed]:
        with self._storage_errors():
            rows = self._database.execute(statement, values).fetchall()
            return [decode_canonical(row[0], Signed) for row in rows]

    def _insert_answer(self, context: bytes, stage: str, request: bytes, reply: bytes) -> None:
        # Room first, then the reply piece by piece: SQLite would copy a masked vector twice.
        row = self._database.execute(
            "INSERT INTO answers VALUES (?, ?, ?, zeroblob(?))",
            (context, stage, request, len(reply)),
        ).lastrowid
        assert row is not None  # the row that was just inserted
        view = memoryview(reply)
        with self._database.blobopen("answers", "reply", row) as blob:
            for start in range(0, len(view), _PIECE_BYTES):
                blob.write(view[start : start + _PIECE_BYTES])
        self._database.execute("UPDATE answered SET total = total + 1")

    def _forget(self) -> None:
        """Empties the write-ahead log, which still holds former states with their secrets."""
        with self._storage_errors():
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._storage_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _storage_errors(self) -> AbstractContextManager[None]:
        return _storage_errors(self._path)


def read_published(path: Path) -> Published:
    """As `Session.published`, of a journal that another process may be using.

    Raises:
        StorageError: it cannot be read, or is of another schema version.
    """
    if not path.exists():
        return Published(None, 0)
    with _storage_errors(path), read_only(path) as database:
        return _published(database)


def _published(database: sqlite3.Connection) -> Published:
    (head,) = database.execute(
        "SELECT (SELECT ledger_head FROM attempts ORDER BY rowid DESC LIMIT 1)"
    ).fetchone()
    (answers,) = database.execute("SELECT total FROM answered").fetchone()
    return Published(head, answers)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            "the session journal cannot be used",
            file=path,
            found=error,
            remedy="see that the disk has space and the file is writable and intact",
        ) from error
