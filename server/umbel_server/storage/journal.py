"""The operator's round journal in SQLite: a statement is on disk before it is sent.

An attempt is recorded before its header is sent, so an attempt number is never used twice. A
release is recorded together with its transcript entry and the figures that it depended on: all of
it or nothing. After a crash the job resumes after the last release that is recorded here. No
attempt, release or transcript entry may ever be changed or deleted.
"""

from pathlib import Path

import msgspec

from umbel_common.canonical import decode, decode_canonical, encode
from umbel_common.errors import StorageError
from umbel_common.plans.figures import Evaluation, GateResult
from umbel_common.protocol.transcript import GENESIS, TranscriptEvent, append
from umbel_common.protocol.wire import LastAdvert
from umbel_common.trust.identity import Identity, Signed
from umbel_host.files.database import Database, Schema

_ADVERTS = """
CREATE TABLE adverts (site TEXT PRIMARY KEY, header BLOB NOT NULL, advert BLOB NOT NULL) STRICT;
"""
_EVALUATIONS = """
CREATE TABLE evaluations (
    job TEXT NOT NULL, round INTEGER NOT NULL, evaluation BLOB NOT NULL, gate BLOB,
    PRIMARY KEY (job, round)
) STRICT;
"""
# Jobs of the former version always ended with the last round of their plans.
_FINAL_ROUNDS = """
ALTER TABLE jobs ADD COLUMN final_round INTEGER;
UPDATE jobs SET final_round = (SELECT MAX(round) FROM releases WHERE releases.job = jobs.job)
    WHERE finished = 1;
ALTER TABLE jobs DROP COLUMN finished;
"""
_TABLES = """
CREATE TABLE jobs (
    job TEXT PRIMARY KEY, plan BLOB NOT NULL, final_round INTEGER
) STRICT;
CREATE TABLE attempts (
    job TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, header BLOB NOT NULL,
    PRIMARY KEY (job, round, attempt)
) STRICT;
CREATE TABLE releases (
    job TEXT NOT NULL, round INTEGER NOT NULL, adapter BLOB NOT NULL, release BLOB NOT NULL,
    PRIMARY KEY (job, round)
) STRICT;
CREATE TABLE transcript (
    job TEXT NOT NULL, position INTEGER NOT NULL, head BLOB NOT NULL, entry BLOB NOT NULL,
    PRIMARY KEY (job, position)
) STRICT;
"""

# Adverts of the former version are not known: sites are shown theirs from their next attempt on.
JOURNAL_SCHEMA = Schema(
    "round journal", _TABLES + _ADVERTS + _EVALUATIONS, (_ADVERTS + _EVALUATIONS + _FINAL_ROUNDS,)
)


class Evaluated(msgspec.Struct, frozen=True):
    """The evaluation of one round's adapter on public records."""

    round: int
    evaluation: Evaluation
    gate: GateResult | None
    """None: the plan has no release gate, or this is release 0."""

    @property
    def held_back(self) -> bool:
        """Whether the adapter was not released."""
        return self.gate is not None and not self.gate.passed()


