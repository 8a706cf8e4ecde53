"""Checks what Flower does not check of a reply: who it claims to be from, and how large it is.

Nothing here ever opens a seal, and no check may be dropped.
"""

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from google.protobuf.message import DecodeError
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umbel_host.transport.pieces import FLOWER_PIECE_BYTES

PUSH = "/v1/fleet/push-messages"
MOST_OBJECTS = 2**31 // FLOWER_PIECE_BYTES + 2
"""Most objects of one reply: the pieces of the largest message, its record and its content."""


class ReplyFilter:
    """An ASGI application in front of Flower's, for requests to `PUSH`.

    Flower authenticates the node that a request names, but takes the reply in it as a reply of the
    node that the reply names. So a site that knows the ID of another site's message could answer
    it, and the other site's own reply would come too late. The seal would show that the reply is
    not genuine, but the genuine one would be missing.
    """

    def __init__(self, fleet: ASGIApp) -> None:
        self._fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or scope["path"] != PUSH:
            await self._fleet(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        if not acceptable(body):
            await PlainTextResponse("", status_code=403)(scope, receive, send)
            return
        unread = [body]

        async def repeated() -> Message:
            return {"type": "http.request", "body": unread.pop()} if unread else await receive()

        await self._fleet(scope, repeated, send)


def acceptable(body: bytes) -> bool:
    """Whether every reply is its sender's own, and no larger than the largest message."""
    request = PushMessagesRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return False
    own = {message.metadata.src_node_id for message in request.messages_list}
    objects = sum(1 for tree in request.message_object_trees for _ in iterate_object_tree(tree))
    return own == {request.node.node_id} and objects <= MOST_OBJECTS
