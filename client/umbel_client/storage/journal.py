"""The site's protocol journal: what is answered is on disk before it is sent.

Bonawitz et al. (2017) assume that a client answers each stage once; a restart must not break that.
What this module must keep, whatever is changed in it:

- An answer and the state that follows it are written in one transaction.
- A stage has one answer and an attempt has one number, for ever: no method replaces an answer, and
  the count of answers never falls.
- The secrets of an attempt that is over are deleted, also from the write-ahead log.
- A file of a former schema version is migrated, and no table or column is renamed.
- What is stored here decodes within `errors`: a value that does not decode is this site's damaged
  file, and never a fault of the server.

The journal is one SQLite file at the site. For each attempt it keeps the header, the current secret
state of secure aggregation, and each stage's answer with the digest of its request. The same
request again gets the same bytes again; another request for an answered stage is refused, also
after a restart. The file lies beside the data and needs the same protection.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from umbel_common.canonical import Value, decode, decode_canonical, encode
from umbel_common.errors import RemoteProtocolError, require
from umbel_common.plans.statements import HEADER_VERSIONS, RoundHeader
from umbel_common.secagg.messages import Preparation
from umbel_common.trust.identity import Signed
from umbel_host.files.database import (
    Database,
    Schema,
    read_only,
    require_known,
    schema_version,
    storage_errors,
)

KIND = "session journal"
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

_STEPS = (
    # Version 1 counted no answers, nor did its ledger: any number that never falls will do.
    """
    CREATE TABLE answered (total INTEGER NOT NULL) STRICT;
    INSERT INTO answered SELECT COUNT(*) FROM answers
    """,
    # Version 2 did not count training time: the policy's hours start at 0 for jobs under way.
    "CREATE TABLE trained (job TEXT PRIMARY KEY, seconds REAL NOT NULL) STRICT",
)


def journal_schema() -> Schema:
    """The schema of every session journal."""
    return Schema(KIND, _SCHEMA, _STEPS)


class Published(Value, frozen=True):
    """What this site has said about its ledger and sent, which the ledger must know."""

    ledger_head: bytes | None
    """The ledger head in the last signed advert, 32 bytes; None before the first attempt."""
    answers: int
    """How many answers were ever recorded, including those of finished attempts."""


class Journal:
    """The journal of one site; used by one process and thread at a time."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the journal, readable by its owner only.

        Raises:
            StorageError: it is corrupt, of a later schema version, or cannot be written.
        """
        # SQLite then overwrites deleted secrets in the file, and does not only unlink them.
        self._database = Database(path, journal_schema(), secure_delete=True)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns a stored value that does not decode in the block into a `StorageError`.

        Raises:
            StorageError: the journal is damaged, or cannot be read.
        """
        with self._database.errors():
            yield

    def check_plan(self, job: str, plan: Signed) -> None:
        """Refuses a second plan for a job, which has one for ever.

        Raises:
            RemoteProtocolError: `job-has-other-plan`.
        """
        known = self.plan(job)
        require(
            known is None or known.statement == plan.statement,
            "job-has-other-plan",
            f"job {job} was accepted with another plan",
            field=job,
            remedy="the operator has to give the new plan another job name",
        )

    def accept_plan(self, job: str, plan: Signed) -> None:
        """Keeps the plan of a job.

        Raises:
            RemoteProtocolError: `job-has-other-plan`.
        """
        self.check_plan(job, plan)
        if self.plan(job) is None:
            with self._database.transaction():
                self._database.execute("INSERT INTO plans VALUES (?, ?)", (job, encode(plan)))

    def plan(self, job: str) -> Signed | None:
        """The accepted plan of a job."""
        with self.errors():
            row = self._database.execute("SELECT plan FROM plans WHERE job = ?", (job,)).fetchone()
            return None if row is None else decode_canonical(row[0], Signed)

    def plans(self) -> list[Signed]:
        """Every plan that was ever accepted."""
        return self._signed("SELECT plan FROM plans ORDER BY job")

    def releases(self, job: str) -> list[Signed]:
        """The releases of a job that this site has seen, in the order of their rounds."""
        return self._signed("SELECT release FROM releases WHERE job = ? ORDER BY round", job)

    def check_new(self, header: RoundHeader | Preparation) -> None:
        """Refuses an attempt number that was used, or that is smaller than one that was used.

        Raises:
            RemoteProtocolError: `attempt-reused`.
        """
        with self.errors():
            row = self._database.execute(
                "SELECT MAX(attempt) FROM attempts WHERE job = ? AND round = ?",
                (header.job, header.round),
            ).fetchone()
        require(
            row[0] is None or header.attempt > row[0],
            "attempt-reused",
            f"attempt {header.attempt} of round {header.round} was used or overtaken",
        )

    def has_attempt(self, job: str) -> bool:
        """Whether this site has answered an attempt of a job."""
        query = "SELECT EXISTS (SELECT 1 FROM attempts WHERE job = ?)"
        with self.errors():
            return bool(self._database.execute(query, (job,)).fetchone()[0])

    def header(self, context: bytes) -> RoundHeader:
        """The header of an open or past attempt.

        Raises:
            RemoteProtocolError: `unknown-attempt`.
        """
        with self.errors():
            row = self._database.execute(
                "SELECT header FROM attempts WHERE context = ?", (context,)
            ).fetchone()
        if row is None:
            raise RemoteProtocolError("unknown-attempt", "a stage of an attempt that never began")
        with self.errors():
            return decode_canonical(row[0], HEADER_VERSIONS)

    def state(self, context: bytes) -> bytes:
        """The secret state of an open attempt.

        Raises:
            RemoteProtocolError: `attempt-over`.
        """
        with self.errors():
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
        with self.errors():
            row = self._database.execute(
                "SELECT rowid, request FROM answers WHERE context = ? AND stage = ?",
                (context, stage),
            ).fetchone()
        if row is None:
            return None
        require(
            row[1] == request, "second-answer", f"stage {stage} was answered to another request"
        )
        with self.errors():
            connection = self._database.connection
            with connection.blobopen("answers", "reply", row[0], readonly=True) as blob:
                return blob.read()

    def published(self) -> Published:
        """What the privacy ledger is compared with."""
        with self.errors():
            return _published(self._database.connection)

    def open_attempt(
        self, header: RoundHeader, ledger_head: bytes, state: bytes, request: bytes, reply: bytes
    ) -> None:
        """Uses up an attempt number, together with the answer to its first stage.

        Answers and secrets of the job's earlier attempts are deleted: those attempts are over.
        """
        with self._database.transaction():
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

    def record_answer(
        self, context: bytes, stage: str, request: bytes, reply: bytes, state: bytes | None
    ) -> None:
        """Records an answer and the state that follows it; None ends the attempt here."""
        with self._database.transaction():
            self._insert_answer(context, stage, request, reply)
            self._database.execute(
                "UPDATE attempts SET state = ? WHERE context = ?", (state, context)
            )
        self._forget()

    def end_job(self, job: str) -> None:
        """Deletes the secrets of a job's attempts, after its last release."""
        with self._database.transaction():
            self._database.execute("UPDATE attempts SET state = NULL WHERE job = ?", (job,))
        self._forget()

    def end_all(self) -> None:
        """Ends every attempt in a copy of a journal, which must not answer anything a second time:
        secrets and answers are deleted, and what was counted and confirmed stays."""
        with self._database.transaction():
            self._database.execute("UPDATE attempts SET state = NULL")
            self._database.execute("DELETE FROM answers")
        self._forget()

    def record_survivors(self, context: bytes, survivors: tuple[str, ...]) -> None:
        """Records the survivor set that is about to be confirmed."""
        with self._database.transaction():
            self._database.execute(
                "UPDATE attempts SET survivors = ? WHERE context = ?",
                (msgspec.msgpack.encode(survivors), context),
            )

    def survivor_sets(self, header: RoundHeader | None = None) -> list[tuple[str, ...]]:
        """The survivor sets that were confirmed, in all attempts of the header's round or ever."""
        query = "SELECT survivors FROM attempts WHERE survivors IS NOT NULL"
        values: tuple[str | int, ...] = ()
        if header is not None:
            query += " AND job = ? AND round = ?"
            values = (header.job, header.round)
        with self.errors():
            rows = self._database.execute(query, values).fetchall()
            return [decode(row[0], tuple[str, ...]) for row in rows]

    def seconds_trained(self, job: str) -> float:
        """Seconds that this site has trained for a job."""
        with self.errors():
            row = self._database.execute(
                "SELECT seconds FROM trained WHERE job = ?", (job,)
            ).fetchone()
        return 0.0 if row is None else float(row[0])

    def add_seconds_trained(self, job: str, seconds: float) -> None:
        """Adds to the time that this site has trained for a job."""
        with self._database.transaction():
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
        with self.errors():
            row = self._database.execute(
                "SELECT release FROM releases WHERE job = ? AND round = ?", (job, round_number)
            ).fetchone()
            known = None if row is None else decode_canonical(row[0], Signed)
        if known is None:
            with self._database.transaction():
                self._database.execute(
                    "INSERT INTO releases VALUES (?, ?, ?)", (job, round_number, encode(release))
                )
        else:
            require(
                known.statement == release.statement,
                "two-releases",
                f"the operator signed two releases of round {round_number}",
            )

    def _signed(self, statement: str, *values: str) -> list[Signed]:
        with self.errors():
            rows = self._database.execute(statement, values).fetchall()
            return [decode_canonical(row[0], Signed) for row in rows]

    def _insert_answer(self, context: bytes, stage: str, request: bytes, reply: bytes) -> None:
        # Room first, then the reply piece by piece: else SQLite would copy a masked vector twice.
        row = self._database.execute(
            "INSERT INTO answers VALUES (?, ?, ?, zeroblob(?))",
            (context, stage, request, len(reply)),
        ).lastrowid
        assert row is not None  # the row that was just inserted
        view = memoryview(reply)
        with self._database.connection.blobopen("answers", "reply", row) as blob:
            for start in range(0, len(view), _PIECE_BYTES):
                blob.write(view[start : start + _PIECE_BYTES])
        self._database.execute("UPDATE answered SET total = total + 1")

    def _forget(self) -> None:
        """Empties the write-ahead log, which still holds former states with their secrets."""
        with self.errors():
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def read_published(path: Path) -> Published:
    """As `Journal.published`, for a journal that another process may be using.

    Raises:
        StorageError: it cannot be read, or is of a later schema version.
    """
    if not path.exists():
        return Published(None, 0)
    with storage_errors(path, KIND), read_only(path) as database:
        version = schema_version(database)
        require_known(version, journal_schema(), path)
        return _published(
            database, "total FROM answered" if version > 1 else "COUNT(*) FROM answers"
        )


def _published(database: sqlite3.Connection, answers: str = "total FROM answered") -> Published:
    (head,) = database.execute(
        "SELECT (SELECT ledger_head FROM attempts ORDER BY rowid DESC LIMIT 1)"
    ).fetchone()
    (count,) = database.execute(f"SELECT {answers}").fetchone()  # our own words
    return Published(head, count)
