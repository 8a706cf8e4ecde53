"""Who is told what happens at a site: its log, its live view, its tests."""

from typing import Protocol

from umbel_common.errors import UmbelError


class Observer(Protocol):
    """Never leaves the site; may be told private detail that a server never is."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Work before training, such as filling the cache of the frozen layers."""
        ...

    def charged(self, round_number: int, epsilon: float | None) -> None:
        """The ledger has reserved a round; `epsilon` is spent on this data set by now, all jobs
        together (None: without differential privacy)."""
        ...

    def step(self, round_number: int, step: int, steps: int) -> None:
        """`step` of the round's `steps` local steps are done."""
        ...

    def refused(self, error: UmbelError) -> None:
        """A request was refused, with everything that the site's people should know."""
        ...
