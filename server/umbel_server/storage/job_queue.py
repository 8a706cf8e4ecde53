"""The operator's jobs and their progress, in one SQLite file.

The commands write here what the operator wants; the running server reads it, does it, and writes
its progress. Neither needs to reach the other: a command works while the server is down.
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
_SEEN = """
CREATE TABLE answers (
    job TEXT NOT NULL, site TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    stage TEXT NOT NULL, refused TEXT NOT NULL, time REAL NOT NULL, PRIMARY KEY (job, site)
) STRICT;
CREATE TABLE times (
    job TEXT PRIMARY KEY, stage_began REAL NOT NULL, round_began REAL NOT NULL,
    round_seconds REAL NOT NULL
) STRICT;
"""
QUEUE_SCHEMA = Schema("job queue", _TABLES + _SEEN, (_SEEN,))


class JobState(Enum):
    """The state of a job."""

    WAITING = "waiting"
    """It starts when the jobs before it are over."""
    RUNNING = "running"
    """It runs now, or is about to resume after a restart of the server."""
    STOPPED = "stopped"
    """The operator stopped it. Its releases stay, and it can be resumed."""
    FAILED = "failed"
    """Too few sites took part, or too many attempts failed. It can be resumed."""
    FINISHED = "finished"


class QueuedJob(msgspec.Struct, frozen=True):
    """One row of the queue."""

    job: str
    plan: Signed
    roster: str | None
    """The roster that the job started with, as a roster file; None before its start."""
    state: JobState
    stop: bool
    """Whether the operator wants it stopped."""
    round: int
    attempt: int
    stage: str
    answered: tuple[str, ...]
    """Sites that have answered the current stage."""
    detail: str
    """Why it failed or waits, for people."""
    changed: float
    """Time of the last change, seconds since 1970."""


class SiteAnswer(msgspec.Struct, frozen=True):
    """The last answer of a site to a job."""

    site: str
    round: int
    attempt: int
    stage: str
    refused: str
    """Name of the rule by which the site refused; empty: it did not refuse."""
    time: float
    """Seconds since 1970."""


class Times(msgspec.Struct, frozen=True):
    """When a job's stage and round began; seconds since 1970, or 0 if none has begun."""

    stage_began: float = 0.0
    round_began: float = 0.0
    round_seconds: float = 0.0
    """How long the last round took that was released; 0 before the first."""


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
        """Adds a job at the end of the queue.

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
        """All jobs, in the order in which they were added."""
        with self._database.errors():
            rows = self._database.execute(f"{_SELECT} ORDER BY position").fetchall()
            return [_queued(row) for row in rows]

    def job(self, name: str) -> QueuedJob:
        """One job.

        Raises:
            JobUnknown: no job has this name.
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
        """The job to run: one that was running, else the one that has waited longest.

        A job that had to wait for people goes to the end of the queue: a plan that nobody approves
        does not delay the other jobs.
        """
        jobs = self.jobs()
        running = [job for job in jobs if job.state is JobState.RUNNING]
        waiting = [job for job in jobs if job.state is JobState.WAITING]
        return next(iter(running), None) or min(waiting, key=lambda job: job.changed, default=None)

    def ask_to_stop(self, name: str) -> QueuedJob:
        """Asks the server to stop a job; a waiting job is stopped at once.

        Raises:
            JobUnknown: no job has this name.
        """
        job = self.job(name)
        if job.state is JobState.RUNNING:
            self._update(name, stop=1)
        elif job.state is JobState.WAITING:
            self.set_state(name, JobState.STOPPED)
        return self.job(name)

    def resume(self, name: str) -> QueuedJob:
        """Puts a stopped or failed job back into the queue, to be resumed.

        Raises:
            JobUnknown: no job has this name.
        """
        job = self.job(name)
        if job.state in (JobState.STOPPED, JobState.FAILED):
            self._update(name, stop=0, state=JobState.WAITING.value, detail="")
        elif job.stop:
            self._update(name, stop=0)
        return self.job(name)

    def keep_roster(self, name: str, roster: str) -> None:
        """Records the roster that a job starts with."""
        self._update(name, roster=roster)

    def set_state(self, name: str, state: JobState, detail: str = "") -> None:
        """Sets the state of a job."""
        self._update(name, state=state.value, detail=detail, stop=0)

    def begin_stage(self, name: str, round_number: int, attempt: int, stage: str) -> None:
        """Records that a stage of a running job begins: no site has answered it."""
        now, former, row = time.time(), self.times(name), self._row(name)
        goes_on = stage != "train" or (row is not None and _queued(row).round == round_number)
        times = Times(now, former.round_began if goes_on else now, former.round_seconds)
        with self._database.transaction():
            self._set(name, round=round_number, attempt=attempt, stage=stage, answered="")
            self._set_times(name, times)

    def add_answer(self, name: str, answer: SiteAnswer) -> None:
        """Records a site's answer to the current stage."""
        with self._database.transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
                (name, *msgspec.structs.astuple(answer)),
            )
            if not answer.refused:
                self._database.execute(
                    "UPDATE jobs SET answered = TRIM(answered || ' ' || ?), changed = ?"
                    " WHERE job = ?",
                    (answer.site, answer.time, name),
                )

    def end_round(self, name: str) -> None:
        """Records how long the round took that was just released."""
        times = self.times(name)
        seconds = max(time.time() - times.round_began, 0.0)
        with self._database.transaction():
            self._set_times(name, msgspec.structs.replace(times, round_seconds=seconds))

    def answers(self, name: str) -> tuple[SiteAnswer, ...]:
        """The last answer of each site to a job, by site."""
        with self._database.errors():
            rows = self._database.execute(
                "SELECT site, round, attempt, stage, refused, time FROM answers WHERE job = ?"
                " ORDER BY site",
                (name,),
            ).fetchall()
        return tuple(SiteAnswer(*row) for row in rows)

    def times(self, name: str) -> Times:
        """When a job's stage and round began."""
        with self._database.errors():
            row = self._database.execute(
                "SELECT stage_began, round_began, round_seconds FROM times WHERE job = ?", (name,)
            ).fetchone()
        return Times() if row is None else Times(*row)

    def _set_times(self, name: str, times: Times) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO times VALUES (?, ?, ?, ?)",
            (name, *msgspec.structs.astuple(times)),
        )

    def stop_all(self, detail: str) -> tuple[str, ...]:
        """Stops all waiting and running jobs; returns their names.

        Args:
            detail: the reason.
        """
        jobs = self.jobs()
        names = tuple(job.job for job in jobs if job.state in (JobState.RUNNING, JobState.WAITING))
        for name in names:
            self.set_state(name, JobState.STOPPED, detail)
        return names

    def is_stop_wanted(self, name: str) -> bool:
        """Whether the operator wants a job stopped."""
        return self.job(name).stop

    def _update(self, name: str, **values: object) -> None:
        with self._database.transaction():
            self._set(name, **values)

    def _set(self, name: str, **values: object) -> None:
        columns = {**values, "changed": time.time()}
        assignments = ", ".join(f"{column} = ?" for column in columns)
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
