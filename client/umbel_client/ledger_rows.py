"""The rows of a privacy ledger: what they say, how they are chained, where they lead."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from umbel_client.accounting import Event
from umbel_common.canonical import Digest, Value, decode_canonical, digest, encode

SCHEMA_VERSION = 2
GENESIS = bytes(32)


class State(StrEnum):
    """How far one (job, round) has come."""

    RESERVED = "reserved"
    COMPUTED = "computed"
    SENT = "sent"


class Reservation(Value, frozen=True):
    """One (job, round) of the ledger."""

    job: str
    plan: Digest
    round: int
    event: Event | None
    """None: released without differential privacy; epsilon is infinite from then on."""
    state: State = State.RESERVED
    delta_digest: Digest | None = None
    """Of the noisy delta; None while RESERVED."""


class Opened(Value, frozen=True, tag_field="row", tag="opened"):
    """Row 0: what the ledger is about."""

    data_set: Digest
    unit: str | None
    """The column that says whose a record is; None: each record is its own unit. It stays: what was
    charged by one unit says nothing about another."""
    schema: Literal[2] = 2


class Carried(Value, frozen=True, tag_field="row", tag="carried"):
    """The data set changed, and stays charged with all that came before."""

    data_set: Digest


class Reserved(Value, frozen=True, tag_field="row", tag="reserved"):
    """A round was charged."""

    job: str
    plan: Digest
    round: int
    event: Event | None


class Computed(Value, frozen=True, tag_field="row", tag="computed"):
    """The one noisy delta that may leave under a reservation."""

    job: str
    round: int
    delta_digest: Digest


class Sent(Value, frozen=True, tag_field="row", tag="sent"):
    """The delta left."""

    job: str
    round: int


class Row(Value, frozen=True):
    """One link of the chain."""

    previous: Digest
    salt: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    change: Opened | Carried | Reserved | Computed | Sent

    def head(self) -> bytes:
        """Head of the chain that ends with this row."""
        return digest("LedgerRow", encode(self))


@dataclass
class Contents:
    """Where the rows of a ledger lead, followed one by one."""

    data_set: bytes = b""
    """Digest of the data set that the ledger is about now, 32 bytes."""
    unit: str | None = None
    heads: list[bytes] = field(default_factory=list)
    """Head of the chain after each row."""
    rounds: dict[tuple[str, int], Reservation] = field(default_factory=dict)
    """By job and round, in the order in which they were reserved."""
    answers: int = 0
    """How many the session journal had recorded when this site last let one out."""

    def head(self) -> bytes:
        """Head of the chain, 32 bytes."""
        return self.heads[-1] if self.heads else GENESIS

    def read(self, position: int, entry: bytes, head: bytes) -> None:
        """Follows a row that was stored.

        Raises:
            ValueError: it breaks a law of the chain.
            RemoteProtocolError: it is no row.
        """
        row = decode_canonical(entry, Row)
        _require(position == len(self.heads), "its position is out of order")
        _require(row.previous == self.head(), "it does not follow the row before")
        _require(row.head() == head, "its head differs")
        self.follow(row)

    def follow(self, row: Row) -> None:
        """Follows one change; a `ValueError` says which law it breaks."""
        first = not self.heads
        _require(isinstance(row.change, Opened) == first, "a ledger is opened once, and first")
        match row.change:
            case Opened():
                self.data_set, self.unit = row.change.data_set, row.change.unit
            case Carried():
                self.data_set = row.change.data_set
            case _:
                _apply(self.rounds, row.change)
        self.heads.append(row.head())


def _apply(rounds: dict[tuple[str, int], Reservation], change: Reserved | Computed | Sent) -> None:
    """Follows one change of state; a `ValueError` says which law it breaks."""
    key = (change.job, change.round)
    known = rounds.get(key)
    match change:
        case Reserved():
            _require(known is None, "a round is reserved twice")
            rounds[key] = Reservation(change.job, change.plan, change.round, change.event)
        case Computed() if known is not None and known.state is State.RESERVED:
            rounds[key] = msgspec.structs.replace(
                known, state=State.COMPUTED, delta_digest=change.delta_digest
            )
        case Sent() if known is not None and known.state is State.COMPUTED:
            rounds[key] = msgspec.structs.replace(known, state=State.SENT)
        case _:
            raise ValueError("a round skips a state")


def _require(condition: bool, what: str) -> None:
    """A law of the chain; a `ValueError` names the one that is broken."""
    if not condition:
        raise ValueError(what)