class Journal:
    """The journal of one aggregation server; used by one process and thread at a time."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the journal.

        Raises:
            StorageError: it is corrupt, of a later schema version, or cannot be written.
        """
        self._path = path
        self._database = Database(path, JOURNAL_SCHEMA)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def plan(self, job: str) -> Signed | None:
        """The signed plan of a job; None if the job was never started."""
        return self._one("SELECT plan FROM jobs WHERE job = ?", job)

    def final_round(self, job: str) -> int | None:
        """The round whose release ended the job; None while it has not ended."""
        with self._database.errors():
            row = self._database.execute(
                "SELECT final_round FROM jobs WHERE job = ?", (job,)
            ).fetchone()
        return None if row is None else row[0]

    def start_job(
        self,
        operator: Identity,
        job: str,
        plan: Signed,
        adapter: bytes,
        release: Signed,
        event: TranscriptEvent,
    ) -> None:
        """Records a job, its release 0 and the first entry of its transcript."""
        with self._database.transaction():
            self._execute("INSERT INTO jobs (job, plan) VALUES (?, ?)", job, encode(plan))
            self._insert_release(job, 0, adapter, release)
            self._append(operator, job, event)

    def next_attempt(self, job: str, round_number: int) -> int:
        """The first attempt number (from 1) that the round has not used."""
        with self._database.errors():
            row = self._database.execute(
                "SELECT COALESCE(MAX(attempt), 0) + 1 FROM attempts WHERE job = ? AND round = ?",
                (job, round_number),
            ).fetchone()
        return int(row[0])

    def record_attempt(self, job: str, round_number: int, attempt: int, header: Signed) -> None:
        """Records an attempt before its header is sent; its number is used up."""
        with self._database.transaction():
            self._execute(
                "INSERT INTO attempts (job, round, attempt, header) VALUES (?, ?, ?, ?)",
                job,
                round_number,
                attempt,
                encode(header),
            )

    def keep_advert(self, site: str, header: Signed, advert: Signed) -> None:
        """Records the last advert of a site, of any job, to show it to the site again."""
        with self._database.transaction():
            self._execute(
                "INSERT INTO adverts VALUES (?, ?, ?) ON CONFLICT (site) DO UPDATE"
                " SET header = excluded.header, advert = excluded.advert",
                site,
                encode(header),
                encode(advert),
            )

    def last_adverts(self) -> dict[str, LastAdvert]:
        """Site -> its last advert."""
        with self._database.errors():
            rows = self._database.execute("SELECT site, header, advert FROM adverts").fetchall()
            return {
                site: LastAdvert(
                    header=decode_canonical(header, Signed), advert=decode_canonical(advert, Signed)
                )
                for site, header, advert in rows
            }

    def record_event(self, operator: Identity, job: str, event: TranscriptEvent) -> None:
        """Appends an event to the job's transcript."""
        with self._database.transaction():
            self._append(operator, job, event)

    def record_release(
        self,
        operator: Identity,
        job: str,
        round_number: int,
        adapter: bytes,
        release: Signed,
        event: TranscriptEvent,
        *,
        evaluation: Evaluation | None = None,
        gate: GateResult | None = None,
    ) -> None:
        """Records a release with its transcript entry and the release gate's result: all of it or
        nothing."""
        with self._database.transaction():
            self._insert_release(job, round_number, adapter, release)
            self._append(operator, job, event)
            if evaluation is not None:
                self._insert_evaluation(job, round_number, evaluation, gate)

    def record_evaluation(self, job: str, round_number: int, evaluation: Evaluation) -> None:
        """Records the evaluation of an adapter that is already released."""
        with self._database.transaction():
            self._insert_evaluation(job, round_number, evaluation, None)

    def finish_job(
        self, operator: Identity, job: str, final_round: int, event: TranscriptEvent
    ) -> None:
        """Marks the job as finished, with the last entry of its transcript."""
        with self._database.transaction():
            self._append(operator, job, event)
            self._execute("UPDATE jobs SET final_round = ? WHERE job = ?", final_round, job)

    def last_release(self, job: str) -> tuple[int, bytes, Signed]:
        """Round, adapter digest and signed release of the latest release.

        Raises:
            StorageError: the job has no release.
        """
        with self._database.errors():
            row = self._database.execute(
                "SELECT round, adapter, release FROM releases WHERE job = ?"
                " ORDER BY round DESC LIMIT 1",
                (job,),
            ).fetchone()
            if row is None:
                raise StorageError("a job has no release", file=self._path, field=job)
            return row[0], row[1], decode_canonical(row[2], Signed)

    def jobs(self) -> list[str]:
        """All jobs that were ever started, in the order of their start."""
        with self._database.errors():
            rows = self._database.execute("SELECT job FROM jobs ORDER BY rowid").fetchall()
            return [row[0] for row in rows]

    def releases(self, job: str) -> list[Signed]:
        """All signed releases of the job, in order."""
        return self._all("SELECT release FROM releases WHERE job = ? ORDER BY round", job)

    def evaluations(self, job: str) -> list[Evaluated]:
        """The evaluations of the job's adapters, in the order of the rounds."""
        with self._database.errors():
            rows = self._database.execute(
                "SELECT round, evaluation, gate FROM evaluations WHERE job = ? ORDER BY round",
                (job,),
            ).fetchall()
            return [
                Evaluated(
                    number,
                    decode(evaluation, Evaluation),
                    None if gate is None else decode(gate, GateResult),
                )
                for number, evaluation, gate in rows
            ]

    def transcript_head(self, job: str) -> bytes:
        """Hash of the last entry of the job's transcript, 32 bytes; `GENESIS` before the first."""
        return self._end(job)[1]

    def headers(self, job: str) -> list[Signed]:
        """All signed headers of the job, in order."""
        return self._all("SELECT header FROM attempts WHERE job = ? ORDER BY round, attempt", job)

    def transcript(self, job: str) -> list[Signed]:
        """All entries of the job's transcript, in order."""
        return self._all("SELECT entry FROM transcript WHERE job = ? ORDER BY position", job)

    def _append(self, operator: Identity, job: str, event: TranscriptEvent) -> None:
        position, head = self._end(job)
        new_head, entry = append(operator, position, head, event)
        self._execute(
            "INSERT INTO transcript (job, position, head, entry) VALUES (?, ?, ?, ?)",
            job,
            position,
            new_head,
            encode(entry),
        )

    def _end(self, job: str) -> tuple[int, bytes]:
        """Position of the next entry of a job's transcript, and the hash of the one before it."""
        row = self._database.execute(
            "SELECT position, head FROM transcript WHERE job = ? ORDER BY position DESC LIMIT 1",
            (job,),
        ).fetchone()
        return (0, GENESIS) if row is None else (row[0] + 1, row[1])

    def _insert_release(self, job: str, round_number: int, adapter: bytes, release: Signed) -> None:
        self._execute(
            "INSERT INTO releases (job, round, adapter, release) VALUES (?, ?, ?, ?)",
            job,
            round_number,
            adapter,
            encode(release),
        )

    def _insert_evaluation(
        self, job: str, round_number: int, evaluation: Evaluation, gate: GateResult | None
    ) -> None:
        self._execute(
            "INSERT INTO evaluations (job, round, evaluation, gate) VALUES (?, ?, ?, ?)",
            job,
            round_number,
            encode(evaluation),
            None if gate is None else encode(gate),
        )

    def _execute(self, statement: str, *values: object) -> None:
        self._database.execute(statement, values)

    def _one(self, statement: str, job: str) -> Signed | None:
        rows = self._all(statement, job)
        return rows[0] if rows else None

    def _all(self, statement: str, job: str) -> list[Signed]:
        with self._database.errors():
            rows = self._database.execute(statement, (job,)).fetchall()
            return [decode_canonical(row[0], Signed) for row in rows]
