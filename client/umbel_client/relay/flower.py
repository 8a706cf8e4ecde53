"""A relay's connection to a SuperLink, over Flower's Fleet interface.

It is kept up, and asks for messages; `messages` has what becomes of one. Neither holds data or an
identity key. `flower_patches` has what is changed in Flower.
"""

import gc
import logging
import math
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient

from umbel_client.relay.flower_patches import fleet_client
from umbel_client.relay.messages import LARGEST_MESSAGE, Conversation, Pieces, TooLargeError
from umbel_client.relay.proxy import way_to
from umbel_client.relay.server_clock import ServerClock
from umbel_client.relay.signature import Signature
from umbel_common.errors import ConfigError, UmbelError
from umbel_host.files.keys import read_tls_key
from umbel_host.transport.polling import pause

_HEARTBEAT_SECONDS = 20.0
_LAST_HEARTBEATS_SECONDS = 0.5
"""Time between heartbeats of a relay that stops."""
_LOOK_SECONDS = 0.1
_HEARTBEAT_INTERVAL = 30.0
"""The interval that the SuperLink expects; after twice as long it counts the site as offline."""
_SHORTEST_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 1.0
_REQUEST_SECONDS = 30.0
"""Limit of each step of a request: to connect, to write, to read. The server answers a question for
messages after half as long, if it has none."""
_ANSWER_SECONDS = 900.0
"""Time for an answer to come, whatever its steps: a piece over a very slow line."""
_LONGEST_PAUSE = 30.0
_LONGEST_REASON = 500

_logger = logging.getLogger("umbel.relay")


class _Socket(ssl.SSLSocket):
    """TLS over which no answer comes without an end: in steps of a byte, or behind a hundred
    thousand that say that it comes."""

    _asked = math.inf

    def send(self, data: Any, flags: int = 0) -> int:
        """See `ssl.SSLSocket`."""
        self._asked = time.monotonic()
        return super().send(data, flags)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """See `ssl.SSLSocket`."""
        if time.monotonic() - self._asked > _ANSWER_SECONDS:
            raise TimeoutError("an answer does not end")
        return super().recv(buflen, flags)


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
            # The trainer's, which nobody waits for when this process is told to stop. The server
            # delivers the message again.
            if not stopping.is_set():
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
        context.sslsocket_class = _Socket
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
        latest = time.monotonic()
        while not over.wait(_LOOK_SECONDS):
            # The question for messages may be waiting for an answer: a heartbeat ends that.
            seconds = _LAST_HEARTBEATS_SECONDS if stopping.is_set() else _HEARTBEAT_SECONDS
            if time.monotonic() - latest < seconds:
                continue
            latest = time.monotonic()
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
    conversation = Conversation(client, node, clock, stopping)
    latest = time.monotonic()
    while not stopping.is_set():
        asked = time.monotonic()
        pulled = client.PullMessages(PullMessagesRequest(node=node))
        if not pulled.messages_list:
            # The server answers when it has a message, or after a while, or at once.
            now = time.monotonic()
            wait = pause(
                now - latest, shortest=_SHORTEST_POLL_SECONDS, longest=_LONGEST_POLL_SECONDS
            )
            stopping.wait(max(wait - (now - asked), 0.0))
            continue
        (announced,) = pulled.messages_list
        del pulled
        try:
            conversation.answer(announced, handle, largest())
            # Unlike Flower's nodes, a relay confirms nothing: the server would delete a confirmed
            # message and could not deliver it again. It deletes a request with its reply.
        except httpx.HTTPStatusError as error:
            if not _is_over(error.response):
                raise
            # The message's run is over: nobody waits for this reply any more.
            _logger.info("a message is dropped: %s", _reason(error))
            stopping.wait(_SHORTEST_POLL_SECONDS)
        except TooLargeError as error:
            _logger.warning("a message is dropped: it has more than %s bytes", error)
            stopping.wait(_SHORTEST_POLL_SECONDS)
        latest = time.monotonic()


def _is_over(response: httpx.Response) -> bool:
    """Whether Flower refuses a message, and not the gate before it, whose refusals are empty."""
    code = response.status_code
    return 400 <= code < 500 and code != 401 and bool(response.content)
