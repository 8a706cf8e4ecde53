"""The rows of a privacy ledger: what they say, and how they are chained.

What this module must keep, whatever is changed in it: rows that were written are read for ever, and
their heads were signed and published. So no field of a row is added, renamed or removed, and no tag
changes; a new kind of row takes a new schema version (`umbel_client.ledger.file`).
"""

from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

import msgspec

from umbel_client.privacy.accounting import DpEvent
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_common.canonical import Digest, Value, digest, encode

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


class AttemptKey(NamedTuple):
    """Which attempt of distributed mode: each has a batch and noise of its own."""

    job: str
    round: int
    attempt: int

    def __str__(self) -> str:
        return f"attempt {self.attempt} at round {self.round} of job {self.job}"


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


class Attempt(Value, frozen=True):
    """One attempt of distributed mode in the ledger."""

    job: str
    plan: Digest
    round: int
    attempt: int
    cost: AttemptCost
    state: RoundState = RoundState.RESERVED
    vector: Digest | None = None
    """Digest of the noisy integer vector that may leave; None while RESERVED."""

    @property
    def key(self) -> AttemptKey:
        """Which attempt it is."""
        return AttemptKey(self.job, self.round, self.attempt)


class Opened(Value, frozen=True, tag_field="row", tag="opened"):
    """Row 0: which data set the ledger is about."""

    data_set: Digest
    unit: str | None
    """The column that says whose a record is; None: each record is its own unit. It never changes:
    what was charged by one unit says nothing about another."""
    schema: Literal[2, 3, 4] = 4
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


class AttemptReserved(Value, frozen=True, tag_field="row", tag="attempt-reserved"):
    """An attempt of distributed mode was charged."""

    job: str
    plan: Digest
    round: Annotated[int, msgspec.Meta(ge=1)]
    attempt: Annotated[int, msgspec.Meta(ge=1)]
    cost: AttemptCost


class AttemptComputed(Value, frozen=True, tag_field="row", tag="attempt-computed"):
    """The one noisy integer vector that may leave in an attempt."""

    job: str
    round: int
    attempt: int
    vector: Digest


class AttemptSent(Value, frozen=True, tag_field="row", tag="attempt-sent"):
    """The vector is about to leave, or has left."""

    job: str
    round: int
    attempt: int


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


class StatedAttempts(Value, frozen=True):
    """Attempts that somebody states to have been charged, or that may have been."""

    job: str
    plan: Digest
    round: int
    """The last round that this site was asked for: no attempt at it, or at one before, follows."""
    attempts: Annotated[int, msgspec.Meta(ge=0)]
    """How many attempts there were besides those in the rows before."""
    cost: AttemptCost


class StatedWithAttempts(
    Stated, frozen=True, kw_only=True, tag_field="row", tag="stated-with-attempts"
):
    """A statement that counts attempts of distributed mode too."""

    attempts: tuple[StatedAttempts, ...]


AttemptChange = AttemptReserved | AttemptComputed | AttemptSent
Change = (
    Opened
    | Carried
    | Reserved
    | Computed
    | Sent
    | AttemptReserved
    | AttemptComputed
    | AttemptSent
    | Restored
    | Stated
    | StatedWithAttempts
)
Charge = Reservation | Attempt | StatedAttempts
"""What was charged: a round of local mode, an attempt of distributed mode, or attempts that
somebody stated."""


class Row(Value, frozen=True):
    """One link of the chain."""

    previous: Digest
    salt: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    change: Change

    def head(self) -> bytes:
        """Head of the chain that ends with this row, 32 bytes."""
        return digest("LedgerRow", encode(self))
