"""What a job asks its sites, sealed and opened, over whatever carries it."""

from collections.abc import Iterator, Mapping

from umbel_common.errors import RemoteProtocolError
from umbel_common.protocol.wire import (
    Refusal,
    Reply,
    Request,
    open_reply,
    request_digest,
    seal_request,
)
from umbel_common.trust.identity import Identity, Roster
from umbel_server.jobs.interfaces import Observer
from umbel_server.messaging.link import Link, Step
from umbel_server.operator.config import Limits

WRONG_VERSION = "wire-version"


class Exchange:
    """One job's requests to its sites, and their replies."""

    def __init__(
        self,
        link: Link,
        operator: Identity,
        roster: Roster,
        *,
        observer: Observer,
        limits: Limits,
        largest_reply: int,
    ) -> None:
        """Args:
        largest_reply: in bytes; a longer one is not opened.
        """
        self._link = link
        self._operator = operator
        self._roster = roster
        self._observer = observer
        self._limits = limits
        self._largest_reply = largest_reply

    def ask(self, step: Step, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply]]:
        """Seals, sends, opens, one message at a time.

        A reply that does not open is no reply: it is of somebody else, or to another request. One
        of another wire version cannot be opened, and is as good as a refusal: nothing will come.
        """
        asked: dict[str, tuple[int, bytes]] = {}

        def sealed() -> Iterator[tuple[str, bytes]]:
            for site, request in requests.items():
                data = seal_request(self._operator, site, request)
                asked[site] = len(data), request_digest(data)
                yield site, data
                # No request is kept while the next one is sealed.
                del data

        for site, data in self._link.exchange(step, sealed(), self._limits.seconds(step.stage)):
            if site not in asked:
                continue
            received, request = asked[site]
            key = self._roster.member(site).public_key
            try:
                reply = open_reply(key, site, data, request, limit=self._largest_reply)
            except RemoteProtocolError as error:
                self._observer.strayed(step, site, error)
                if error.check == WRONG_VERSION:
                    yield site, Refusal(check=error.check)
                continue
            self._observer.answered(step, site, reply, received, len(data))
            # No reply is kept while it is worked on, or while the next one is read.
            del data
            yield site, reply
            del reply
