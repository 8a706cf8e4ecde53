"""When each site's relay spoke last, and whether two relays speak with one identity.

A relay opens new connections before it takes its place (`ACTIVATE`). So a relay that still asks for
messages over a connection from before that moment is another one: somebody copied a
site's folder, and two trainers with a ledger each may train on the same records.
"""

import logging
import math
import time
from dataclasses import dataclass

from umbel_server.messaging.carrier import Contact
from umbel_server.port.reply_filter import ACTIVATE, PULL

_CERTAIN = 3
"""Late requests from which there are two relays: one may have been on the line when the first relay
was killed."""
_AT_ONCE_SECONDS = 30.0
"""Time without a request of the relay that took its place last, after which it counts as gone, and
the other one as the only one. A relay that waits asks more often than that."""
_TOLD_SECONDS = 60.0

_logger = logging.getLogger("umbel.port")


@dataclass
class _Seen:
    last: float = 0.0
    """Seconds since 1970."""
    place: str = ""
    """From where the relay took its place."""
    opened: float = -math.inf
    """When the connection was opened over which it did."""
    heard: float = -math.inf
    """When it asked last, over such a connection or a newer one."""
    late: int = 0
    twice: float | None = None
    places: tuple[str, ...] = ()
    told: float = -math.inf


class Contacts:
    """What is seen of each site's relay; its methods may be called from any thread."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def heard(self, site: str, path: str, opened: float, place: str) -> None:
        """Takes note of a request that passed the gate.

        Args:
            opened: when its connection was opened; on one clock for all connections.
            place: the address at its other end.
        """
        seen = self._seen.setdefault(site, _Seen())
        seen.last = time.time()
        if path == ACTIVATE:
            seen.opened, seen.place, seen.late = opened, place, 0
        now = time.monotonic()
        if opened >= seen.opened:
            seen.heard = now
        elif path == PULL and now - seen.heard < _AT_ONCE_SECONDS:
            seen.late += 1
            if seen.late >= _CERTAIN:
                self._tell(site, seen, tuple(sorted({place, seen.place})))

    def read(self) -> dict[str, Contact]:
        """Returns what is known of each site that has spoken."""
        return {
            site: Contact(last=seen.last, twice=seen.twice, places=seen.places)
            for site, seen in list(self._seen.items())
        }

    def _tell(self, site: str, seen: _Seen, places: tuple[str, ...]) -> None:
        seen.twice, seen.places = seen.last, places
        now = time.monotonic()
        if now - seen.told >= _TOLD_SECONDS:
            seen.told = now
            _logger.warning(
                "%s is connected twice, from %s: two clients have its keys. Let its people stop one"
                " of them, and find out which ledger is the data's",
                site,
                " and ".join(places),
            )
