"""What happens at the trainer, as lines of its log and as events for `umbel-client watch`."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from umbel_client.site.ipc import SharedEpsilon, SiteEvent
from umbel_common.errors import UmbelError

_MOST_PENDING = 1000
"""Most events kept for a watcher that does not read; beyond them it loses the oldest."""
_SECONDS_BETWEEN_LOOKS = 0.5


class Stopped(BaseException):
    """Unwinds a training under way. It is not an `Exception`, which would be sent as a refusal."""


class SiteLog:
    """The trainer's observer in a daemon; its methods may be called from any thread."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._watchers: list[queue.Queue[SiteEvent]] = []
        self._stopped = threading.Event()
        self.last: SiteEvent | None = None
        self._began = time.monotonic()
        self.epsilon: float | None = None
        """Epsilon spent on the data set, against everybody, when a round was last charged."""
        self.shared: SharedEpsilon | None = None
        """The second total at that moment."""

    def stop(self) -> None:
        """Ends all watching, and the training under way at its next step."""
        self._stopped.set()

    def preparing(self, what: str, done: int, total: int) -> None:
        """See `Observer`."""
        self._tell("preparing", f"{what}: {done} of {total}", logging.DEBUG)

    def charged(
        self,
        round_number: int,
        epsilon: float | None,
        *,
        again: bool,
        shared: SharedEpsilon | None = None,
    ) -> None:
        """See `Observer`."""
        self.epsilon, self.shared = epsilon, shared
        self._began = time.monotonic()
        spent = "without differential privacy" if epsilon is None else f"epsilon {epsilon:.4g}"
        if shared is not None:
            spent = f"{spent} against everybody, and {shared.text()},"
        text = (
            f"round {round_number} was charged before, nothing is charged now: {spent} in all"
            if again
            else f"round {round_number} is charged: {spent} in all"
        )
        self._tell("charged", text, logging.INFO)

    def step(self, round_number: int, step: int, steps: int, records: float) -> None:
        """See `Observer`. The speed is the round's so far, for the expected size of a batch: the
        time of one step would tell the size of its batch.

        Raises:
            Stopped: the process is to end.
        """
        if self._stopped.is_set():
            raise Stopped
        speed = records * step / max(time.monotonic() - self._began, 1e-6)
        text = f"round {round_number}: step {step} of {steps}, about {speed:.3g} records/s"
        self._tell("step", text, logging.DEBUG)

    def finished(self, job: str, adapter: Path) -> None:
        """See `Observer`."""
        self._tell("finished", f"{job} is finished; its adapter is in {adapter}", logging.INFO)

    def refused(self, error: UmbelError) -> None:
        """See `Observer`. A refusal that repeats, as of a plan that waits for approval, is logged
        once."""
        text = error.diagnostics()
        with self._lock:
            again = self.last is not None and (self.last.kind, self.last.text) == ("refused", text)
        if not again:
            self._tell("refused", text, logging.WARNING)

    def note(self, text: str, level: int = logging.INFO) -> None:
        """Logs anything else that the site's people should know."""
        self._tell("note", text, level)

    def events(self, listening: Callable[[], bool]) -> Iterator[SiteEvent]:
        """Events from now on, while `listening`."""
        pending: queue.Queue[SiteEvent] = queue.Queue(_MOST_PENDING)
        with self._lock:
            self._watchers.append(pending)
        try:
            while listening() and not self._stopped.is_set():
                try:
                    yield pending.get(timeout=_SECONDS_BETWEEN_LOOKS)
                except queue.Empty:
                    continue
        finally:
            with self._lock:
                self._watchers.remove(pending)

    def _tell(self, kind: str, text: str, level: int) -> None:
        self._logger.log(level, text)
        event = SiteEvent(time.time(), kind, text)
        with self._lock:
            self.last = event
            for pending in self._watchers:
                if pending.full():
                    pending.get_nowait()
                pending.put_nowait(event)
