"""The one port that sites reach: TLS 1.3, client certificates, and nothing but what a relay needs.

A request passes if its path is one of a few of Flower's Fleet interface, and if the certificate
that the connection was opened with, the key that Flower's own headers name, and a site that the
operator admitted are one and the same.
"""

import base64
import binascii
import gc
import ssl
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from umbel_common.errors import ConfigError
from umbel_host.files.keys import read_tls_key
from umbel_host.transport.pieces import FLOWER_PIECE_BYTES

PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
    )
)
"""What a relay needs. Registering nodes, runs and app bundles are not among it."""
ACTIVATE = "/v1/fleet/activate-node"
_KEY_HEADER = b"flwr-public-key"
_LARGEST_BODY = FLOWER_PIECE_BYTES + (1 << 16)
"""Bytes: a piece of a message and what is around it."""
_LARGE = 1 << 18
"""Bytes of a request and its answer that are worth to be freed at once."""
_PEER = "umbel.peer"


class PeerProtocol(H11Protocol):
    """Tells the application which certificate the connection was opened with."""

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        peer = connection.getpeercert(binary_form=True) if connection is not None else None
        inner: Any = self.app

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope[_PEER] = peer
            await inner(scope, receive, send)

        self.app = app


class Gate:
    """The ASGI application in front of Flower's."""

    def __init__(
        self,
        fleet: ASGIApp,
        admitted: Callable[[], Mapping[str, str]],
        activating: Callable[[str], None],
        refused: Callable[[str], None],
    ) -> None:
        """Args:
        fleet: Flower's application.
        admitted: relay public key (PEM) -> site, of those that may connect now.
        activating: is told the key of a relay that is about to connect.
        refused: is told in a few words who was turned away.
        """
        self._fleet = fleet
        self._admitted = admitted
        self._activating = activating
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "lifespan":
            await self._fleet(scope, receive, send)
            return
        status = self._judge(scope)
        if status is None:
            await self._pass(scope, receive, send)
            return
        # What is there and what is not, a stranger need not learn.
        await PlainTextResponse("", status_code=status)(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        moved = int(dict(scope["headers"])[b"content-length"])

        async def counted(message: Message) -> None:
            nonlocal moved
            moved += len(message.get("body", b""))
            await send(message)

        await self._fleet(scope, receive, counted)
        if moved > _LARGE:
            # The web framework's objects for a request refer to each other in a circle, and to the
            # megabytes that it moved: Python would find out after hundreds of them.
            gc.collect()

    def _judge(self, scope: Scope) -> int | None:
        """The status of a refusal; None: the request may pass."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            return 404
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or int(length) > _LARGEST_BODY:
            return 413
        key = _certificate_key(scope.get(_PEER))
        site = self._admitted().get(key) if key is not None else None
        if key is None or site is None:
            self._refused("a certificate of a relay that is not admitted, or not any more")
            return 403
        if _claimed_key(headers.get(_KEY_HEADER, b"")) != key:
            self._refused(f"{site} speaks with another key than its certificate's")
            return 403
        if scope["path"] == ACTIVATE:
            self._activating(key)
        return None


def _certificate_key(certificate: bytes | None) -> str | None:
    """Public key (PEM) of a peer's certificate, which TLS has verified."""
    if certificate is None:
        return None
    parsed = x509.load_der_x509_certificate(certificate)
    # A connection may outlive the certificate that it was opened with.
    if parsed.not_valid_after_utc < datetime.now(UTC):
        return None
    return (
        parsed.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    )


def _claimed_key(header: bytes) -> str | None:
    try:
        return base64.b64decode(header, validate=True).decode("ascii")
    except (binascii.Error, UnicodeDecodeError):
        return None


def tls_context(certificate: Path, key: Path, client_ca: Path) -> ssl.SSLContext:
    """TLS 1.3 with a client certificate of our own authority, or no connection.

    Raises:
        IdentityError: the key is missing, open to others, or none that is used here.
        ConfigError: a certificate is missing, unreadable, expired or no such thing.
    """
    read_tls_key(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(client_ca)
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the server's certificate, its key or its authority cannot be used",
            file=certificate,
            field="listen",
            found=error,
            accepted=f"PEM files that belong together: {certificate}, {key}, {client_ca}",
        ) from None
    if parsed.not_valid_after_utc < datetime.now(UTC):
        raise ConfigError(
            "the server's certificate has expired",
            file=certificate,
            found=parsed.not_valid_after_utc.isoformat(),
            remedy="umbel-server renew",
        )
    return context


def server(app: ASGIApp, context: ssl.SSLContext) -> uvicorn.Server:
    """A web server that is not started yet; it is run on a socket that is bound already."""
    config = uvicorn.Config(
        app,
        http=PeerProtocol,
        ws="none",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=75,
        ssl_context_factory=lambda _, __: context,
    )
    return uvicorn.Server(config)
