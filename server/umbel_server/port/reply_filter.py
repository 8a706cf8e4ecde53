"""What is judged of a relay's request between Flower's authentication and Flower's handlers.

Nothing here ever opens a seal, and no check may be dropped or moved before the authentication:
until then, anybody with a certificate may have written the request in any site's name.
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umbel_host.transport.flower import is_piece
from umbel_host.transport.pieces import FLOWER_FIELD, FLOWER_NAMES, FLOWER_RECORD, NAME_BYTES
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


class _Waiting:
    """A question for messages that waits for one."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self.ended = False
        """Whether nobody may be there any more to get a message."""


class ReplyFilter:
    """An ASGI application in front of Flower's handlers.

    Flower authenticates the node that a request names, but takes the reply in it as a reply of the
    node that the reply names. So a site that knows the ID of another site's message could answer
    it, and the other site's own reply would come too late. The seal would show that the reply is
    not genuine, but the genuine one would be missing.

    Flower also takes any objects with a reply, and refuses a second connection of a node that has
    not taken leave. And it looks for a message with a statement that waits for a turn to write,
    although relays ask all the time and mostly for nothing. Here such a question waits until there
    is a message. A node has one such question: another one, a heartbeat or a new connection ends
    its waiting.
    """

    def __init__(
        self,
        app: ASGIApp,
        expected: ExpectedReplies,
        make_way: Callable[[bytes], int | None],
        deliver_again: Callable[[list[str]], None],
    ) -> None:
        """Args:
        app: Flower's handlers, which get a request that Flower has authenticated.
        make_way: ends the former connection of a relay (public key, PEM), and returns its node;
            called in a thread.
        deliver_again: lets these messages be fetched once more; called in a thread.
        """
        self._app = app
        self._expected = expected
        self._make_way = make_way
        self._deliver_again = deliver_again
        self._activated: defaultdict[bytes, deque[float]] = defaultdict(
            lambda: deque(maxlen=_CONNECTIONS)
        )
        self._waiting: dict[int, _Waiting] = {}
        """Node -> its question that waits."""
        self._loop: asyncio.AbstractEventLoop | None = None
        expected.on_posted = self._wake
        expected.on_closed = self._wake_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        request = scope.get("state", {}).get("protobuf_request")
        answer: Response | None = None
        comes: str | None = None
        if scope["type"] != "http" or request is None:
            pass
        elif scope["path"] == PULL:
            if not await self._is_asked(request.node.node_id):
                answer = flower_patches.answered(scope, PullMessagesResponse())
            elif lost := self._expected.lost(request.node.node_id):
                await run_in_threadpool(self._deliver_again, lost)
        elif scope["path"] == HEARTBEAT:
            self._end_waiting(request.node.node_id)
        elif scope["path"] == PUSH:
            answer = self._judge_reply(request)
            comes = None if answer else request.messages_list[0].metadata.message_id
        elif scope["path"] == PUSH_OBJECT:
            answer = self._judge_piece(request)
            comes = None if answer else request.object_id
        elif scope["path"] == ACTIVATE:
            if self._is_too_often(request.public_key):
                answer = JSONResponse("this relay connects too often", 429)
            else:
                # It waits for the database: in the event loop, everybody would wait with it.
                node = await run_in_threadpool(self._make_way, request.public_key)
                # A message that its former connection's question gets now would be lost.
                self._end_waiting(node)
        if answer is not None:
            await answer(scope, receive, send)
            return

        async def noted(message: Message) -> None:
            # Flower raises for what it does not take, and so has no answer then.
            if message["type"] == "http.response.start" and request is not None:
                self._note(scope, request, comes)
            await send(message)

        await self._app(scope, receive, noted)

    def _note(self, scope: Scope, request: Any, comes: str | None) -> None:
        """Takes note of what Flower has done, before anybody else hears of it."""
        done = flower_patches.response(scope)
        if done is None:
            return
        if scope["path"] == PULL:
            for message in done.messages_list:
                self._expected.delivered(message.metadata.message_id)
        elif comes is not None and (
            # Flower says nothing else of a reply, or a piece, that it does not take. A reply has
            # no object of its own, so that one is missing for ever.
            done.stored if scope["path"] == PUSH_OBJECT else comes in done.objects_to_push
        ):
            self._expected.stored(request.node.node_id, comes)

    async def _is_asked(self, node: int) -> bool:
        """Whether a node that asks for a message is to get one; waits until there is one."""
        self._loop = asyncio.get_running_loop()
        self._end_waiting(node)
        waiting = self._waiting[node] = _Waiting()
        try:
            # After it is there, so that no message is missed between the two.
            if not self._expected.is_asked(node) and not self._expected.is_closed:
                async with asyncio.timeout(_HOLD_SECONDS):
                    await waiting.woken.wait()
        except TimeoutError:
            pass
        finally:
            if self._waiting.get(node) is waiting:
                del self._waiting[node]
        return not waiting.ended and self._expected.is_asked(node)

    def _end_waiting(self, node: int | None) -> None:
        """Lets the question of a node be answered that there is nothing."""
        waiting = self._waiting.get(node) if node is not None else None
        if waiting is not None:
            waiting.ended = True
            waiting.woken.set()

    def _wake(self, node: int) -> None:
        """Called from the thread that posted a message for a node."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._look_again, node)

    def _wake_all(self) -> None:
        """Called from the thread that ends this process."""
        for node in list(self._waiting):
            self._wake(node)

    def _look_again(self, node: int) -> None:
        waiting = self._waiting.get(node)
        if waiting is not None:
            waiting.woken.set()

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

    def _judge_piece(self, request: Any) -> JSONResponse | None:
        if not is_piece(request.object_content):
            return _refusal(Verdict.REFUSED)
        size = len(request.object_content)
        return _refusal(self._expected.take(request.node.node_id, request.object_id, size))

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
    if tree.object_id != message.metadata.message_id:
        return None
    if not message.HasField("content"):
        return None if tree.children else ([], message.ByteSize())
    records = message.content.items
    if len(records) != 1 or records[0].key != FLOWER_RECORD:
        return None
    fields = records[0].config_record.items
    if len(fields) != 1:
        return None
    value = fields[0].value.bytes
    if fields[0].key == FLOWER_FIELD and not tree.children:
        return [], len(value)
    if fields[0].key != FLOWER_NAMES or not tree.children:
        return None
    # No piece is looked at that has no name: everybody waits meanwhile.
    if len(value) != NAME_BYTES * len(tree.children):
        return None
    if any(piece.children for piece in tree.children):
        return None
    pieces = [piece.object_id for piece in tree.children]
    # Flower keeps no order of the pieces; the names in the content do.
    return (pieces, 0) if value.hex() == "".join(pieces) else None


def _refusal(verdict: Verdict) -> JSONResponse | None:
    return None if verdict is Verdict.TAKEN else JSONResponse(verdict.value, _STATUS[verdict])
