"""What follows from the rows of a privacy ledger, taken one by one.

What this module must keep, whatever is changed in it: each invariant of the chain that `Contents`
checks stays, because a chain that breaks one is damaged; and every charge is in both totals.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from umbel_client.ledger.rows import (
    GENESIS,
    LOST,
    Attempt,
    AttemptChange,
    AttemptComputed,
    AttemptKey,
    AttemptReserved,
    AttemptSent,
    Carried,
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
    StatedAttempts,
    StatedWithAttempts,
)
from umbel_client.privacy.accounting import DpEvent
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_common.canonical import Digest, Value, decode_canonical, digest
from umbel_common.errors import RemoteProtocolError

_EARLY = "an old copy is charged before its spend is stated"


class _OpenedFirst(Value, frozen=True, tag_field="row", tag="opened"):
    """Row 0 of a ledger that was created under schema version 1, which had no units."""

    data_set: Digest
    schema: Literal[1] = 1


class _FirstRow(Value, frozen=True):
    previous: Digest
    salt: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    change: _OpenedFirst


@dataclass
class JobAttempts:
    """All attempts of one job of distributed mode."""

    plan: bytes
    """Digest of the plan, 32 bytes."""
    cost: AttemptCost
    count: int = 0
    """How many were charged, those included that somebody stated."""
    closed: int = 0
    """Last round that a statement closed: nothing of it, or of one before, may leave any more."""


@dataclass
class Contents:
    """What follows from the rows of a ledger, taken one by one."""

    data_set: bytes = b""
    """Digest of the data set that the ledger is about now, 32 bytes."""
    unit: str | None = None
    heads: list[bytes] = field(default_factory=list)
    """Head of the chain after each row."""
    rounds: dict[tuple[str, int], Reservation] = field(default_factory=dict)
    """Each round of local mode by job and number, in the order of their reservations."""
    attempts: dict[AttemptKey, Attempt] = field(default_factory=dict)
    """Each attempt of distributed mode, in the order of their reservations."""
    jobs: dict[str, JobAttempts] = field(default_factory=dict)
    """What the attempts of each job of distributed mode have in common."""
    answers: int = 0
    """How many answers the session journal had recorded when this site last sent one."""
    schema: int = 0
    """Schema version of the file that the rows were read from; 0 before any was read."""
    old_copy: bool = False
    """Whether these rows are an old copy, and nobody has stated yet what was spent since."""
    unknown: bool = False
    """Whether it was stated that nobody knows what was spent."""
    statements: list[Stated] = field(default_factory=list)
    _order: list[tuple[str, int] | AttemptKey | StatedAttempts] = field(default_factory=list)
    """What was charged, in its order."""
    _vectors: set[bytes] = field(default_factory=set)

    def head(self) -> bytes:
        """Head of the chain, 32 bytes."""
        return self.heads[-1] if self.heads else GENESIS

    def read(self, position: int, entry: bytes, head: bytes) -> None:
        """Follows a row that was stored.

        Raises:
            ValueError: it breaks an invariant of the chain.
            RemoteProtocolError: it is not a row.
        """
        _require(position == len(self.heads), "its position is out of order")
        _require(digest("LedgerRow", entry) == head, "its head differs")
        if position == 0 and (data_set := _begun_by_version_1(entry)):
            self.data_set = data_set
            self.heads.append(head)
            return
        row = decode_canonical(entry, Row)
        _require(row.previous == self.head(), "it does not follow the row before")
        self.follow(row)

    def follow(self, row: Row) -> None:
        """Follows one change; a `ValueError` says which invariant it breaks."""
        first = not self.heads
        _require(isinstance(row.change, Opened) == first, "a ledger is opened once, and first")
        match row.change:
            case Opened():
                self.data_set, self.unit = row.change.data_set, row.change.unit
            case Carried():
                self.data_set = row.change.data_set
            case Restored():
                self.old_copy = True
            case Stated():
                self._follow_statement(row.change)
            case Reserved() | Computed() | Sent():
                _require(not self.old_copy, _EARLY)
                if isinstance(row.change, Reserved):
                    _require(row.change.job not in self.jobs, "a job has two modes")
                    self._order.append((row.change.job, row.change.round))
                _apply(self.rounds, row.change)
            case _:
                _require(not self.old_copy, _EARLY)
                self._follow_attempt(row.change)
        self.heads.append(row.head())

    def charges(self) -> list[Charge]:
        """Everything that was charged, in its order."""
        found: list[Charge] = []
        for key in self._order:
            if isinstance(key, StatedAttempts):
                found.append(key)
            elif isinstance(key, AttemptKey):
                found.append(self.attempts[key])
            else:
                found.append(self.rounds[key])
        return found

    def events(self, *, shared: bool = False) -> list[DpEvent | None]:
        """The DP event of every charge, for the accountant; None without privacy.

        Args:
            shared: whether against readers of the sums; otherwise against everybody.
        """
        unknown = [None] if self.unknown else []
        return [*events_of(self.charges(), shared=shared), *unknown]

    def has_vector(self, vector: bytes) -> bool:
        """Whether an attempt has a vector of this digest."""
        return vector in self._vectors

    @property
    def honest(self) -> int | None:
        """Number of sites in each sum whose noise its readers must not know, for the total against
        them to hold: the largest of any job. None: nothing was charged in distributed mode."""
        return max((job.cost.honest for job in self.jobs.values()), default=None)

    def _follow_attempt(self, change: AttemptChange) -> None:
        key = AttemptKey(change.job, change.round, change.attempt)
        known = self.attempts.get(key)
        match change:
            case AttemptReserved():
                _require(known is None, "an attempt is reserved twice")
                job = self._job_of(change)
                _require(change.round > job.closed, "an attempt at a round that a statement closed")
                job.count += 1
                _require(job.count <= job.cost.most_attempts, "an attempt past the plan's most")
                self.attempts[key] = Attempt(
                    change.job, change.plan, change.round, change.attempt, change.cost
                )
                self._order.append(key)
            case AttemptComputed() if known is not None and known.state is RoundState.RESERVED:
                _require(change.vector not in self._vectors, "two attempts have one vector")
                self._vectors.add(change.vector)
                self.attempts[key] = msgspec.structs.replace(
                    known, state=RoundState.COMPUTED, vector=change.vector
                )
            case AttemptSent() if known is not None and known.state is RoundState.COMPUTED:
                self.attempts[key] = msgspec.structs.replace(known, state=RoundState.SENT)
            case _:
                raise ValueError("an attempt skips a state")

    def _job_of(self, charged: AttemptReserved | StatedAttempts) -> JobAttempts:
        if charged.job not in self.jobs:
            _require(all(job != charged.job for job, _ in self.rounds), "a job has two modes")
            self.jobs[charged.job] = JobAttempts(charged.plan, charged.cost)
        job = self.jobs[charged.job]
        _require(
            (job.plan, job.cost) == (charged.plan, charged.cost),
            "attempts of a job have two plans or costs",
        )
        return job

    def _follow_statement(self, stated: Stated) -> None:
        for added in stated.rounds:
            _require((added.job, added.round) not in self.rounds, "a round is stated twice")
            _require(added.job not in self.jobs, "a job has two modes")
            self.rounds[added.job, added.round] = Reservation(
                added.job, added.plan, added.round, added.event
            )
            self._order.append((added.job, added.round))
        for key, known in self.rounds.items():
            self.rounds[key] = msgspec.structs.replace(
                known, state=RoundState.LOST, delta_digest=LOST
            )
        if isinstance(stated, StatedWithAttempts):
            for counted in stated.attempts:
                job = self._job_of(counted)
                job.count += counted.attempts
                _require(job.count <= job.cost.most_attempts, "an attempt past the plan's most")
                job.closed = max(job.closed, counted.round)
                self._order.append(counted)
        for attempt, found in self.attempts.items():
            self.attempts[attempt] = msgspec.structs.replace(
                found, state=RoundState.LOST, vector=LOST
            )
            job = self.jobs[attempt.job]
            job.closed = max(job.closed, attempt.round)
        self.old_copy = False
        self.unknown |= stated.everything
        self.statements.append(stated)


def events_of(charges: Iterable[Charge], *, shared: bool) -> list[DpEvent | None]:
    """The DP events of some charges; None for a release without differential privacy.

    Args:
        shared: whether against readers of the sums; otherwise against everybody. A round of local
            mode costs the same in both: its protection does not depend on others.
    """
    found: list[DpEvent | None] = []
    for charge in charges:
        if isinstance(charge, Reservation):
            found.append(charge.event)
            continue
        count = charge.attempts if isinstance(charge, StatedAttempts) else 1
        found += (charge.cost.for_readers if shared else charge.cost.for_everybody)(count)
    return found


def _begun_by_version_1(entry: bytes) -> bytes | None:
    """The data set of such a row 0, 32 bytes; None if it is another row."""
    try:
        first = decode_canonical(entry, _FirstRow)
    except RemoteProtocolError:
        return None
    return first.change.data_set if first.previous == GENESIS else None


def _apply(rounds: dict[tuple[str, int], Reservation], change: Reserved | Computed | Sent) -> None:
    """Follows one change of state; a `ValueError` says which invariant it breaks."""
    key = (change.job, change.round)
    known = rounds.get(key)
    match change:
        case Reserved():
            _require(known is None, "a round is reserved twice")
            rounds[key] = Reservation(change.job, change.plan, change.round, change.event)
        case Computed() if known is not None and known.state is RoundState.RESERVED:
            rounds[key] = msgspec.structs.replace(
                known, state=RoundState.COMPUTED, delta_digest=change.delta_digest
            )
        case Sent() if known is not None and known.state is RoundState.COMPUTED:
            rounds[key] = msgspec.structs.replace(known, state=RoundState.SENT)
        case _:
            raise ValueError("a round skips a state")


def _require(condition: bool, what: str) -> None:
    """Checks an invariant of the chain; a `ValueError` names the one that is broken."""
    if not condition:
        raise ValueError(what)
