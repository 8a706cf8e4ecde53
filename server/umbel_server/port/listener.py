"""Connections: strangers are few and soon gone, until TLS has verified a certificate.

The rules here, whatever is changed:

- A connection costs no memory for TLS before its first byte has come, and no TLS is computed faster
  than one handshake in `_PACE_SECONDS`: all sites share this thread.
- The places for strangers are limited, for each address and in all. A newcomer always gets one: the
  oldest silent connection of the address that has the most goes.
- A connection whose certificate is verified counts for its key, and no more for its address: a
  hundred sites may share one, behind a proxy or a network's router.
"""

import asyncio
import errno
import ipaddress
import logging
import resource
import socket
import ssl
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import h11
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from umbel_common.errors import ConfigError
from umbel_host.files.keys import read_tls_key
from umbel_host.processes.log import adopt
from umbel_server.operator.authority import SITE_URI

CONNECTION = "umbel.connection"
"""Name of the `Connection` in a request's scope."""
HELLO_SECONDS = 10.0
"""Time for the first byte of a new connection."""
HANDSHAKE_SECONDS = 10.0
HEADER_SECONDS = 20.0
"""Time for the header of a request, from its first byte, or from the handshake."""
_LINGER_SECONDS = 5.0
_LINGER_BYTES = 1 << 20
"""How long, and how much of, the rest of a refused request is read and dropped, for its sender to
see the answer."""
_KEEP_ALIVE_SECONDS = 75
_CLOSING_SECONDS = 3.0
"""How long a port that closes waits for its connections to end."""
_PACE_SECONDS = 0.02
_RECORDS_AT_ONCE = 100
"""TLS records that come at once: of a large body, 32 are as much as waits to be read."""
_CONNECTIONS_OF_A_KEY = 16
_STRANGERS = 4096
_OTHER_FILES = 256
"""Files and sockets that this process needs besides connections."""
_WANTED_FILES = 65536
_BACKLOG_AT_ONCE = 64
_TLS_HANDSHAKE_RECORD = b"\x16"

_logger = logging.getLogger("umbel.port")


class Peer:
    """The certificate that a connection was opened with; TLS has verified it."""

    def __init__(self, certificate: bytes) -> None:
        parsed = x509.load_der_x509_certificate(certificate)
        public = parsed.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.key = public.decode()
        """The public key, PEM."""
        self.site = _site_of(parsed)
        """The site that the authority issued it to, for people."""
        self._ends = parsed.not_valid_after_utc

    def is_valid(self) -> bool:
        """Whether the certificate has not expired: a connection may outlive it."""
        return datetime.now(UTC) <= self._ends


def _site_of(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return "a site without a name"
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return next((uri.removeprefix(SITE_URI) for uri in uris), "a site without a name")


class _Records(ssl.SSLObject):
    """TLS that ends when it comes in crumbs.

    A record takes this thread as long for one byte as for 16 KiB, and all records that have come
    are read at once: in the meantime, nobody else is served.
    """

    _at_once = 0

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """See `ssl.SSLObject`."""
        try:
            data = super().read(len, buffer)
        except ssl.SSLWantReadError:
            self._at_once = 0
            raise
        self._at_once += 1
        if self._at_once > _RECORDS_AT_ONCE:
            raise ssl.SSLError(f"more than {_RECORDS_AT_ONCE} records at once")
        return data


class Connection(H11Protocol):
    """HTTP over one verified connection."""

    def __init__(self, of_key: defaultdict[str, list["Connection"]], **settings: Any) -> None:
        super().__init__(**settings)
        self._of_key = of_key
        self._deadline: asyncio.TimerHandle | None = None
        self._refused: object = None
        """The request that was refused last, with its answer."""
        self._lingering = 0
        """Bytes that may still come of it."""
        self.peer: Peer | None = None
        self.opened = 0.0
        """When the connection was opened, on the event loop's clock."""

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self.opened = self.loop.time()
        connection = transport.get_extra_info("ssl_object")
        certificate = connection.getpeercert(binary_form=True) if connection is not None else None
        if certificate is not None:
            self.peer = Peer(certificate)
            others = self._of_key[self.peer.key]
            others.append(self)
            if len(others) > _CONNECTIONS_OF_A_KEY:
                # A relay whose line was cut leaves connections behind: the newest is its own.
                others.pop(0).abort()
        inner: Any = self.app

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope[CONNECTION] = self
            await inner(scope, receive, send)

        self.app = app
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self._refused is self.cycle:
            self._lingering -= len(data)
            if self._lingering < 0:
                self._end_unfinished()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._unwatch()
        if self.peer is not None and self in (others := self._of_key[self.peer.key]):
            others.remove(self)
            if not others:
                del self._of_key[self.peer.key]

    def place(self) -> str:
        """The address at the other end; through a proxy, the proxy's."""
        return self.client[0] if self.client else "an unknown address"

    def abort(self) -> None:
        """Ends the connection at once."""
        self.transport.abort()

    async def drained(self) -> None:
        """Waits until the other side has taken what was sent, but for a little."""
        await self.flow.drain()

    def linger(self) -> None:
        """Ends the connection in a while if the rest of its request, which was just answered, is
        still coming then."""
        if not self.cycle.response_complete:
            # All of it had come: this is the next request.
            return
        self._refused, self._lingering = self.cycle, _LINGER_BYTES
        self.loop.call_later(_LINGER_SECONDS, self._end_unfinished)

    def _end_unfinished(self) -> None:
        if self._refused is self.cycle and self.conn.their_state is h11.SEND_BODY:
            self.abort()

    def _watch(self) -> None:
        """Gives a header that has not come yet its time."""
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.abort)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Stranger:
    """A connection before the end of its handshake."""

    def __init__(self, opened: socket.socket, address: str, now: float) -> None:
        self.socket = opened
        self.address = address
        self.since = now
        self.handshake: asyncio.Task[None] | None = None
        self.begun = False
        """Whether the socket belongs to the transport of its handshake."""


