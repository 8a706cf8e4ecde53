"""Flower on the site's side: a Flower message in, a Flower message out, sealed bytes between.

The relay and simulations run this module; neither holds data or an identity key here. A SuperLink
can send much; only one kind of message is handled, and app bundles and run configurations are never
requested. `flower_patches` has what is changed in Flower.
"""

import gc
import hashlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as Announcement
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient

from umbel_client.relay.flower_patches import (
    fleet_client,
    set_identity,
    set_lifetime,
    set_message_id,
)
from umbel_client.relay.proxy import way_to
from umbel_client.relay.server_clock import ServerClock
from umbel_client.relay.signature import Signature
from umbel_common.errors import ConfigError, UmbelError
from umbel_host.files.keys import read_tls_key
from umbel_host.transport.flower import packed_pieces, regrouped, takes_inline, unpacked_pieces
from umbel_host.transport.pieces import (
    FLOWER_INLINE_BYTES,
    FLOWER_MARK,
    FLOWER_MESSAGE_TYPE,
    FLOWER_PIECE_BYTES,
)
from umbel_host.transport.polling import pause

NOT_OURS = 1
"""Code of the error that answers every message that is not Umbel's."""
_HEARTBEAT_SECONDS = 20.0
_LOOK_SECONDS = 0.25
_HEARTBEAT_INTERVAL = 30.0
"""The interval that the SuperLink expects; after twice as long it counts the site as offline."""
_SHORTEST_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 1.0
_REQUEST_SECONDS = 30.0
"""Limit of each step of a request: to connect, to write, to read."""
_PATIENCE_SECONDS = 150.0
"""How long one request is repeated while the server is away."""
_LONGEST_PAUSE = 30.0
_LONGEST_REASON = 500
_SLACK_SECONDS = 2.0
"""Taken off a reply's lifetime: the server's time is known to a second only."""

LARGEST_MESSAGE = 1 << 31
"""Bytes; no adapter is larger."""
_ENVELOPE_BYTES = 4096
"""Room for what Flower writes around each part of a message, and for its name in its parent."""

_logger = logging.getLogger("umbel.relay")
T = TypeVar("T")

Pieces = list[bytes]
"""A sealed message in pieces, which `umbel_host.transport.flower.regrouped` makes: a relay holds it
in memory only once."""


class _TooLargeError(Exception):
    """A message is larger than any that the trainer takes."""


def answer_message(message: Message, handle: Callable[[Pieces], Pieces]) -> Message:
    """Hands the sealed bytes to `handle` and sends back its answer.

    Nothing else has any effect: no app bundle, no run configuration, no other message type.
    """
    ours = message.metadata.message_type == FLOWER_MESSAGE_TYPE
    pieces = unpacked_pieces(message) if ours else None
    if pieces is None:
        return Message(Error(NOT_OURS, "not a message of this federation"), reply_to=message)
    return Message(packed_pieces(handle(pieces)), reply_to=message)


def whole(handle: Callable[[bytes], bytes]) -> Callable[[Pieces], Pieces]:
    """A handler of pieces, made from a handler of whole messages such as `Trainer.handle`."""
    return lambda pieces: list(regrouped([handle(b"".join(pieces))]))


@dataclass(frozen=True)
class Connection:
    """How the server is reached."""

    server: str
    """Host and port."""
    server_ca: Path
    certificate: Path
    key: Path


