"""The server's time, at a site whose own clock may be wrong."""

import logging
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx

TOLERATED_SKEW = timedelta(seconds=3)
"""Largest difference that is ignored: Flower accepts a signature up to five seconds ahead."""

_logger = logging.getLogger("umbel.relay")


class ServerClock:
    """The server's time, taken from its answers: this site's clock may be wrong by minutes, and
    Flower refuses signatures and replies from another time."""

    def __init__(self) -> None:
        self.offset = timedelta()

    def now(self) -> datetime:
        """The server's time, in UTC, to a second or so."""
        return datetime.now(UTC) + self.offset

    def learn(self, response: httpx.Response) -> None:
        """Takes the server's time from the date of an answer, if it has one."""
        try:
            offset = parsedate_to_datetime(response.headers["date"]) - datetime.now(UTC)
        except (KeyError, ValueError, TypeError):
            return
        if abs(offset - self.offset) > TOLERATED_SKEW:
            _logger.warning("this machine's clock and the server's differ by %s", offset)
            self.offset = offset
