"""What is judged of a relay's request between Flower's authentication and Flower's handlers.

Nothing here ever opens a seal, and no check may be dropped or moved before the authentication:
until then, anybody with a certificate may have written the request in any site's name.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from umbel_server.port import flower_patches
from umbel_server.port.expected_replies import ExpectedReplies, Verdict

PULL = "/v1/fleet/pull-messages"
PUSH = "/v1/fleet/push-messages"
PUSH_OBJECT = "/v1/fleet/push-object"
ACTIVATE = "/v1/fleet/activate-node"
_STATUS = {Verdict.REFUSED: 403, Verdict.OVER: 410}
_CONNECTIONS, _PER_SECONDS = 5, 10.0
"""How often a relay may connect. Each time costs the database some statements."""


class ReplyFilter:
    """An ASGI application in front of Flower's handlers.

    Flower authenticates the node that a request names, but takes the reply in it as a reply of the
    node that the reply names. So a site that knows the ID of another site's message could answer
    it, and the other site's own reply would come too late. The seal would show that the reply is
    not genuine, but the genuine one would be missing.

    Flower also takes any objects with a reply, and refuses a second connection of a node that has
    not taken leave. And it looks for a message with a statement that waits for a turn to write,
    although relays ask all the time and mostly for nothing.
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        request = scope.get("state", {}).get("protobuf_request")
        answer: Response | None = None
        if scope["type"] != "http" or request is None:
            pass
        elif scope["path"] == PULL:
            if not self._expected.is_asked(request.node.node_id):
                answer = flower_patches.answered(scope, PullMessagesResponse())
        elif scope["path"] == PUSH:
            answer = self._judge_reply(request)
        elif scope["path"] == PUSH_OBJECT:
            verdict = self._expected.take(
                request.node.node_id, request.object_id, len(request.object_content)
            )
            answer = _refusal(verdict)
        elif scope["path"] == ACTIVATE:
            if self._is_too_often(request.public_key):
                answer = JSONResponse("this relay connects too often", 429)
            else:
                # It waits for the database: in the event loop, everybody would wait with it.
                await run_in_threadpool(self._make_way, request.public_key)
        await (answer or self._app)(scope, receive, send)

    def _judge_reply(self, request: Any) -> JSONResponse | None:
        if not is_one_reply(request):
            return _refusal(Verdict.REFUSED)
        (message,), (tree,) = request.messages_list, request.message_object_trees
        metadata = message.metadata
        return _refusal(
            self._expected.announce(
                request.node.node_id, metadata.reply_to_message_id, metadata.message_id, tree
            )
        )

    def _is_too_often(self, key: bytes) -> bool:
        times, now = self._activated[key], time.monotonic()
        if len(times) == _CONNECTIONS and now - times[0] < _PER_SECONDS:
            return True
        times.append(now)
        return False


def is_one_reply(request: PushMessagesRequest) -> bool:
    """Whether a request announces one reply, its sender's own, and one tree of parts."""
    own = [message.metadata.src_node_id for message in request.messages_list]
    return own == [request.node.node_id] and len(request.message_object_trees) == 1


def _refusal(verdict: Verdict) -> JSONResponse | None:
    return None if verdict is Verdict.TAKEN else JSONResponse(verdict.value, _STATUS[verdict])
