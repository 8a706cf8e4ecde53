"""The rows of a privacy ledger: what they say, how they are chained, where they lead."""

from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from umbel_client.accounting import Event
from umbel_common.canonical import Digest, Value, digest, encode

SCHEMA_VERSION = 1
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
    """Row 0: which data set the ledger is about."""

    data_set: Digest
    schema: Literal[1] = 1


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
    change: Opened | Reserved | Computed | Sent

    def head(self) -> bytes:
        """Head of the chain that ends with this row."""
        return digest("LedgerRow", encode(self))


def apply(rounds: dict[tuple[str, int], Reservation], change: Reserved | Computed | Sent) -> None:
    """Follows one change of state; a `ValueError` says which law it breaks."""
    key = (change.job, change.round)
    known = rounds.get(key)
    match change:
        case Reserved():
            require(known is None, "a round is reserved twice")
            rounds[key] = Reservation(change.job, change.plan, change.round, change.event)
        case Computed() if known is not None and known.state is State.RESERVED:
            rounds[key] = msgspec.structs.replace(
                known, state=State.COMPUTED, delta_digest=change.delta_digest
            )
        case Sent() if known is not None and known.state is State.COMPUTED:
            rounds[key] = msgspec.structs.replace(known, state=State.SENT)
        case _:
            raise ValueError("a round skips a state")


def require(condition: bool, what: str) -> None:
    """A law of the chain; a `ValueError` names the one that is broken."""
    if not condition:
        raise ValueError(what)