class _Place:
    """The strangers of one address, oldest first."""

    def __init__(self) -> None:
        self.silent: dict[_Stranger, None] = {}
        self.waiting: dict[_Stranger, None] = {}
        """They have said something, and wait for their turn."""
        self.shaking: dict[_Stranger, None] = {}
        """Their handshake is under way."""

    def __len__(self) -> int:
        return len(self.silent) + len(self.waiting) + len(self.shaking)

    def oldest(self) -> _Stranger:
        # Among those who wait, the newest are served first: the oldest loses least. A handshake
        # under way has cost something already, and may be a site's.
        return next(iter(self.silent or self.waiting or self.shaking))


class Listener:
    """Accepts connections for uvicorn, as `asyncio.Server` does."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        make_protocol: Callable[[], asyncio.Protocol],
        files: int,
    ) -> None:
        """Begins to accept; to be called in the event loop.

        Args:
            listener: a socket that listens.
            make_protocol: makes the protocol of a verified connection.
            files: how many files this process may open.
        """
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._context = context
        self._make_protocol = make_protocol
        self._most = max(min(_STRANGERS, (files - _OTHER_FILES) // 2), 16)
        self._places: dict[str, _Place] = {}
        self._strangers = 0
        self._rung = asyncio.Event()
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)
        self._doorman = self._loop.create_task(self._open_doors())
        self._sweeper = self._loop.create_task(self._sweep())

    def close(self) -> None:
        """Accepts nothing more, and ends the connections that are not verified."""
        self._loop.remove_reader(self._listener)
        self._doorman.cancel()
        self._sweeper.cancel()
        for place in list(self._places.values()):
            while len(place):
                self._turn_away(place.oldest())

    async def wait_closed(self) -> None:
        """See `asyncio.Server`."""

    def _accept(self) -> None:
        for _ in range(_BACKLOG_AT_ONCE):
            try:
                opened, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                if not self._strangers:
                    _logger.warning("no connection can be accepted: %s", error)
                    self._loop.remove_reader(self._listener)
                    self._loop.call_later(1.0, self._accept_again)
                    return
                self._turn_away(self._most_crowded().oldest())
                continue
            self._let_wait(opened, place_of(address[0]))

    def _accept_again(self) -> None:
        if not self._doorman.cancelled():
            self._loop.add_reader(self._listener, self._accept)

    def _let_wait(self, opened: socket.socket, address: str) -> None:
        opened.setblocking(False)
        place = self._places.setdefault(address, _Place())
        if len(place) >= max(self._most // 2, 1):
            self._turn_away(place.oldest())
        elif self._strangers >= self._most:
            self._turn_away(self._most_crowded().oldest())
        stranger = _Stranger(opened, address, self._loop.time())
        # The place may just have lost its last stranger.
        self._places.setdefault(address, place).silent[stranger] = None
        self._strangers += 1
        self._loop.add_reader(opened, self._hear, stranger)

    def _most_crowded(self) -> _Place:
        return max(self._places.values(), key=len)

    def _hear(self, stranger: _Stranger) -> None:
        """The first byte has come, or the end."""
        self._loop.remove_reader(stranger.socket)
        try:
            first = stranger.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            first = b""
        if first != _TLS_HANDSHAKE_RECORD:
            self._turn_away(stranger)
            return
        place = self._places[stranger.address]
        del place.silent[stranger]
        place.waiting[stranger] = None
        self._rung.set()

    async def _open_doors(self) -> None:
        """Begins the handshakes: one address after the other, the newest of each first."""
        while True:
            await self._rung.wait()
            self._rung.clear()
            while places := [place for place in self._places.values() if place.waiting]:
                for place in places:
                    if place.waiting:
                        stranger, _ = place.waiting.popitem()
                        place.shaking[stranger] = None
                        stranger.handshake = self._loop.create_task(self._shake_hands(stranger))
                        await asyncio.sleep(_PACE_SECONDS)

    async def _shake_hands(self, stranger: _Stranger) -> None:
        stranger.begun = True
        try:
            await self._loop.connect_accepted_socket(
                self._make_protocol,
                stranger.socket,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )
        except OSError as error:
            # Without a certificate of our authority, mostly. It has its answer from TLS.
            _logger.debug("no handshake with %s: %s", stranger.address, error)
        finally:
            stranger.handshake = None
            self._leave(stranger)

    def _turn_away(self, stranger: _Stranger) -> None:
        if stranger.handshake is not None:
            # The transport, if there is one already, closes the socket.
            stranger.handshake.cancel()
        if not stranger.begun:
            self._loop.remove_reader(stranger.socket)
            stranger.socket.close()
        self._leave(stranger)

    def _leave(self, stranger: _Stranger) -> None:
        place = self._places.get(stranger.address)
        if place is None:
            return
        for kind in (place.silent, place.waiting, place.shaking):
            if stranger in kind:
                del kind[stranger]
                self._strangers -= 1
        if not len(place):
            del self._places[stranger.address]

    async def _sweep(self) -> None:
        """Turns away who says nothing, or waits for too long."""
        while True:
            await asyncio.sleep(1.0)
            late = self._loop.time() - HELLO_SECONDS
            for place in list(self._places.values()):
                for kind in (place.silent, place.waiting):
                    while kind and (oldest := next(iter(kind))).since < late:
                        self._turn_away(oldest)


def place_of(address: str) -> str:
    """What counts as one address: for IPv6 the network, of which a machine has all addresses."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))


