"""The site's durable privacy ledger: reserved before it is spent, never refunded.

What this module must keep, whatever is changed in it:

- A round is charged whole, and on disk, before its first gradient.
- One reservation has one delta: once its digest is recorded, no other may leave.
- Nothing is taken back. Rows are appended; no method deletes or changes one.

There is one ledger for each data set, used by one process at a time. A round of a job passes these
steps, and each numbered method says which step it is. `open`, `verify`, `require_stated` and
`umbel_client.ledger.admission` guard step 1; `_reserved` and `_reserved_attempt` guard steps 3 and
4; `_append` guards the step that calls it. `charge_statement` is no step of a round.

1. `reserve`: the whole round is charged against the budget. RESERVED is on disk before the first
   gradient.
2. The round is trained, and its delta is stored (`umbel_client.trainer.local_job`).
3. `record_delta`: the digest of the noisy delta is recorded. COMPUTED is on disk before the first
   byte leaves.
4. `record_sent`: the delta is about to leave. SENT.
5. `keep_pace`: the answer that carries it is counted. Only then does it leave.

    None --1--> RESERVED --3--> COMPUTED --4--> SENT
     |              |               |             |
     +--------------+---------------+-------------+-- charge_statement --> LOST

So a kill at any moment leaves the ledger at or above what was truly spent.

A RESERVED round may be computed again after a crash, with fresh noise and without a second charge:
where the ledger has no digest, no byte has left. Among all computations under one reservation
exactly one is ever released, and a release is all that privacy accounting counts. This holds only
if nothing derived from a lost computation is kept: a site that finds RESERVED replaces that round's
file of delta and optimizer state, and starts from the state before the round. From COMPUTED on,
only the delta with the recorded digest may leave, as often as a retry needs: the same bytes again
cost nothing.

An attempt of distributed mode passes the same steps under its own key, (job, round, attempt):
`reserve_attempt`, `record_vector`, `record_vector_sent`, `keep_pace`. It differs in this:

- Each attempt is charged, and has one noisy integer vector. Two sums over one batch would average
  its noise away, so an attempt that follows another draws a batch and noise of its own.
- A RESERVED attempt is never computed again, not even after a crash: `reserve_attempt` takes an
  attempt once, and `record_vector` takes a vector only from the process that reserved it. What was
  lost stays charged, and the server may ask for another attempt.
- No job has more attempts than its plan says.
- Everything is charged against two totals: against everybody, and against readers of the sums
  (`umbel_client.privacy.attempt_cost`). A round of local mode costs the same in both.

Rows form a hash chain, each with a random salt, so that a published head commits to the whole
history and reveals nothing about it. The chain notices damage. A process that may write the file
can also forge a chain, which only a head that was published before reveals (`verify`). Beside the
chain stands the number of answers that left the site, so that an old copy of the session journal
is noticed (`keep_pace`).
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from umbel_client.ledger.admission import (
    require_attempt,
    require_round,
    require_stated_attempts,
)
from umbel_client.ledger.contents import Contents
from umbel_client.ledger.file import (
    SCHEMA,
    create,
    lock_file,
    read_rows,
    require_data_set,
    require_head,
    require_journal,
    storage_errors,
)
from umbel_client.ledger.rows import (
    GENESIS,
    Attempt,
    AttemptComputed,
    AttemptKey,
    AttemptReserved,
    AttemptSent,
    Carried,
    Change,
    Charge,
    Computed,
    Opened,
    Reservation,
    Reserved,
    Restored,
    RoundState,
    Row,
    Sent,
    Stated,
    StatedWithAttempts,
)
from umbel_client.privacy.accounting import DpEvent, total_epsilon
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_client.site.policy import Budget
from umbel_common.canonical import Entropy, decode_canonical, encode
from umbel_common.errors import LedgerError, RemoteProtocolError
from umbel_host.files.database import migrate, transaction
from umbel_host.processes.lifecycle import require_own


class Ledger:
    """The ledger of one data set; used by one thread at a time. A context manager."""

    def __init__(
        self, path: Path, lock: BinaryIO, database: sqlite3.Connection, entropy: Entropy
    ) -> None:
        """Use `Ledger.open`."""
        self._path = path
        self._lock = lock
        self._database = database
        self._entropy = entropy
        self._contents = Contents()
        self._report: Callable[[bytes], None] | None = None
        self._begun: set[AttemptKey] = set()
        """Attempts that this process reserved: no other may have computed on them."""

    @classmethod
    def open(
        cls, path: Path, data_set: bytes, unit: str | None = None, *, entropy: Entropy = os.urandom
    ) -> Self:
        """Opens the ledger of a data set, or creates it, and verifies the whole chain.

        Args:
            path: the SQLite file; `path` + `.lock` beside it marks it as used.
            data_set: digest of the data set, 32 bytes.
            unit: column that says whose a record is; None: each record is its own unit.

        Raises:
            LedgerError: used by another process, damaged, of another data set or unit, or of a
                later schema version.
            StorageError: it cannot be read or written.
        """
        with storage_errors(path):
            require_own(path)
            lock = lock_file(path)
            try:
                if not path.exists():
                    create(path, Row(GENESIS, entropy(16), Opened(data_set, unit)))
                database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            except BaseException:
                lock.close()
                raise
        ledger = cls(path, lock, database, entropy)
        try:
            ledger._load()
            require_data_set(path, ledger._contents, data_set, unit)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Closes the file and lets another process use it. A second call does nothing."""
        self._database.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def reserve(
        self, job: str, plan: bytes, round_number: int, event: DpEvent | None, budget: Budget
    ) -> Reservation:
        """Step 1: charges a whole round, before its first gradient; on disk when this returns.

        A second call for the same round, plan and event charges nothing, and returns the first
        reservation.

        Args:
            plan: digest of the plan.
            event: all local steps of the round; None for a round without differential privacy,
                which only an infinite budget allows.
            budget: the limit of everything ever released from this data set, with this round.

        Raises:
            BudgetError: the budget does not allow it; nothing was written.
            LedgerError: the round is reserved for another plan or event, or the ledger is an old
                copy (`require_stated`).
            StorageError: it could not be written; nothing is reserved.
        """
        self.require_stated()
        known = self.state(job, round_number)
        if known is not None:
            if (known.plan, known.event) != (plan, event):
                raise self._error(
                    f"round {round_number} of job {job} is reserved for another plan or noise",
                    field="plan" if known.plan != plan else "event",
                    found=plan.hex() if known.plan != plan else event,
                    accepted=known.plan.hex() if known.plan != plan else known.event,
                    remedy="run another plan under another job name",
                )
            return known
        require_round(self._path, self._contents, job, event, budget)
        self._append(Reserved(job, plan, round_number, event))
        return self._contents.rounds[job, round_number]

    def record_delta(self, job: str, round_number: int, delta_digest: bytes) -> None:
        """Step 3: fixes the one delta that may leave for this round, before any byte leaves.

        A second call with the same digest changes nothing.

        Raises:
            LedgerError: nothing was reserved, or another delta was fixed: a second release with
                other noise would be a second charge.
            StorageError: it could not be written; the delta may not leave.
        """
        known = self._reserved(job, round_number)
        if known.delta_digest is None:
            self._append(Computed(job, round_number, delta_digest))
        elif known.delta_digest != delta_digest:
            raise self._error(
                f"round {round_number} of job {job} already has another delta",
                field="delta digest",
                found=delta_digest.hex(),
                accepted=known.delta_digest.hex(),
                remedy="resend the cached delta; a second one would be a second release",
            )

    def record_sent(self, job: str, round_number: int) -> None:
        """Step 4: records that the delta is about to leave. A second call changes nothing.

        Raises:
            LedgerError: no delta was fixed.
            StorageError: it could not be written.
        """
        known = self._reserved(job, round_number)
        if known.delta_digest is None:
            raise self._error(
                f"round {round_number} of job {job} was sent before its delta was recorded",
                remedy="this is a bug: report it",
            )
        if known.state is not RoundState.SENT:
            self._append(Sent(job, round_number))

    def reserve_attempt(
        self, key: AttemptKey, plan: bytes, cost: AttemptCost, budget: Budget
    ) -> Attempt:
        """Step 1 in distributed mode: charges an attempt; on disk when this returns.

        It returns once for each attempt. So what computes after it has returned is the only thing
        that ever computes on this attempt.

        Args:
            plan: digest of the plan.
            cost: what each attempt of the plan costs.
            budget: the limits of everything ever released from this data set, with this attempt.

        Raises:
            BudgetError: one of the two budgets does not allow it, or the plan's most attempts are
                used up; nothing was written.
            LedgerError: the attempt was reserved before, or is at a round that a statement closed,
                or the job has another plan, cost or mode, or the ledger is an old copy.
            StorageError: it could not be written; nothing is reserved.
        """
        self.require_stated()
        require_attempt(self._path, self._contents, key, plan, cost, budget)
        self._append(AttemptReserved(key.job, plan, key.round, key.attempt, cost))
        self._begun.add(key)
        return self._contents.attempts[key]

    def record_vector(self, key: AttemptKey, vector: bytes) -> None:
        """Step 3 in distributed mode: fixes the one vector that may leave in an attempt.

        A second call with the same digest changes nothing.

        Args:
            vector: digest of the noisy integer vector, 32 bytes.

        Raises:
            LedgerError: the attempt was not reserved by this process, or has another vector, or
                another attempt has this vector.
            StorageError: it could not be written; the vector may not leave.
        """
        known = self._reserved_attempt(key)
        if known.vector == vector:
            return
        if known.vector is not None:
            raise self._error(
                f"{key} already has another vector",
                field="vector digest",
                found=vector.hex(),
                accepted=known.vector.hex(),
                remedy="resend the cached vector; another one needs an attempt of its own",
            )
        if key not in self._begun:
            raise self._error(
                f"{key} was reserved by a process that ended before its vector was recorded",
                remedy="nothing: it stays charged, and the server may ask for another attempt",
            )
        if self._contents.has_vector(vector):
            raise self._error(
                f"{key} would send the vector of another attempt",
                field="vector digest",
                found=vector.hex(),
                remedy="this is a bug: report it. Each attempt draws a batch and noise of its own",
            )
        self._append(AttemptComputed(*key, vector))
        self._begun.discard(key)

    def record_vector_sent(self, key: AttemptKey) -> None:
        """Step 4 in distributed mode: records that the vector is about to leave. A second call
        changes nothing.

        Raises:
            LedgerError: no vector was fixed, or it is lost.
            StorageError: it could not be written.
        """
        known = self._reserved_attempt(key)
        if known.state is RoundState.COMPUTED:
            self._append(AttemptSent(*key))
        elif known.state is not RoundState.SENT:
            raise self._error(
                f"{key} has no vector to send",
                field="state",
                found=known.state.value,
                remedy="nothing: it stays charged, and the server may ask for another attempt",
            )

    def attempt(self, key: AttemptKey) -> Attempt | None:
        """The attempt of this key; None before `reserve_attempt`."""
        return self._contents.attempts.get(key)

    def charges(self) -> list[Charge]:
        """Everything that was charged, in its order."""
        return self._contents.charges()

    def state(self, job: str, round_number: int) -> Reservation | None:
        """The reservation of this round of local mode; None before `reserve`."""
        return self._contents.rounds.get((job, round_number))

    def history(self) -> tuple[Reservation, ...]:
        """Every reservation of local mode, in the order in which they were made."""
        return tuple(self._contents.rounds.values())

    def spent(self, delta: float) -> float:
        """Epsilon at `delta` of everything ever reserved, against everybody; infinite without
        privacy."""
        return total_epsilon(self._contents.events(), delta)

    def shared_spent(self, delta: float) -> float:
        """As `spent`, against readers of the sums; the same where nothing was reserved in
        distributed mode."""
        return total_epsilon(self._contents.events(shared=True), delta)

    @property
    def honest(self) -> int | None:
        """See `Contents.honest`."""
        return self._contents.honest

    def head(self) -> bytes:
        """Head of the chain, 32 bytes: commits to the history, reveals nothing about it."""
        return self._contents.head()

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self._path

    def first(self) -> bytes:
        """Head of the first row, 32 bytes: no other ledger has it, but a copy of this one."""
        return self._contents.heads[0]

    def contains(self, head: bytes) -> bool:
        """Whether this history contains a head."""
        return head in self._contents.heads

    def report_to(self, register: Callable[[bytes], None]) -> None:
        """Has each new head reported, before the call that adds it returns."""
        self._report = register

    def verify(self, expected_head: bytes) -> None:
        """Checks that this history continues one that was published under `expected_head`.

        Raises:
            LedgerError: it does not: rows were removed, or an old copy was put back.
        """
        require_head(self._path, self._contents, expected_head)

    def keep_pace(self, answers: int) -> None:
        """Step 5: counts the answers in the session journal; on disk before the last may leave.

        A second call with the same number changes nothing.

        Raises:
            LedgerError: the journal is an old copy (`require_journal`).
            StorageError: it could not be written; the answer may not leave.
        """
        require_journal(self._path, self._contents, answers)
        if answers != self._contents.answers:
            with self._transaction():
                self._database.execute("UPDATE journal SET answers = ?", (answers,))
            self._contents.answers = answers

    def continue_on(self, data_set: bytes) -> None:
        """Continues this ledger for a changed data set, which stays charged with everything here.

        A record that is in both data sets has paid for every release. A new record also pays for
        releases that it was not in, which is more than it owes. A second call with the same data
        set changes nothing.

        Args:
            data_set: digest of the changed data set, 32 bytes.

        Raises:
            StorageError: it could not be written.
        """
        if data_set != self._contents.data_set:
            self._append(Carried(data_set))

    def require_stated(self) -> None:
        """Refuses to charge an old copy before somebody has stated what was spent since.

        Raises:
            LedgerError: this ledger is an old copy, and nobody has.
        """
        if self._contents.old_copy:
            raise self._error(
                "a privacy ledger is an old copy, and what was spent since is not known",
                remedy="state it: umbel-client budget state-spend; docs/budget.md says how",
            )

    @property
    def unknown(self) -> bool:
        """Whether it was stated that nobody knows what was spent."""
        return self._contents.unknown

    def mark_as_old_copy(self, evidence: bytes) -> None:
        """Marks this ledger as an old copy: nothing is charged before `charge_statement`.

        Args:
            evidence: how that is known, 32 bytes; see `Restored`.

        Raises:
            StorageError: it could not be written.
        """
        self._append(Restored(evidence))

    def charge_statement(self, stated: Stated) -> None:
        """Charges what was spent and is not in these rows, and closes every round before it.

        A statement can only add to what is charged. In each round of these rows, a delta may have
        left that this site no longer has, so nothing of them leaves again. Later rounds can be
        charged.

        Raises:
            LedgerError: it names a round that is in these rows, more attempts than a plan has, or
                a job of these rows with another plan, cost or mode.
            StorageError: it could not be written.
        """
        for added in stated.rounds:
            if (added.job, added.round) in self._contents.rounds:
                raise self._error(f"round {added.round} of job {added.job} is charged already")
        if isinstance(stated, StatedWithAttempts):
            for counted in stated.attempts:
                require_stated_attempts(self._path, self._contents, counted)
        self._append(stated)

    def knows(self, head: bytes, job: str, round_number: int) -> bool:
        """Whether this history contains a head that this site signed for an attempt at this round,
        or a statement that covers the round."""
        if head in self._contents.heads:
            return True
        known = self.state(job, round_number)
        attempts = self._contents.jobs.get(job)
        closed = attempts is not None and round_number <= attempts.closed
        return closed or (known is not None and known.state is RoundState.LOST)

    def _reserved_attempt(self, key: AttemptKey) -> Attempt:
        known = self._contents.attempts.get(key)
        if known is None:
            raise self._error(
                f"{key} was never reserved",
                remedy="this is a bug: report it",
            )
        return known

    def _reserved(self, job: str, round_number: int) -> Reservation:
        known = self.state(job, round_number)
        if known is None:
            raise self._error(
                f"round {round_number} of job {job} was never reserved",
                remedy="this is a bug: report it",
            )
        return known

    def _append(self, change: Change) -> None:
        row = Row(self.head(), self._entropy(16), change)
        entry = encode(row)
        try:
            decode_canonical(entry, Row)
        except RemoteProtocolError as error:
            raise self._error("a ledger row would not read back", found=error.message) from None
        with self._transaction():
            self._database.execute(
                "INSERT INTO rows VALUES (?, ?, ?)",
                (len(self._contents.heads), entry, row.head()),
            )
        self._contents.follow(row)
        if self._report is not None:
            self._report(self.head())

    def _load(self) -> None:
        with storage_errors(self._path):
            # A database of a later schema, or one that is damaged, is left as it is.
            self._contents = read_rows(self._path, self._database)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            if self._contents.schema != SCHEMA.version:
                migrate(self._database, SCHEMA, self._path)

    def _error(self, message: str, **details: object) -> LedgerError:
        return LedgerError(message, file=self._path, **details)  # type: ignore[arg-type]  # by name

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with storage_errors(self._path), transaction(self._database):
            yield
