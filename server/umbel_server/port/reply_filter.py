"""What is judged of a relay's request between Flower's authentication and Flower's handlers.

Nothing here ever opens a seal, and no check may be dropped or moved before the authentication:
until then, anybody with a certificate may have written the request in any site's name.
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from umbel_host.transport.pieces import FLOWER_FIELD, FLOWER_NAMES, FLOWER_RECORD
from umbel_server.port import flower_patches
from umbel_server.port.expected_replies import ExpectedReplies, Verdict

PULL = "/v1/fleet/pull-messages"
PUSH = "/v1/fleet/push-messages"
PUSH_OBJECT = "/v1/fleet/push-object"
ACTIVATE = "/v1/fleet/activate-node"
HEARTBEAT = "/v1/fleet/send-node-heartbeat"
_STATUS = {Verdict.REFUSED: 403, Verdict.OVER: 410}
_CONNECTIONS, _PER_SECONDS = 5, 10.0
"""How often a relay may connect. Each time costs the database some statements."""
_HOLD_SECONDS = 15.0
"""How long a relay's question for messages waits for one: shorter than proxies let a connection be
silent, and than a relay waits for an answer."""


class ReplyFilter:
    """An ASGI application in front of Flower's handlers.

    Flower authenticates the node that a request names, but takes the reply in it as a reply of the
    node that the reply names. So a site that knows the ID of another site's message could answer
    it, and the other site's own reply would come too late. The seal would show that the reply is
    not genuine, but the genuine one would be missing.

    Flower also takes any objects with a reply, and refuses a second connection of a node that has
    not taken leave. And it looks for a message with a statement that waits for a turn to write,
    although relays ask all the time and mostly for nothing. Here such a question waits until there
    is a message. A node has one such question: another one, or a heartbeat, ends its waiting.
    """

    def __init__(
        self, app: ASGIApp, expected: ExpectedReplies, make_way: Callable[[bytes], None]
    ) -> None:
        """Args:
        app: Flower's handlers, which get a request that Flower has authenticated.
        make_way: ends the former connection of a relay (public key, PEM); called in a thread.
        """
        self._app = app
        self._expected = expected
        self._make_way = make_way
        self._activated: defaultdict[bytes, deque[float]] = defaultdict(
            lambda: deque(maxlen=_CONNECTIONS)
        )
        self._waiting: dict[int, asyncio.Event] = {}
        """Node -> what ends the waiting of its question."""
        self._loop: asyncio.AbstractEventLoop | None = None
        expected.on_posted = self._wake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        request = scope.get("state", {}).get("protobuf_request")
        answer: Response | None = None
        comes: str | None = None
        if scope["type"] != "http" or request is None:
            pass
        elif scope["path"] == PULL:
            node = request.node.node_id
            await self._until_asked(node)
            if not self._expected.is_asked(node):
                answer = flower_patches.answered(scope, PullMessagesResponse())
        elif scope["path"] == HEARTBEAT:
            self._end_waiting(request.node.node_id)
        elif scope["path"] == PUSH:
            answer = self._judge_reply(request)
            comes = None if answer else request.messages_list[0].metadata.message_id
        elif scope["path"] == PUSH_OBJECT:
            verdict = self._expected.take(
                request.node.node_id, request.object_id, len(request.object_content)
            )
            answer = _refusal(verdict)
            comes = request.object_id
        elif scope["path"] == ACTIVATE:
            if self._is_too_often(request.public_key):
                answer = JSONResponse("this relay connects too often", 429)
            else:
                # It waits for the database: in the event loop, everybody would wait with it.
                await run_in_threadpool(self._make_way, request.public_key)
        # Flower raises for what it does not store.
        await (answer or self._app)(scope, receive, send)
        if answer is None and comes is not None:
            self._expected.stored(request.node.node_id, comes)

    async def _until_asked(self, node: int) -> None:
        """Waits until a node is asked something, but not for long."""
        self._loop = asyncio.get_running_loop()
        self._end_waiting(node)
        over = self._waiting[node] = asyncio.Event()
        try:
            # After the event is there, so that no message is missed between the two.
            if not self._expected.is_asked(node):
                async with asyncio.timeout(_HOLD_SECONDS):
                    await over.wait()
        except TimeoutError:
            pass
        finally:
            if self._waiting.get(node) is over:
                del self._waiting[node]

    def _end_waiting(self, node: int) -> None:
        over = self._waiting.get(node)
        if over is not None:
            over.set()

    def _wake(self, node: int) -> None:
        """Called from the thread that posted a message for a node."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_waiting, node)

    def _judge_reply(self, request: PushMessagesRequest) -> JSONResponse | None:
        announced = announcement(request)
        if announced is None:
            return _refusal(Verdict.REFUSED)
        metadata = request.messages_list[0].metadata
        return _refusal(
            self._expected.announce(
                request.node.node_id, metadata.reply_to_message_id, metadata.message_id, *announced
            )
        )

    def _is_too_often(self, key: bytes) -> bool:
        times, now = self._activated[key], time.monotonic()
        if len(times) == _CONNECTIONS and now - times[0] < _PER_SECONDS:
            return True
        times.append(now)
        return False


def announcement(request: PushMessagesRequest) -> tuple[list[str], int] | None:
    """The names of a reply's pieces, and the size of its content in bytes, if a request announces
    one reply, its sender's own, in one of our two forms, or an error; else None.

    It looks at what the request has, and makes nothing of it: small parts would cost much memory.
    """
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return None
    (message,), (tree,) = request.messages_list, request.message_object_trees
    if message.metadata.src_node_id != request.node.node_id:
        return None
    if tree.object_id != message.metadata.message_id or any(
        piece.children for piece in tree.children
    ):
        return None
    pieces = [piece.object_id for piece in tree.children]
    if not message.HasField("content"):
        return None if pieces else ([], message.ByteSize())
    records = message.content.items
    if len(records) != 1 or records[0].key != FLOWER_RECORD:
        return None
    fields = records[0].config_record.items
    if len(fields) != 1:
        return None
    if fields[0].key == FLOWER_FIELD and not pieces:
        return [], len(fields[0].value.bytes)
    if fields[0].key == FLOWER_NAMES and pieces:
        # Flower keeps no order of the pieces; the names in the content do.
        names = fields[0].value.bytes.hex()
        return (pieces, 0) if names == "".join(pieces) else None
    return None


def _refusal(verdict: Verdict) -> JSONResponse | None:
    return None if verdict is Verdict.TAKEN else JSONResponse(verdict.value, _STATUS[verdict])
