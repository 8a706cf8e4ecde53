"""Receives what happens at a site: its log, its live view and its tests implement this."""

from typing import Protocol

from umbel_common.errors import UmbelError


class Observer(Protocol):
    """Stays at the site, and so may receive private detail that no server receives."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Work before training, such as filling the cache of the frozen layers."""
        ...

    def charged(self, round_number: int, epsilon: float | None) -> None:
        """The ledger has reserved a round; `epsilon` is what all jobs together have spent on this
        data set by now (None without differential privacy)."""
        ...

    def step(self, round_number: int, step: int, steps: int, records: float) -> None:
        """`step` of the round's `steps` local steps are done, each on `records` records or units by
        expectation."""
        ...

    def refused(self, error: UmbelError) -> None:
        """A request was refused, with everything that the site's people should know."""
        ...
