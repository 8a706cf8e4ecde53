"""The rows of a privacy ledger: what they say, how they are chained, and what follows from them.

What this module must keep, whatever is changed in it: rows that were written are read for ever, and
their heads were signed and published. So no field of a row is added, renamed or removed, and no tag
changes; a new kind of row takes a new schema version (`umbel_client.ledger.file`). Each invariant
of the chain that `Contents` checks stays: a chain that breaks one is damaged.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from umbel_client.privacy.accounting import DpEvent
from umbel_common.canonical import Digest, Value, decode_canonical, digest, encode
from umbel_common.errors import RemoteProtocolError

GENESIS = bytes(32)
EVALUATION = "#evaluation"
"""Suffix of the ledger entry for a job's evaluation counts. `#` cannot occur in a job's name."""
LOST = digest("lost round", b"")
"""Digest in the place of a delta that was lost with a former state of this site."""


class RoundState(StrEnum):
    """How far one (job, round) has come."""

    RESERVED = "reserved"
    COMPUTED = "computed"
    SENT = "sent"
    LOST = "lost"
    """The round is charged, and nothing of it may leave any more: its delta is not here."""


class Reservation(Value, frozen=True):
    """One (job, round) of the ledger."""

    job: str
    plan: Digest
    round: int
    event: DpEvent | None
    """Its DP event; None without differential privacy: epsilon is infinite from then on."""
    state: RoundState = RoundState.RESERVED
    delta_digest: Digest | None = None
    """Digest of the noisy delta; None while RESERVED."""


class Opened(Value, frozen=True, tag_field="row", tag="opened"):
    """Row 0: which data set the ledger is about."""

    data_set: Digest
    unit: str | None
    """The column that says whose a record is; None: each record is its own unit. It never changes:
    what was charged by one unit says nothing about another."""
    schema: Literal[2, 3] = 3
    """The schema version at creation. It is hashed, so it is never updated."""


class Carried(Value, frozen=True, tag_field="row", tag="carried"):
    """The data set changed, and stays charged with everything before."""

    data_set: Digest


class Reserved(Value, frozen=True, tag_field="row", tag="reserved"):
    """A round was charged."""

    job: str
    plan: Digest
    round: int
    event: DpEvent | None


class Computed(Value, frozen=True, tag_field="row", tag="computed"):
    """The one noisy delta that may leave under a reservation."""

    job: str
    round: int
    delta_digest: Digest


class Sent(Value, frozen=True, tag_field="row", tag="sent"):
    """The delta is about to leave, or has left."""

    job: str
    round: int


class Restored(Value, frozen=True, tag_field="row", tag="restored"):
    """These rows are an old copy, and what was spent since is not in them. Nothing is charged
    before somebody states it."""

    evidence: Digest
    """The manifest of the backup that was restored, or a head that this site signed, or that its
    machine's register knows, and these rows do not contain."""


class StatedRound(Value, frozen=True):
    """A round that somebody states to have been charged, or that may have been."""

    job: str
    plan: Digest
    round: int
    event: DpEvent | None


class Stated(Value, frozen=True, tag_field="row", tag="stated"):
    """What was spent besides the rows before, as the site's administrator states it. No earlier
    round continues: in each, a delta may have left that this site no longer has."""

    rounds: tuple[StatedRound, ...]
    everything: bool
    """Whether nobody knows what was spent: epsilon is infinite from then on."""
    at: Annotated[str, msgspec.Meta(max_length=40)]
    """When, UTC, ISO 8601, by this machine's clock."""
    by: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    why: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


Change = Opened | Carried | Reserved | Computed | Sent | Restored | Stated


class Row(Value, frozen=True):
    """One link of the chain."""

    previous: Digest
    salt: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    change: Change

    def head(self) -> bytes:
        """Head of the chain that ends with this row, 32 bytes."""
        return digest("LedgerRow", encode(self))


class _OpenedFirst(Value, frozen=True, tag_field="row", tag="opened"):
    """Row 0 of a ledger that was created under schema version 1, which had no units."""

    data_set: Digest
    schema: Literal[1] = 1


class _FirstRow(Value, frozen=True):
    previous: Digest
    salt: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    change: _OpenedFirst


@dataclass
class Contents:
    """What follows from the rows of a ledger, taken one by one."""

    data_set: bytes = b""
    """Digest of the data set that the ledger is about now, 32 bytes."""
    unit: str | None = None
    heads: list[bytes] = field(default_factory=list)
    """Head of the chain after each row."""
    rounds: dict[tuple[str, int], Reservation] = field(default_factory=dict)
    """Each round by job and number, in the order of their reservations."""
    answers: int = 0
    """How many answers the session journal had recorded when this site last sent one."""
    schema: int = 0
    """Schema version of the file that the rows were read from; 0 before any was read."""
    old_copy: bool = False
    """Whether these rows are an old copy, and nobody has stated yet what was spent since."""
    unknown: bool = False
    """Whether it was stated that nobody knows what was spent."""
    statements: list[Stated] = field(default_factory=list)

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
            case _:
                _require(not self.old_copy, "an old copy is charged before its spend is stated")
                _apply(self.rounds, row.change)
        self.heads.append(row.head())

    def events(self) -> list[DpEvent | None]:
        """The DP event of every charge, for the accountant."""
        unknown = [None] if self.unknown else []
        return [*(entry.event for entry in self.rounds.values()), *unknown]

    def _follow_statement(self, stated: Stated) -> None:
        for added in stated.rounds:
            _require((added.job, added.round) not in self.rounds, "a round is stated twice")
            self.rounds[added.job, added.round] = Reservation(
                added.job, added.plan, added.round, added.event
            )
        for key, known in self.rounds.items():
            self.rounds[key] = msgspec.structs.replace(
                known, state=RoundState.LOST, delta_digest=LOST
            )
        self.old_copy = False
        self.unknown |= stated.everything
        self.statements.append(stated)


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
