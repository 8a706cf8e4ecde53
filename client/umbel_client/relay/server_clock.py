"""The server's time, at a site whose own clock may be wrong."""

import logging
import math
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx

TOLERATED_SKEW = timedelta(seconds=3)
"""Largest difference that is ignored: Flower accepts a signature up to five seconds ahead."""
LARGEST_SKEW = timedelta(days=366)
"""Largest difference that is believed: with a clock that is wronger than this, TLS would have
refused the certificates already. So no date of a server's leads out of the calendar."""
_QUIET_SECONDS = 60.0
"""Time between two warnings: a server may send another date with each answer."""

_logger = logging.getLogger("umbel.relay")


class ServerClock:
    """The server's time, taken from its answers: this site's clock may be wrong by minutes, and
    Flower refuses signatures and replies from another time."""

    def __init__(self) -> None:
        self.offset = timedelta()
        self._warned = -math.inf

    def now(self) -> datetime:
        """The server's time, in UTC, to a second or so."""
        return datetime.now(UTC) + self.offset

    def here(self) -> datetime:
        """This machine's time, in UTC, for `learn`."""
        return datetime.now(UTC)

    def learn(self, response: httpx.Response, asked: datetime) -> None:
        """Takes the server's time from the date of an answer, if it has one that can be true.

        The server wrote the date at some time between the question and now, which may be long for a
        question that waited.

        Args:
            asked: when the question was sent (`here`).
        """
        try:
            date = parsedate_to_datetime(response.headers["date"])
            earliest, latest = date - datetime.now(UTC), date - asked
        except (KeyError, ValueError, TypeError, OverflowError, IndexError):
            return
        if max(abs(earliest), abs(latest)) > LARGEST_SKEW:
            self._warn("the server's date is not believed: it differs by %s", earliest)
        elif not earliest - TOLERATED_SKEW <= self.offset <= latest + TOLERATED_SKEW:
            # Our server writes it when it gets the question.
            self._warn("this machine's clock and the server's differ by %s", latest)
            self.offset = latest

    def _warn(self, text: str, offset: timedelta) -> None:
        if time.monotonic() - self._warned > _QUIET_SECONDS:
            self._warned = time.monotonic()
            _logger.warning(text, offset)
