"""The events of a run, as values: the live view shows them and `metrics.jsonl` keeps them."""

from typing import TypeAlias

import msgspec

from umbel_simulations.reporting.results import Score


class RunEvent(msgspec.Struct, frozen=True, tag_field="event", kw_only=True):
    """Base of all events."""

    seconds: float
    """Time since the run began."""


class Started(RunEvent, frozen=True, tag="started"):
    """The federation is set up."""

    name: str
    sites: dict[str, int]
    """Number of records of each site."""
    rounds: int
    steps: int
    """Optimizer steps of each site over the whole job."""


class Preparing(RunEvent, frozen=True, tag="preparing"):
    """Progress of work before the first round, such as filling the caches of frozen layers."""

    what: str
    site: str | None
    done: int
    total: int


class SiteStep(RunEvent, frozen=True, tag="site-step"):
    """A site finished a local step."""

    site: str
    round: int
    step: int
    """Number of steps done in this round, from 1."""
    steps: int


class SiteStage(RunEvent, frozen=True, tag="site-stage"):
    """A site answered or refused a request."""

    site: str
    round: int
    attempt: int
    stage: str
    """offer, train, share, mask, confirm, unmask or finish."""
    refusal: str | None
    """The check that made the site refuse; None if it answered."""
    sent_bytes: int
    """Bytes that left the site: the whole sealed message."""
    masked_bytes: int
    """Bytes of the masked vector among them."""
    clear_bytes: int
    """Bytes among them in messages that may hold something other than keys, shares, signatures,
    codes and masked vectors."""
    received_bytes: int


class RoundReleased(RunEvent, frozen=True, tag="round-released"):
    """The server released a new global adapter."""

    round: int
    attempt: int
    survivors: list[str]
    epsilon: dict[str, float | None]
    """Epsilon that each site has spent so far, against anyone; null without differential
    privacy."""
    score: Score
    """Score of the adapter on the held-out public set."""
    shared: dict[str, float | None] = {}
    """Epsilon that each site has spent so far, against readers of the sums; empty or null unless
    sites share their noise."""


class AttemptAborted(RunEvent, frozen=True, tag="attempt-aborted"):
    """An attempt ended without a release; the round is tried again or the job fails."""

    round: int
    attempt: int
    check: str


class SharesDisputed(RunEvent, frozen=True, tag="shares-disputed"):
    """One site of each pair lied about a share. The sum is correct in spite of it."""

    round: int
    attempt: int
    pairs: list[tuple[str, str]]
    """(The site whose secret the share belongs to, the site that revealed the share.)"""


class SitesCounted(RunEvent, frozen=True, tag="sites-counted"):
    """The noisy sum of what the sites counted on records that they hold out."""

    round: int
    text: str


class Gated(RunEvent, frozen=True, tag="gated"):
    """The release gate was asked about a round's adapter."""

    round: int
    before: float | None
    """Mean loss of the adapter before, on the public records, in nats."""
    after: float | None
    passed: bool


class BaselineStep(RunEvent, frozen=True, tag="baseline-step"):
    """Progress of a comparison that is trained."""

    name: str
    done: int
    total: int


AnyEvent: TypeAlias = (
    Started
    | Preparing
    | SiteStep
    | SiteStage
    | RoundReleased
    | AttemptAborted
    | SharesDisputed
    | SitesCounted
    | Gated
    | BaselineStep
)
