"""How a job reaches its sites: sealed requests out, sealed replies in.

What travels here is sealed: nothing here ever opens a seal, and a step is never believed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from umbel_common.protocol.wire import size_limit


@dataclass(frozen=True)
class Step:
    """The step of a job that a message belongs to: public, and never trusted."""

    stage: str
    """One of offer, prepare, fill, train, share, mask, confirm, unmask and finish."""
    round: int = 0
    attempt: int = 0
    largest_reply: int = field(default=size_limit(None), compare=False)
    """Bytes. Nothing of a larger reply is kept on its way, and no more than this, and one byte,
    comes into the memory of the process that asked."""

    def __str__(self) -> str:
        return f"{self.round}.{self.attempt}.{self.stage}"


class JobStopped(Exception):
    """The operator stops the job, or the process ends: the releases stay, and the job can be
    resumed."""


class Link(Protocol):
    """Carries sealed bytes to sites and back; the job does not know how."""

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """Sends each site its request; yields (site, reply) as replies come, until all have come or
        `seconds` have passed. A site that cannot be reached yields nothing.

        If a reply is larger than `step.largest_reply`, at most its beginning is yielded, which does
        not open.

        A message may be as large as an adapter: each of `requests` is made when it is asked for and
        should be freed once it is sent, and replies should be read one at a time.
        """
        ...
