"""What happens during a run, as values: the live view draws them and `metrics.jsonl` keeps them."""

from typing import TypeAlias

import msgspec

from umbel_simulations.reporting.results import Score


class RunEvent(msgspec.Struct, frozen=True, tag_field="event", kw_only=True):
    """Base; `seconds` since the run began."""

    seconds: float


class Started(RunEvent, frozen=True, tag="started"):
    """The federation is set up."""

    name: str
    sites: dict[str, int]
    """Records of each site."""
    rounds: int
    steps: int
    """Optimiser steps of each site over the whole job."""


class Preparing(RunEvent, frozen=True, tag="preparing"):
    """Work before the first round, such as filling the caches of frozen layers."""

    what: str
    site: str | None
    done: int
    total: int


class SiteStep(RunEvent, frozen=True, tag="site-step"):
    """A site finished a local step."""

    site: str
    round: int
    step: int
    """Steps done, from 1, within the round."""
    steps: int


class SiteStage(RunEvent, frozen=True, tag="site-stage"):
    """A site answered a request, or refused it."""

    site: str
    round: int
    attempt: int
    stage: str
    """train, share, mask, confirm, unmask or finish."""
    refusal: str | None
    sent_bytes: int
    """Left the site, sealed message as a whole."""
    masked_bytes: int
    """Of these, masked vector."""
    clear_bytes: int
    """Of these, in a message that is not known to hold nothing but keys, shares, signatures, codes
    and masked vectors."""
    received_bytes: int


class RoundReleased(RunEvent, frozen=True, tag="round-released"):
    """A new global adapter."""

    round: int
    attempt: int
    survivors: list[str]
    epsilon: dict[str, float | None]
    """Epsilon spent by each site so far; null without differential privacy."""
    score: Score
    """The adapter on the held-out public set."""


class AttemptAborted(RunEvent, frozen=True, tag="attempt-aborted"):
    """Nothing was released; the round is tried again or the job fails."""

    round: int
    attempt: int
    check: str


class SharesDisputed(RunEvent, frozen=True, tag="shares-disputed"):
    """Of these pairs one of the two sites lied about a share; the sum is right all the same."""

    round: int
    attempt: int
    pairs: list[tuple[str, str]]
    """(Whose secret it is a share of, who revealed it.)"""


class BaselineStep(RunEvent, frozen=True, tag="baseline-step"):
    """Progress of a comparison."""

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
    | BaselineStep
)
