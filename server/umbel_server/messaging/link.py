"""How a job reaches its sites: sealed requests out, sealed replies in."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Step:
    """Where in a job a message belongs; public, and never trusted."""

    stage: str
    """offer, train, share, mask, confirm, unmask or finish."""
    round: int = 0
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.round}.{self.attempt}.{self.stage}"


class JobStopped(Exception):
    """The operator wants the job stopped, or the process ends: what was released stays, and the job
    can be resumed."""


class Link(Protocol):
    """Carries sealed bytes to sites and back; what it is made of, the job does not know."""

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """Sends each site its request; yields (site, reply) as replies come, until all came or
        `seconds` passed. A site that cannot be reached yields nothing.

        A message may be as large as an adapter: each of `requests` is made as it is asked for and
        should be let go once it is sent, and replies are to be read one at a time.
        """
        ...
