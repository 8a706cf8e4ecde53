"""One message of a server, and the answer to it: over Flower's Fleet interface, or whole.

A server can send much; only one kind of message is handled, and app bundles and run configurations
are never requested. The content is sealed: nothing here looks into it.
"""

import gc
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import httpx
from flwr.app import Error, Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as Announcement
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient

from umbel_client.relay.flower_patches import set_identity, set_lifetime, set_message_id
from umbel_client.relay.server_clock import ServerClock
from umbel_host.transport.flower import (
    packed,
    packed_names,
    packed_piece,
    unpacked,
    unpacked_names,
    unpacked_piece,
)
from umbel_host.transport.pieces import (
    FLOWER_INLINE_BYTES,
    FLOWER_MESSAGE_TYPE,
    FLOWER_PIECE_BYTES,
)

NOT_OURS = 1
"""Code of the error that answers every message that is not Umbel's."""
LARGEST_MESSAGE = 1 << 31
"""Bytes; no adapter is larger."""
_PATIENCE_SECONDS = 150.0
"""How long one request is repeated while the server is away."""
_SLACK_SECONDS = 2.0
"""Taken off a reply's lifetime: the server's time is known to a second only."""

T = TypeVar("T")

Pieces = list[bytes]
"""A sealed message in pieces, which `umbel_host.transport.flower.regrouped` makes: a relay holds it
in memory only once."""


class TooLargeError(Exception):
    """A message is larger than any that the trainer takes."""


def answer_message(message: Message, handle: Callable[[bytes], bytes]) -> Message:
    """Hands the sealed bytes of a whole message to `handle` and returns its answer: what a
    simulation's nodes do.

    Nothing else has any effect: no app bundle, no run configuration, no other message type.
    """
    sealed = unpacked(message) if is_ours(message) else None
    if sealed is None:
        return no_answer(message)
    return Message(packed(handle(sealed)), reply_to=message)


def is_ours(message: Message) -> bool:
    """Whether a message may have sealed bytes of ours."""
    return message.metadata.message_type == FLOWER_MESSAGE_TYPE


def no_answer(message: Message) -> Message:
    """The answer to everything that is not a message of ours."""
    return Message(Error(NOT_OURS, "not a message of this federation"), reply_to=message)


def _opened(announced: Announcement) -> Message:
    try:
        return message_from_proto(announced)
    except Exception as error:
        # Flower may raise anything for what is not its own.
        raise ValueError("a message cannot be read") from error


def _place(message: Message) -> str:
    """What names the reply to a message, and nothing else, in its pieces."""
    return f"reply to {message.metadata.message_id}"


@dataclass(frozen=True)
class Conversation:
    """A node's exchange of messages with its server."""

    client: FleetHttpClient
    node: Node
    clock: ServerClock
    stopping: threading.Event

    def answer(
        self, announced: Announcement, handle: Callable[[Pieces], Pieces], largest: int
    ) -> None:
        """Answers one message that the server announced.

        Args:
            handle: returns the sealed reply to a sealed request.
            largest: size of the largest request that `handle` takes, in bytes. A larger one is
                dropped as soon as so much of it has come.

        Raises:
            httpx.HTTPError: the server is away for too long, or refuses a request.
            TooLargeError: the message is larger than `largest`.
            ValueError: it is not what a server of ours sends.
        """
        message = _opened(announced)
        set_identity(self.node.node_id, message.metadata.run_id)
        request = self.fetch(message, largest) if is_ours(message) else None
        if request is None:
            self._push(message, no_answer(message), [])
            return
        reply = handle(request)
        del request
        self.reply(message, reply)

    def fetch(self, message: Message, largest: int) -> Pieces | None:
        """The sealed bytes of a message; None if it is none of ours."""
        sealed = unpacked(message)
        if sealed is not None:
            if len(sealed) > largest:
                raise TooLargeError(largest)
            return [sealed]
        names = unpacked_names(message)
        if names is None:
            return None
        pieces: Pieces = []
        room = largest
        for name in names:
            request = PullObjectRequest(
                node=self.node, run_id=message.metadata.run_id, object_id=name
            )
            pulled = self._patiently(partial(self.client.PullObject, request))
            piece = unpacked_piece(pulled.object_content) if pulled.object_available else None
            # The HTTP client's objects refer to each other in a circle, with the megabytes in them.
            del pulled
            if piece is None:
                raise ValueError("a piece of a message is not there any more")
            room -= len(piece)
            if room < 0:
                raise TooLargeError(largest)
            pieces.append(piece)
            if len(piece) >= FLOWER_PIECE_BYTES:
                gc.collect()
        return pieces

    def reply(self, message: Message, reply: Pieces) -> None:
        """Sends a sealed reply: a small one at once, another in its pieces."""
        if sum(map(len, reply)) <= FLOWER_INLINE_BYTES:
            self._push(message, Message(packed(b"".join(reply)), reply_to=message), [])
            return
        place = _place(message)
        names = [packed_piece(piece, place, number)[0] for number, piece in enumerate(reply)]
        self._push(message, Message(packed_names(names), reply_to=message), reply)

    def _push(self, message: Message, reply: Message, pieces: Pieces) -> None:
        """Sends a reply and its pieces; after a cut, pieces that arrived are not sent again."""
        asked = message.metadata
        # By the server's clock: a reply lives as long as its request.
        created = self.clock.now().timestamp()
        set_lifetime(reply, created, asked.created_at + asked.ttl - created - _SLACK_SECONDS)
        names = unpacked_names(reply) or []
        said = unpacked(reply) or bytes.fromhex("".join(names))
        # The same answer to a message has the same name, whenever it is sent.
        name = hashlib.sha256(asked.message_id.encode() + said).hexdigest()
        set_message_id(reply, name)
        children = [ObjectTree(object_id=piece) for piece in names]
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(reply)],
            message_object_trees=[ObjectTree(object_id=name, children=children)],
        )
        pushed = self._patiently(partial(self.client.PushMessages, request))
        wanted = set(pushed.objects_to_push)
        for number, (piece_name, piece) in enumerate(zip(names, pieces, strict=True)):
            if piece_name not in wanted:
                continue
            part = PushObjectRequest(
                node=self.node,
                run_id=asked.run_id,
                session_id=pushed.session_id,
                object_id=piece_name,
                object_content=packed_piece(piece, _place(message), number)[1],
            )
            self._patiently(partial(self.client.PushObject, part))
            if len(part.object_content) >= FLOWER_PIECE_BYTES:
                del part
                gc.collect()

    def _patiently(self, call: Callable[[], T]) -> T:
        """Repeats a request while the server is away.

        Raises:
            httpx.HTTPError: the server is away for too long, or refuses the request.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        pause = 0.2
        while True:
            try:
                return call()
            except httpx.HTTPError as error:
                away = isinstance(error, httpx.TransportError) or (
                    isinstance(error, httpx.HTTPStatusError)
                    and error.response.status_code in (502, 503, 504)
                )
                if not away or time.monotonic() > deadline or self.stopping.wait(pause):
                    raise
                pause = min(2 * pause, 5.0)
