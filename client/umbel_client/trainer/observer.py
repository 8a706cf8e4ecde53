"""Receives what happens at a site: its log, its live view and its tests implement this."""

from pathlib import Path
from typing import Protocol

from umbel_client.site.ipc import SharedEpsilon
from umbel_common.errors import UmbelError


class Observer(Protocol):
    """Stays at the site, and so may receive private detail that no server receives."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Work before training, such as filling the cache of the frozen layers."""
        ...

    def charged(
        self,
        round_number: int,
        epsilon: float | None,
        *,
        again: bool,
        shared: SharedEpsilon | None = None,
    ) -> None:
        """The ledger has reserved a round, or an attempt of distributed mode; `epsilon` is what all
        jobs together have spent on this data set by now, against everybody (None without
        differential privacy).

        Args:
            again: whether it was reserved before, so that nothing is charged now.
            shared: the second total; None: nothing was charged in distributed mode.
        """
        ...

    def step(self, round_number: int, step: int, steps: int, records: float) -> None:
        """`step` of the round's `steps` local steps are done, each on `records` records or units by
        expectation."""
        ...

    def finished(self, job: str, adapter: Path) -> None:
        """A job has ended here, and its adapter is in this folder."""
        ...

    def refused(self, error: UmbelError) -> None:
        """A request was refused, with everything that the site's people should know."""
        ...