def serve(
    connection: Connection,
    handle: Callable[[Pieces], Pieces],
    stopping: threading.Event,
    on_connected: Callable[[bool], None],
    largest: Callable[[], int] = lambda: LARGEST_MESSAGE,
) -> None:
    """Carries messages until `stopping` is set; tries again while the server is away.

    Args:
        handle: returns the sealed reply to a sealed request.
        on_connected: is called with True when the server is reached, and with False when not.
        largest: returns the size of the largest request that `handle` takes, in bytes. A larger one
            is dropped as soon as so much of it has come.

    Raises:
        IdentityError: the key is missing, readable by others, or of another kind.
        ConfigError: the certificate or the authority cannot be used, or the environment names a
            proxy that cannot.
    """
    context, key = _credentials(connection)
    way = way_to(connection.server)
    clock, pause = ServerClock(), 1.0
    # The garbage collector is called often; it need not look at objects that stay.
    gc.freeze()
    while not stopping.is_set():
        client = fleet_client(
            connection.server,
            context,
            way.client(context, _REQUEST_SECONDS),
            Signature(key, clock),
        )
        try:
            with client, _activated(client, key, stopping) as node:
                on_connected(True)
                pause = 1.0
                _logger.info("connected to %s", way)
                _work(client, node, clock, handle, largest, stopping)
        except UmbelError:
            # The trainer's, which ended while this process was told to stop.
            raise
        except Exception as error:
            # A server may send anything, and Flower and httpx may raise anything at it. Never may a
            # server decide when a relay ends.
            turned_away = (
                isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 403
            )
            text = "%s turns this site away: %s" if turned_away else "%s is not reached: %s"
            _logger.warning(text, way, _reason(error))
        on_connected(False)
        stopping.wait(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        hints = {
            401: "it does not know this site's relay key, or the clocks differ by minutes",
            403: "the operator has not admitted this site yet, or has revoked it; a relay whose"
            " certificate is of another key needs a new kit (umbel-client join KIT)",
        }
        # Not `response.text`: its decoder is one that the server names.
        said = error.response.content[:200].decode("utf-8", "replace")
        return f"status {code}: {hints.get(code, said)}"
    if isinstance(error, httpx.ProxyError):
        wanted = "; HTTPS_PROXY needs its user and password" if str(error)[:3] == "407" else ""
        return f"the proxy says {error}{wanted}"
    return str(error)[:_LONGEST_REASON] or type(error).__name__


def _credentials(connection: Connection) -> tuple[ssl.SSLContext, ec.EllipticCurvePrivateKey]:
    key = read_tls_key(connection.key)
    try:
        context = ssl.create_default_context(cafile=str(connection.server_ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(connection.certificate, connection.key)
        certificate = x509.load_pem_x509_certificate(connection.certificate.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "the relay's certificate, its key or the server's authority cannot be used",
            file=connection.certificate,
            field="relay",
            found=error,
            accepted=f"PEM files that belong together: {connection.certificate},"
            f" {connection.key}, {connection.server_ca}",
            remedy="umbel-client join KIT",
        ) from None
    if certificate.not_valid_after_utc < datetime.now(UTC):
        raise ConfigError(
            "the relay's certificate has expired",
            file=connection.certificate,
            found=certificate.not_valid_after_utc.isoformat(),
            remedy="ask the operator for a new kit, then: umbel-client join KIT",
        )
    return context, key


@contextmanager
def _activated(
    client: FleetHttpClient, key: ec.EllipticCurvePrivateKey, stopping: threading.Event
) -> Iterator[Node]:
    """Reports this node as online, and keeps it online."""
    activated = client.ActivateNode(
        ActivateNodeRequest(
            public_key=public_key_to_bytes(key.public_key()),
            heartbeat_interval=_HEARTBEAT_INTERVAL,
        )
    )
    node = Node(node_id=activated.node_id)
    over = threading.Event()

    def beat() -> None:
        due = time.monotonic() + _HEARTBEAT_SECONDS
        while not over.wait(_LOOK_SECONDS):
            # The question for messages may be waiting for an answer: a heartbeat ends that.
            if time.monotonic() < due and not stopping.is_set():
                continue
            due = time.monotonic() + _HEARTBEAT_SECONDS
            try:
                client.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(node=node, heartbeat_interval=_HEARTBEAT_INTERVAL)
                )
            except Exception as error:
                _logger.warning("no heartbeat: %s", _reason(error))

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield node
    finally:
        over.set()
        beating.join()
        if stopping.is_set():
            try:
                client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
            except Exception:
                _logger.info("the server was not told that this site stops")


def _work(
    client: FleetHttpClient,
    node: Node,
    clock: ServerClock,
    handle: Callable[[Pieces], Pieces],
    largest: Callable[[], int],
    stopping: threading.Event,
) -> None:
    latest = time.monotonic()
    question = PullMessagesRequest(node=node, message_ids=[FLOWER_MARK])
    while not stopping.is_set():
        asked = time.monotonic()
        pulled = client.PullMessages(question)
        if not pulled.messages_list:
            # A server answers when it has a message, or after a while; an older one does at once.
            now = time.monotonic()
            wait = pause(
                now - latest, shortest=_SHORTEST_POLL_SECONDS, longest=_LONGEST_POLL_SECONDS
            )
            stopping.wait(max(wait - (now - asked), 0.0))
            continue
        (announced,), (tree,) = pulled.messages_list, pulled.message_object_trees
        del pulled
        metadata = announced.metadata
        set_identity(node.node_id, metadata.run_id)
        try:
            announcement = _opened(announced)
            inline = takes_inline(announcement)
            request = _whole(announcement, tree, largest())
            if request is None:
                request = _pull(client, node, metadata.run_id, tree, largest(), stopping)
            expires = metadata.created_at + metadata.ttl
            reply = answer_message(request, handle)
            del announced, announcement, request
            _push(client, node, clock, reply, expires, stopping, inline=inline)
            del reply
            # Unlike Flower's nodes, a relay confirms nothing: the server would delete a confirmed
            # message and could not deliver it again. It deletes a request with its reply.
        except httpx.HTTPStatusError as error:
            if not _is_over(error.response):
                raise
            # The message's run is over: nobody waits for this reply any more.
            _logger.info("a message is dropped: %s", _reason(error))
            stopping.wait(_SHORTEST_POLL_SECONDS)
        except _TooLargeError as error:
            _logger.warning("a message is dropped: it has more than %s bytes", error)
        latest = time.monotonic()


def _is_over(response: httpx.Response) -> bool:
    """Whether Flower refuses a message, and not the gate before it, whose refusals are empty."""
    code = response.status_code
    return 400 <= code < 500 and code != 401 and bool(response.content)


def _opened(announced: Announcement) -> Message:
    try:
        return message_from_proto(announced)
    except Exception as error:
        # Flower may raise anything for what is not its own.
        raise ValueError("an announcement cannot be read") from error


def _whole(announcement: Message, tree: ObjectTree, largest: int) -> Message | None:
    """The message, if it is in its announcement; None if its parts are to be fetched."""
    pieces = unpacked_pieces(announcement)
    if pieces is None:
        return None
    if sum(map(len, pieces)) > largest:
        raise _TooLargeError(largest)
    set_message_id(announcement, tree.object_id)
    return announcement


def _pull(
    client: FleetHttpClient,
    node: Node,
    run_id: int,
    tree: ObjectTree,
    largest: int,
    stopping: threading.Event,
) -> Message:
    contents: dict[str, bytes] = {}
    room = largest + (-(-largest // FLOWER_PIECE_BYTES) + 2) * _ENVELOPE_BYTES
    for part in iterate_object_tree(tree):
        request = PullObjectRequest(node=node, run_id=run_id, object_id=part.object_id)
        while True:
            pulled = _patiently(partial(client.PullObject, request), stopping)
            if pulled.object_available:
                break
            if not pulled.object_found or stopping.wait(_SHORTEST_POLL_SECONDS):
                raise ValueError("a part of a message is not there any more")
        contents[part.object_id] = pulled.object_content
        room -= len(pulled.object_content)
        if room < 0:
            raise _TooLargeError(largest)
        # The HTTP client's objects refer to each other in a circle, with the megabytes in them.
        del pulled
        if len(contents[part.object_id]) >= FLOWER_PIECE_BYTES:
            gc.collect()
    try:
        message = inflate_object_from_contents(tree.object_id, contents)
    except Exception as error:
        # Flower may raise anything for bytes that are not its own.
        raise ValueError("a message cannot be put together") from error
    if not isinstance(message, Message):
        raise ValueError("the server sent something that is not a Flower message")
    set_message_id(message, tree.object_id)
    return message


def _push(
    client: FleetHttpClient,
    node: Node,
    clock: ServerClock,
    reply: Message,
    expires: float,
    stopping: threading.Event,
    *,
    inline: bool,
) -> None:
    """Sends a reply: a small one whole, if the server takes it so, and any other piece by piece.
    After a cut, pieces that arrived are not sent again.

    Args:
        expires: when nobody waits for it any more, seconds since 1970.
        inline: whether the server takes a reply whole.
    """
    run_id = reply.metadata.run_id
    # By the server's clock: a reply lives as long as its request.
    created = clock.now().timestamp()
    set_lifetime(reply, created, expires - created - _SLACK_SECONDS)
    pieces = unpacked_pieces(reply)
    if inline and pieces is not None and sum(map(len, pieces)) <= FLOWER_INLINE_BYTES:
        _push_whole(client, node, reply, pieces, stopping)
        return
    with no_object_id_recompute():
        set_message_id(reply, reply.object_id)
        objects = get_all_nested_objects(reply)
        request = PushMessagesRequest(
            node=node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
        )
        pushed = _patiently(partial(client.PushMessages, request), stopping)
        for name in pushed.objects_to_push:
            part = PushObjectRequest(
                node=node,
                run_id=run_id,
                session_id=pushed.session_id,
                object_id=name,
                object_content=objects.pop(name).deflate(),
            )
            _patiently(partial(client.PushObject, part), stopping)
            if len(part.object_content) >= FLOWER_PIECE_BYTES:
                del part
                gc.collect()


def _push_whole(
    client: FleetHttpClient,
    node: Node,
    reply: Message,
    pieces: Pieces,
    stopping: threading.Event,
) -> None:
    asked = reply.metadata.reply_to_message_id
    # The same answer to a message has the same name, whenever it is sent.
    name = hashlib.sha256(asked.encode() + b"".join(pieces)).hexdigest()
    set_message_id(reply, name)
    request = PushMessagesRequest(
        node=node,
        messages_list=[message_to_proto(reply)],
        message_object_trees=[ObjectTree(object_id=name)],
    )
    _patiently(partial(client.PushMessages, request), stopping)


def _patiently(call: Callable[[], T], stopping: threading.Event) -> T:
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
            if not away or time.monotonic() > deadline or stopping.wait(pause):
                raise
            pause = min(2 * pause, 5.0)
