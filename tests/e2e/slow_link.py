"""A line between a relay and the port: slow, and cut when a test wants it."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from support.waiting import HANGING

_AT_ONCE = 1 << 16


class SlowLink:
    """A TCP proxy that lets so many bytes a second through in each direction."""

    def __init__(self, target: int, bytes_per_second: float) -> None:
        """`target`: the port behind it, on this machine."""
        self._target = target
        self._rate = bytes_per_second
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self.up = 0
        """Bytes from the relay to the server so far, TLS and HTTP around them included."""
        self.down = 0
        self.cuts = 0
        self._cut_at: int | None = None
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut_after(self, bytes_up: int) -> None:
        """Cuts every connection, once, when so many bytes more have gone up."""
        with self._lock:
            self._cut_at = self.up + bytes_up

    def close(self) -> None:
        """Ends all connections."""
        # A listener that a thread waits at is not closed by closing it.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join(HANGING)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            for source, sink, count in (
                (client, server, self._count_up),
                (server, client, self._count_down),
            ):
                threading.Thread(
                    target=self._pass_on, args=(source, sink, count), daemon=True
                ).start()

    def _pass_on(
        self, source: socket.socket, sink: socket.socket, count: Callable[[int], None]
    ) -> None:
        with suppress(OSError):
            while data := source.recv(_AT_ONCE):
                time.sleep(len(data) / self._rate)
                count(len(data))
                sink.sendall(data)
        self._end(source, sink)

    def _count_up(self, size: int) -> None:
        with self._lock:
            self.up += size
            cut = self._cut_at is not None and self.up >= self._cut_at
            if cut:
                self._cut_at = None
        if cut:
            self.cut()

    def _count_down(self, size: int) -> None:
        with self._lock:
            self.down += size

    def cut(self) -> None:
        """Cuts every connection now."""
        with self._lock:
            connections, self._open = self._open, set()
            self.cuts += 1
        self._end(*connections)

    def _end(self, *connections: socket.socket) -> None:
        with self._lock:
            self._open -= set(connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
