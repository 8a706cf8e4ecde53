"""What the operator wants done, and how far it is: jobs in one SQLite file.

The commands write here what is wanted, and the running server reads it, does it, and writes how far
it is. Neither needs to reach the other: a command works while the server is down.
"""

import time
from enum import Enum
from pathlib import Path

import msgspec

from umbel_common.canonical import decode_canonical, encode
from umbel_common.errors import JobUnknown, RunExists
from umbel_common.trust.identity import Signed
from umbel_host.files.database import Database, Schema

_TABLES = """
CREATE TABLE jobs (
    job TEXT PRIMARY KEY, position INTEGER NOT NULL UNIQUE, plan BLOB NOT NULL, roster TEXT,
    state TEXT NOT NULL, stop INTEGER NOT NULL DEFAULT 0,
    round INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0,
    stage TEXT NOT NULL DEFAULT '', answered TEXT NOT NULL DEFAULT '',
    detail TEXT NOT NULL DEFAULT '', changed REAL NOT NULL
) STRICT;
"""
QUEUE_SCHEMA = Schema("job queue", _TABLES)


class JobState(Enum):
    """How a job stands."""

    WAITING = "waiting"
    """Its turn comes when the jobs before it are over."""
    RUNNING = "running"
    """Under way, or about to go on if the server was restarted."""
    STOPPED = "stopped"
    """By the operator; what it released stays, and it can be resumed."""
    FAILED = "failed"
    """Too few sites, or too many failed attempts: it can be resumed."""
    FINISHED = "finished"


class QueuedJob(msgspec.Struct, frozen=True):
    """One job."""

    job: str
    plan: Signed
    roster: str | None
    """The roster that it began with, as a roster file; None before it began."""
    state: JobState
    stop: bool
    """Whether the operator wants it stopped."""
    round: int
    attempt: int
    stage: str
    answered: tuple[str, ...]
    """Sites that answered the stage so far."""
    detail: str
    """Why it failed, for people."""
    changed: float
    """Seconds since 1970."""


class JobQueue:
    """The jobs of one operator; any number of processes may use the file at once."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file.

        Raises:
            StorageError: it is corrupt, of a later schema version, or cannot be written.
        """
        self._database = Database(path, QUEUE_SCHEMA)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def add(self, job: str, plan: Signed) -> None:
        """Queues a job behind all others.

        Raises:
            RunExists: a job of this name exists.
        """
        with self._database.transaction():
            if self._row(job) is not None:
                raise RunExists(
                    "a job of this name exists",
                    field=job,
                    remedy="resume it, or give the new plan another job name",
                )
            self._database.execute(
                "INSERT INTO jobs (job, position, plan, state, changed)"
                " SELECT ?, COALESCE(MAX(position), 0) + 1, ?, ?, ? FROM jobs",
                (job, encode(plan), JobState.WAITING.value, time.time()),
            )

    def jobs(self) -> list[QueuedJob]:
        """Every job, in the order in which they were added."""
        with self._database.errors():
            rows = self._database.execute(f"{_SELECT} ORDER BY position").fetchall()
            return [_queued(row) for row in rows]

    def job(self, name: str) -> QueuedJob:
        """One job.

        Raises:
            JobUnknown: there is none of this name.
        """
        with self._database.errors():
            row = self._row(name)
        if row is None:
            known = ", ".join(job.job for job in self.jobs())
            raise JobUnknown(
                "no job of this name", field=name, accepted=known or "none was started yet"
            )
        return _queued(row)

    def next_job(self) -> QueuedJob | None:
        """The job to work on: one that was under way, else the one that waits longest.

        Who had to wait for people goes to the end: a plan that nobody approves holds nobody up.
        """
        jobs = self.jobs()
        running = [job for job in jobs if job.state is JobState.RUNNING]
        waiting = [job for job in jobs if job.state is JobState.WAITING]
        return next(iter(running), None) or min(waiting, key=lambda job: job.changed, default=None)

    def ask_to_stop(self, name: str) -> QueuedJob:
        """Wants a job stopped; one that only waits is stopped at once.

        Raises:
            JobUnknown: there is none of this name.
        """
        job = self.job(name)
        if job.state is JobState.RUNNING:
            self._update(name, stop=1)
        elif job.state is JobState.WAITING:
            self.set_state(name, JobState.STOPPED)
        return self.job(name)

    def resume(self, name: str) -> QueuedJob:
        """Wants a stopped or failed job to go on.

        Raises:
            JobUnknown: there is none of this name.
        """
        job = self.job(name)
        if job.state in (JobState.STOPPED, JobState.FAILED):
            self._update(name, stop=0, state=JobState.WAITING.value, detail="")
        elif job.stop:
            self._update(name, stop=0)
        return self.job(name)

    def keep_roster(self, name: str, roster: str) -> None:
        """Ties a job to the roster that it begins with."""
        self._update(name, roster=roster)

    def set_state(self, name: str, state: JobState, detail: str = "") -> None:
        """How a job stands from now on."""
        self._update(name, state=state.value, detail=detail, stop=0)

    def set_progress(
        self, name: str, *, round_number: int, attempt: int, stage: str, answered: tuple[str, ...]
    ) -> None:
        """Where a running job is."""
        self._update(
            name, round=round_number, attempt=attempt, stage=stage, answered=" ".join(answered)
        )

    def stop_all(self, detail: str) -> tuple[str, ...]:
        """Stops whatever waits or runs, with a reason; returns their names."""
        jobs = self.jobs()
        names = tuple(job.job for job in jobs if job.state in (JobState.RUNNING, JobState.WAITING))
        for name in names:
            self.set_state(name, JobState.STOPPED, detail)
        return names

    def is_stop_wanted(self, name: str) -> bool:
        """Whether the operator wants a job stopped."""
        return self.job(name).stop

    def _update(self, name: str, **values: object) -> None:
        columns = {**values, "changed": time.time()}
        assignments = ", ".join(f"{column} = ?" for column in columns)
        with self._database.transaction():
            self._database.execute(
                f"UPDATE jobs SET {assignments} WHERE job = ?",  # noqa: S608  # our own names
                (*columns.values(), name),
            )

    def _row(self, name: str) -> tuple[object, ...] | None:
        row: tuple[object, ...] | None = self._database.execute(
            f"{_SELECT} WHERE job = ?", (name,)
        ).fetchone()
        return row


_SELECT = (
    "SELECT job, plan, roster, state, stop, round, attempt, stage, answered, detail, changed"
    " FROM jobs"
)


def _queued(row: tuple[object, ...]) -> QueuedJob:
    job, plan, roster, state, stop, number, attempt, stage, answered, detail, changed = row
    assert isinstance(plan, bytes)
    assert isinstance(answered, str)
    return msgspec.convert(
        {
            "job": job,
            "plan": decode_canonical(plan, Signed),
            "roster": roster,
            "state": state,
            "stop": bool(stop),
            "round": number,
            "attempt": attempt,
            "stage": stage,
            "answered": tuple(answered.split()),
            "detail": detail,
            "changed": changed,
        },
        QueuedJob,
    )
