"""The one port that sites reach: TLS 1.3, client certificates, and only what a relay needs.

No step may ever be dropped or moved below Flower, and no path may be added that registers a node,
starts a run or delivers code. `Gate` takes these steps before Flower sees a request, in this order;
a comment marks each, and the number is the HTTP status of its refusal:

1. The method is POST, and the path is one of seven of Flower's Fleet interface: 404.
2. No header stands twice, of which the gate would read one and Flower another: 400.
3. The request announces its size, also not by `Transfer-Encoding`, and is not larger than its path
   needs: 413.
4. The connection was opened with a certificate of an admitted relay, which is still valid: 403.
5. The key that Flower's own headers name is the key of that certificate: 403.
6. Few requests of one key are under way, in all and in each second: 503, or they wait. A new one
   may end the slowest.
7. The body comes within its time, and is not larger than it was announced: the connection ends.

`listener` has what comes before a request, `reply_filter` what is judged once Flower has verified
who speaks. Nothing here may wait for a file or a database: everybody would wait.
"""

import asyncio
import base64
import binascii
import gc
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TypeVar

from anyio.to_thread import current_default_thread_limiter
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umbel_host.transport.pieces import FLOWER_PIECE_BYTES
from umbel_server.port.listener import CONNECTION, Connection, Peer
from umbel_server.port.reply_filter import ACTIVATE, HEARTBEAT, PULL, PUSH, PUSH_OBJECT

_SMALL_BODY = 1 << 12
_BODIES = {
    ACTIVATE: _SMALL_BODY,
    "/v1/fleet/deactivate-node": _SMALL_BODY,
    HEARTBEAT: _SMALL_BODY,
    PULL: _SMALL_BODY,
    "/v1/fleet/pull-object": _SMALL_BODY,
    # A small reply, or twice the names of all pieces of the largest, 2 GiB.
    PUSH: 1 << 16,
    # A piece of a message with its envelope.
    PUSH_OBJECT: FLOWER_PIECE_BYTES + (1 << 16),
}
"""Path -> bytes of the largest body."""
PATHS = frozenset(_BODIES)
"""The paths that a relay needs. None of them registers a node, starts a run or delivers code."""
_KEY_HEADER = b"flwr-public-key"
_LARGE = 1 << 18
"""Bytes of a request and its answer from which memory is freed at once."""
_SENT_AT_ONCE = 1 << 18
_AT_ONCE = 3
"""Requests of one key that are read, worked on or answered at once. A relay has two: a message's
and a heartbeat."""
_PER_SECOND, _BURST = 40.0, 80.0
"""Requests of one key, a piece of a message counted twice; what is more waits. Each costs this
process time that other sites do not get."""
_WAITING = 8
"""Requests of one key that wait for that."""
_THREADS = 8
"""Threads for Flower's handlers. They take turns at its database, and each keeps connections to it
with megabytes of cache."""
_TOLD_SECONDS = 60.0
_REQUEST_SECONDS = 600.0
"""Time for a body to come, and for an answer to be taken: a piece over a very slow line."""


T = TypeVar("T")


