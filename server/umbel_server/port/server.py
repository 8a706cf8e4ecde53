"""Runs the port: the SuperLink behind its gate, and the mailbox that the jobs post to."""

import gc
import logging
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from umbel_common.errors import UmbelError
from umbel_host.processes.log import adopt
from umbel_host.transport.sockets import SocketServer
from umbel_server.messaging.carrier import CARRIER, contacts_method, methods
from umbel_server.operator.admitted_sites import load_sites
from umbel_server.operator.certificates import to_renew
from umbel_server.operator.config import ServerConfig, carrier_socket
from umbel_server.port.contacts import Contacts
from umbel_server.port.gate import Gate
from umbel_server.port.listener import server
from umbel_server.port.mailbox import NodeMailbox
from umbel_server.port.superlink import SuperLink

_LOOK_SECONDS = 0.5
_DAY = timedelta(days=1)
_CARRIER_MODE = 0o660
_STOPPING_SECONDS = 5.0

_logger = logging.getLogger("umbel.port")


class AdmittedSites:
    """The sites of sites.json; the file is read again when it changes."""

    def __init__(self, path: Path, superlink: SuperLink) -> None:
        self._path = path
        self._superlink = superlink
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, str] = {}
        self._nodes: dict[str, int] = {}

    def keys(self) -> dict[str, str]:
        """Returns relay public key (PEM) -> site."""
        return self._keys

    def node(self, site: str) -> int | None:
        """Returns a site's node; None if the site is not admitted."""
        return self._nodes.get(site)

    def look(self) -> None:
        """Reads the file if it has changed. It waits for the disk and the database, so it must not
        be called in the event loop."""
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
        except OSError:
            stamp = (0, 0)
        if stamp == self._stamp:
            return
        try:
            sites = load_sites(self._path)
            # Turned away at once, however long the database takes to let the others in.
            keys = {site.relay_key: site.name for site in sites.values() if not site.revoked}
            self._keys = {key: name for key, name in self._keys.items() if keys.get(key) == name}
            nodes = {name: self._superlink.register(key.encode()) for key, name in keys.items()}
        except (UmbelError, SQLAlchemyError) as error:
            # What was read before stays in force, and it is tried again if it was the database.
            if isinstance(error, UmbelError):
                self._stamp = stamp
            _logger.error("%s", _reason(error))
            return
        self._stamp, self._nodes, self._keys = stamp, nodes, keys
        _logger.info("admitted: %s", ", ".join(sorted(nodes)) or "nobody yet")


def _reason(error: UmbelError | SQLAlchemyError) -> str:
    if isinstance(error, UmbelError):
        return error.diagnostics()
    return f"the SuperLink's database: {str(error).splitlines()[0]}"


class Calendar:
    """Writes to the log, once a day, which certificates expire soon."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._next: datetime | None = None

    def look(self, now: datetime) -> None:
        """Looks at the certificates if a day has passed.

        Args:
            now: the time, with its time zone.
        """
        if self._next is not None and now < self._next:
            return
        self._next = now + _DAY
        try:
            for sentence in to_renew(self._config, now):
                _logger.warning("%s", sentence)
        except UmbelError as error:
            # A certificate or sites.json may just be being replaced: the port keeps serving.
            _logger.error("%s", error.diagnostics())


class SiteMailbox:
    """The `Mailbox` of the port: messages to sites, which it posts to their nodes."""

    def __init__(self, nodes: NodeMailbox, admitted: AdmittedSites) -> None:
        self._nodes = nodes
        self._admitted = admitted

    def post(
        self, site: str, label: str, sealed: Iterator[bytes], seconds: float, largest_reply: int
    ) -> str | None:
        """See `Mailbox`."""
        node = self._admitted.node(site)
        if node is None:
            return None
        return self._nodes.post(node, label, sealed, seconds, largest_reply)

    def collect(self, identifier: str) -> tuple[bool, Iterator[bytes] | None]:
        """See `Mailbox`."""
        reply = self._nodes.collect(identifier)
        return (False, None) if reply is None else (True, reply.pieces)

    def wait(self, identifiers: Sequence[str], seconds: float) -> None:
        """See `Mailbox`."""
        self._nodes.wait(identifiers, seconds)

    def forget(self, identifier: str) -> None:
        """See `Mailbox`."""
        self._nodes.forget(identifier)


def serve(
    config: ServerConfig,
    listener: socket.socket,
    context: ssl.SSLContext,
    stopping: threading.Event,
) -> None:
    """Serves sites and jobs until `stopping`.

    Raises:
        StorageError: the socket to the jobs cannot be opened.
    """
    adopt("flwr")
    superlink = SuperLink()
    nodes = NodeMailbox(superlink)
    superlink.make_way = nodes.make_way
    admitted = AdmittedSites(Path(config.sites), superlink)
    admitted.look()
    contacts = Contacts()
    gate = Gate(
        superlink.fleet,
        read_admitted=admitted.keys,
        on_refused=lambda reason: _logger.warning("turned away: %s", reason),
        on_heard=contacts.heard,
    )
    web = server(gate, context)
    carrier = SocketServer(carrier_socket(config), _CARRIER_MODE, workers=16)
    mailbox = methods(SiteMailbox(nodes, admitted))
    carrier.add(CARRIER, {**mailbox, "Contacts": contacts_method(contacts.read)})
    carrier.start()
    thread = threading.Thread(target=web.run, args=([listener],), name="listener")
    thread.start()
    _logger.info("this server listens at %s", config.listen.address)
    # The objects of now stay: the garbage collector, which the gate calls often, skips them.
    gc.freeze()
    calendar = Calendar(config)
    try:
        while thread.is_alive() and not stopping.wait(_LOOK_SECONDS):
            carrier.report_health(web.started)
            admitted.look()
            calendar.look(datetime.now(UTC))
    finally:
        carrier.stop(_STOPPING_SECONDS)
        # The web server waits for its requests, and relays' questions wait for messages.
        superlink.expected.close()
        web.should_exit = True
        thread.join(_STOPPING_SECONDS)
        superlink.close()
        _logger.info("the port is closed")
