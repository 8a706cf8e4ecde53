"""A job's requests to its sites: sealed before they are sent; replies opened as they come.

Nothing may be sent to a site that is not sealed here, and no reply counts that does not open here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from umbel_common.errors import RemoteProtocolError
from umbel_common.protocol.wire import (
    Refusal,
    Reply,
    Request,
    open_reply,
    request_digest,
    seal_request,
    size_limit,
)
from umbel_common.trust.identity import Identity, Roster
from umbel_server.jobs.interfaces import Observer
from umbel_server.messaging.link import Link, Step
from umbel_server.operator.config import Limits

WRONG_VERSION = "wire-version"
_VECTOR_STAGE = "mask"
"""The only stage whose replies grow with the plan; the others have room for what grows with the
sites."""


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
        largest_reply: the plan's limit in bytes, for the stage in which sites send a vector. A
            longer reply, or one of more than `size_limit(None)` in any other stage, is not opened.
        """
        self._link = link
        self._operator = operator
        self._roster = roster
        self._observer = observer
        self._limits = limits
        self._largest_reply = largest_reply

    def ask(self, step: Step, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply]]:
        """Seals and sends the requests, and opens the replies, one message at a time.

        A reply that does not open is ignored: another party made it, or it answers another request.
        A reply of another wire version cannot be opened either, but counts as a refusal: no other
        will come.
        """
        asked: dict[str, tuple[int, bytes]] = {}

        def sealed() -> Iterator[tuple[str, bytes]]:
            for site, request in requests.items():
                data = seal_request(self._operator, site, request)
                asked[site] = len(data), request_digest(data)
                yield site, data
                # Frees the request before the next one is sealed.
                del data

        largest = self._largest_reply if step.stage == _VECTOR_STAGE else size_limit(None)
        step = replace(step, largest_reply=largest)
        self._observer.on_asked(step, tuple(requests))
        for site, data in self._link.exchange(step, sealed(), self._limits.seconds(step.stage)):
            if site not in asked:
                continue
            received, request = asked[site]
            key = self._roster.member(site).public_key
            try:
                reply = open_reply(key, site, data, request, limit=largest)
            except RemoteProtocolError as error:
                self._observer.on_strayed(step, site, error)
                if error.check == WRONG_VERSION:
                    yield site, Refusal(check=error.check)
                continue
            self._observer.on_answered(step, site, reply, received, len(data))
            # Frees the reply while its content is processed, and while the next one is read.
            del data
            yield site, reply
            del reply