class _UnderWay:
    """The requests of one key."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(_AT_ONCE)
        self.waiting = 0
        self._earned = 0.0
        self.moving: dict[Connection, None] = {}
        """Those whose body or answer is on the line, the oldest first."""

    def delay(self, now: float, size: int) -> float:
        """How many seconds a request must wait at a time."""
        cost = (1 + size / FLOWER_PIECE_BYTES) / _PER_SECOND
        self._earned = max(self._earned, now - _BURST / _PER_SECOND) + cost
        return max(self._earned - now, 0.0)


class Gate:
    """The ASGI application in front of Flower's."""

    def __init__(
        self,
        fleet: ASGIApp,
        read_admitted: Callable[[], Mapping[str, str]],
        on_refused: Callable[[str], None],
        on_heard: Callable[[str, str, float, str], None] = lambda *_: None,
    ) -> None:
        """Args:
        fleet: Flower's application.
        read_admitted: returns relay public key (PEM) -> site, for the relays that may connect now.
        on_refused: called with a few words about a relay that was turned away, now and then.
        on_heard: called with the site, the path, when the connection was opened and the address at
            its other end, for each request that passes.
        """
        self._fleet = fleet
        self._read_admitted = read_admitted
        self._on_refused = on_refused
        self._on_heard = on_heard
        self._told: dict[str, float] = {}
        self._under_way: dict[str, _UnderWay] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "lifespan":
            current_default_thread_limiter().total_tokens = _THREADS
            await self._fleet(scope, receive, send)
            return
        status = self._judge(scope)
        if status is None:
            status = await self._pass(scope, receive, send)
        if status is not None:
            # The answer is empty: a stranger need not learn which paths exist.
            await PlainTextResponse("", status_code=status)(scope, receive, send)
            _connection(scope).linger()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> int | None:
        """Steps 6 and 7, and then Flower; returns the HTTP status of a refusal."""
        connection = _connection(scope)
        assert connection.peer is not None  # step 4
        under_way = self._under_way.setdefault(connection.peer.key, _UnderWay())
        # 6
        if under_way.waiting >= _WAITING:
            return 503
        if under_way.turns.locked() and under_way.moving:
            # A line that was cut leaves requests behind that nobody will ever finish.
            oldest = next(iter(under_way.moving))
            del under_way.moving[oldest]
            oldest.abort()
        under_way.waiting += 1
        try:
            await under_way.turns.acquire()
        finally:
            under_way.waiting -= 1
        moved = int(dict(scope["headers"])[b"content-length"])
        try:
            await asyncio.sleep(under_way.delay(connection.loop.time(), moved))
            under_way.moving[connection] = None
            # 7
            body = await _body(receive, moved, connection)
            under_way.moving.pop(connection, None)
            if body is not None:
                unread = [body]
                del body

                async def repeated() -> Message:
                    if unread:
                        return {"type": "http.request", "body": unread.pop()}
                    return await receive()

                async def counted(message: Message) -> None:
                    nonlocal moved
                    moved += len(message.get("body", b""))
                    under_way.moving[connection] = None
                    for part in _parts(message):
                        await _within(send(part), connection)

                await self._fleet(scope, repeated, counted)
                await _within(connection.drained(), connection)
        finally:
            under_way.moving.pop(connection, None)
            under_way.turns.release()
        if moved > _LARGE:
            # The web framework's objects for a request refer to each other in a cycle, and hold the
            # megabytes that it moved: Python would free them only after hundreds of requests.
            gc.collect()
        return None

    def _judge(self, scope: Scope) -> int | None:
        """Returns the HTTP status of a refusal; None if the request may pass."""
        # 1
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            return 404
        # 2
        headers = dict(scope["headers"])
        if len(headers) != len(scope["headers"]):
            return 400
        # 3
        length = headers.get(b"content-length", b"")
        if (
            b"transfer-encoding" in headers
            or not length.isdigit()
            or int(length) > _BODIES[scope["path"]]
        ):
            return 413
        # 4
        connection = _connection(scope)
        peer = connection.peer
        site = self._read_admitted().get(peer.key) if peer and peer.is_valid() else None
        if peer is None or site is None:
            self._tell(_who(peer))
            return 403
        # 5
        if _claimed_key(headers.get(_KEY_HEADER, b"")) != peer.key:
            self._tell(f"{site} speaks with another key than its certificate's")
            return 403
        self._on_heard(site, scope["path"], connection.opened, connection.place())
        # Flower's authentication judges a URL that begins with this header.
        scope["headers"] = [one for one in scope["headers"] if one[0] != b"host"]
        return None

    def _tell(self, reason: str) -> None:
        """Tells people, but does not let a stranger fill their log."""
        now = time.monotonic()
        if now - self._told.get(reason, -math.inf) >= _TOLD_SECONDS:
            self._told[reason] = now
            self._on_refused(reason)


def _who(peer: Peer | None) -> str:
    """A relay that is not admitted, by the name in the certificate that the authority gave it."""
    if peer is None:
        return "a connection without a certificate"
    if not peer.is_valid():
        return f"the relay of {peer.site}: its certificate has expired (umbel-server sites renew)"
    return f"the relay of {peer.site}, which is revoked, not admitted, or has another key by now"


def _connection(scope: Scope) -> Connection:
    connection: Connection = scope[CONNECTION]
    return connection


def _parts(message: Message) -> Iterator[Message]:
    """Cuts what is sent, so that no more of it waits in the connection than the other side takes:
    the web server lets every single part in."""
    body = message.get("body", b"")
    for start in range(0, len(body) - _SENT_AT_ONCE, _SENT_AT_ONCE):
        yield {
            "type": message["type"],
            "body": body[start : start + _SENT_AT_ONCE],
            "more_body": True,
        }
    rest = len(body) % _SENT_AT_ONCE or min(len(body), _SENT_AT_ONCE)
    yield {**message, "body": body[len(body) - rest :]} if body else message


async def _body(receive: Receive, length: int, connection: Connection) -> bytes | None:
    """Step 7: returns a body; None if it did not come, and its connection has ended."""
    # Not a list of parts: each may be a byte, and would take fifty.
    come = bytearray()

    async def read() -> bool:
        more = True
        while more:
            message = await receive()
            come.extend(message.get("body", b""))
            if message["type"] == "http.disconnect" or len(come) > length:
                return False
            more = message.get("more_body", False)
        return True

    if await _within(read(), connection):
        return bytes(come)
    connection.abort()
    while (await receive())["type"] != "http.disconnect":
        pass
    return None


async def _within(work: Awaitable[T], connection: Connection) -> T | None:
    """Waits for what the other side must do; ends the connection if that takes too long."""
    try:
        async with asyncio.timeout(_REQUEST_SECONDS):
            return await work
    except TimeoutError:
        connection.abort()
        return None


def _claimed_key(header: bytes) -> str | None:
    try:
        return base64.b64decode(header, validate=True).decode("ascii")
    except (binascii.Error, UnicodeDecodeError):
        return None
