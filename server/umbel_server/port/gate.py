"""The one port that sites reach: TLS 1.3, client certificates, and only what a relay needs.

No step may ever be dropped or moved below Flower, and no path may be added that registers a node,
starts a run or delivers code. `Gate` takes these steps before Flower sees a request, in this order;
a comment marks each, and the number is the HTTP status of its refusal:

1. The method is POST, and the path is one of seven of Flower's Fleet interface: 404.
2. The request announces its size, and is not larger than a piece of a message: 413, also without a
   length.
3. The connection was opened with a certificate of an admitted relay, which is still valid: 403.
4. The key that Flower's own headers name is the key of that certificate: 403.
5. If a relay activates its node, its former connection is ended first.
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
"""The paths that a relay needs. None of them registers a node, starts a run or delivers code."""
ACTIVATE = "/v1/fleet/activate-node"
_KEY_HEADER = b"flwr-public-key"
_LARGEST_BODY = FLOWER_PIECE_BYTES + (1 << 16)
"""Bytes: a piece of a message with its envelope."""
_LARGE = 1 << 18
"""Bytes of a request and its answer from which memory is freed at once."""
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
        read_admitted: Callable[[], Mapping[str, str]],
        on_activate: Callable[[str], None],
        on_refused: Callable[[str], None],
    ) -> None:
        """Args:
        fleet: Flower's application.
        read_admitted: returns relay public key (PEM) -> site, for the relays that may connect now.
        on_activate: called with the key of a relay that is about to connect.
        on_refused: called with a few words about a relay that was turned away.
        """
        self._fleet = fleet
        self._read_admitted = read_admitted
        self._on_activate = on_activate
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "lifespan":
            await self._fleet(scope, receive, send)
            return
        status = self._judge(scope)
        if status is None:
            await self._pass(scope, receive, send)
            return
        # The answer is empty: a stranger need not learn which paths exist.
        await PlainTextResponse("", status_code=status)(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        moved = int(dict(scope["headers"])[b"content-length"])

        async def counted(message: Message) -> None:
            nonlocal moved
            moved += len(message.get("body", b""))
            await send(message)

        await self._fleet(scope, receive, counted)
        if moved > _LARGE:
            # The web framework's objects for a request refer to each other in a cycle, and hold the
            # megabytes that it moved: Python would free them only after hundreds of requests.
            gc.collect()

    def _judge(self, scope: Scope) -> int | None:
        """Returns the HTTP status of a refusal; None if the request may pass."""
        # Step 1.
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            return 404
        # Step 2.
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or int(length) > _LARGEST_BODY:
            return 413
        # Step 3.
        key = _certificate_key(scope.get(_PEER))
        site = self._read_admitted().get(key) if key is not None else None
        if key is None or site is None:
            self._on_refused("a certificate of a relay that is not admitted, or not any more")
            return 403
        # Step 4.
        if _claimed_key(headers.get(_KEY_HEADER, b"")) != key:
            self._on_refused(f"{site} speaks with another key than its certificate's")
            return 403
        # Step 5.
        if scope["path"] == ACTIVATE:
            self._on_activate(key)
        return None


def _certificate_key(certificate: bytes | None) -> str | None:
    """Returns the public key (PEM) of a peer's certificate, which TLS has verified; None if there
    is no certificate, or it has expired."""
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
    """Returns a context that accepts TLS 1.3 with a client certificate of our own authority only.

    Raises:
        IdentityError: the key is missing, open to other users, or of a kind that is not used here.
        ConfigError: a certificate is missing, unreadable, malformed or expired.
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
    """Returns a web server that is not started yet; it runs on a socket that is already bound."""
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
