"""Runs the port: the SuperLink behind its gate, and the mailbox that the jobs post to."""

import gc
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from umbel_common.errors import UmbelError
from umbel_host.processes.log import adopt
from umbel_host.transport.sockets import SocketServer
from umbel_server.messaging.carrier import CARRIER, methods
from umbel_server.operator.admitted_sites import SiteEntry, load_sites
from umbel_server.operator.certificates import to_renew
from umbel_server.operator.config import ServerConfig, carrier_socket
from umbel_server.port.gate import Gate, server
from umbel_server.port.mailbox import NodeMailbox
from umbel_server.port.superlink import SuperLink

_LOOK_SECONDS = 1.0
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
        self._looked = 0.0
        self._lock = threading.Lock()
        self._keys: dict[str, str] = {}
        self._nodes: dict[str, int] = {}

    def keys(self) -> dict[str, str]:
        """Returns relay public key (PEM) -> site."""
        self._look()
        return self._keys

    def node(self, site: str) -> int | None:
        """Returns a site's node; None if the site is not admitted."""
        self._look()
        return self._nodes.get(site)

    def _look(self) -> None:
        with self._lock:
            if time.monotonic() - self._looked < _LOOK_SECONDS and self._stamp is not None:
                return
            self._looked = time.monotonic()
            try:
                status = self._path.stat()
                stamp = (status.st_mtime_ns, status.st_ino)
            except OSError:
                stamp = (0, 0)
            if stamp == self._stamp:
                return
            try:
                sites = load_sites(self._path)
            except UmbelError as error:
                # The list that was read before stays in force.
                _logger.error("%s", error.diagnostics())
                return
            self._stamp = stamp
            self._take(sites)

    def _take(self, sites: dict[str, SiteEntry]) -> None:
        keys = {site.relay_key: site.name for site in sites.values() if not site.revoked}
        self._nodes = {name: self._superlink.register(key.encode()) for key, name in keys.items()}
        self._keys = keys
        _logger.info("admitted: %s", ", ".join(sorted(self._nodes)) or "nobody yet")


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

    def post(self, site: str, label: str, sealed: Iterator[bytes], seconds: float) -> str | None:
        """See `Mailbox`."""
        node = self._admitted.node(site)
        return None if node is None else self._nodes.post(node, label, sealed, seconds)

    def collect(self, identifier: str) -> tuple[bool, Iterator[bytes] | None]:
        """See `Mailbox`."""
        reply = self._nodes.collect(identifier)
        return (False, None) if reply is None else (True, reply.pieces)


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
    admitted = AdmittedSites(Path(config.sites), superlink)
    admitted.keys()
    gate = Gate(
        superlink.fleet,
        read_admitted=admitted.keys,
        on_activate=lambda key: nodes.make_way(key.encode()),
        on_refused=lambda reason: _logger.warning("turned away: %s", reason),
    )
    web = server(gate, context)
    carrier = SocketServer(carrier_socket(config), _CARRIER_MODE, workers=16)
    carrier.add(CARRIER, methods(SiteMailbox(nodes, admitted)))
    carrier.start()
    thread = threading.Thread(target=web.run, args=([listener],), name="listener")
    thread.start()
    _logger.info("this server listens at %s", config.listen.address)
    # The objects of now stay: the garbage collector, which the gate calls often, skips them.
    gc.freeze()
    calendar = Calendar(config)
    try:
        while thread.is_alive() and not stopping.wait(1.0):
            carrier.report_health(web.started)
            calendar.look(datetime.now(UTC))
    finally:
        carrier.stop(_STOPPING_SECONDS)
        web.should_exit = True
        thread.join(_STOPPING_SECONDS)
        superlink.close()