class _Server(uvicorn.Server):
    """A server whose connections come from a `Listener`."""

    def __init__(self, config: uvicorn.Config, context: ssl.SSLContext) -> None:
        super().__init__(config)
        self._context = context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept on the one socket that `run` was given."""
        await self.lifespan.startup()
        if self.lifespan.should_exit or not sockets:
            self.should_exit = True
            return
        of_key: defaultdict[str, list[Connection]] = defaultdict(list)

        def make_protocol() -> Connection:
            return Connection(
                of_key,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )

        listener: Any = Listener(sockets[0], self._context, make_protocol, open_files())
        self.servers = [listener]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for requests under way, but not for those that their site does not let end, nor
        for a site that does not take leave."""
        ending = asyncio.get_running_loop().call_later(_CLOSING_SECONDS, self._end_connections)
        await super().shutdown(sockets)
        ending.cancel()

    def _end_connections(self) -> None:
        for connection in list(self.server_state.connections):
            cast(Connection, connection).abort()


def open_files() -> int:
    """Lets this process open as many files as it may; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _WANTED_FILES if soft == resource.RLIM_INFINITY else soft


def tls_context(certificate: Path, key: Path, client_ca: Path) -> ssl.SSLContext:
    """Returns a context that accepts TLS 1.3 with a client certificate of our own authority only.

    Raises:
        IdentityError: the key is missing, open to other users, or of a kind that is not used here.
        ConfigError: a certificate is missing, unreadable, malformed or expired.
    """
    read_tls_key(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslobject_class = _Records
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
    """Returns a web server that is not started yet; it runs on a socket that listens already."""
    # A site can make Flower fail at each of its requests, and each failure is a traceback.
    adopt("uvicorn.error")
    config = uvicorn.Config(
        app,
        http=H11Protocol,
        loop="asyncio",
        ws="none",
        access_log=False,
        # Its warnings are about what the other side sent, which could fill the log with them.
        log_level="error",
        log_config=None,
        # The gate believes no header about where a request came from.
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    return _Server(config, context)
