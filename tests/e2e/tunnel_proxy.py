"""An HTTP proxy as a site's network has one: CONNECT and nothing else, perhaps for a password."""

import select
import socket
import threading
from base64 import b64encode
from contextlib import suppress

from support.waiting import HANGING


class TunnelProxy:
    """It sees a name, and TLS."""

    def __init__(self, user: str = "", password: str = "") -> None:
        """Without a user it serves everybody."""
        self.targets: set[str] = set()
        """What tunnels were made to."""
        self._login = b64encode(f"{user}:{password}".encode()) if user else None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "TunnelProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(HANGING)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(ConnectionError), client:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            method, target, _ = head.split(b" ", 2)
            assert method == b"CONNECT"
            if self._login is not None and b"Basic " + self._login + b"\r\n" not in head:
                client.sendall(
                    b"HTTP/1.1 407 Proxy Authentication Required\r\n"
                    b'Proxy-Authenticate: Basic realm="clinic"\r\nContent-Length: 0\r\n\r\n'
                )
                return
            self.targets.add(target.decode())
            host, _, port = target.decode().rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                _carry(client, server)


def _carry(client: socket.socket, server: socket.socket) -> None:
    """Both ways, until one side ends."""
    while True:
        ready, _, _ = select.select([client, server], [], [])
        for one, other in ((client, server), (server, client)):
            if one in ready:
                data = one.recv(1 << 16)
                if not data:
                    return
                other.sendall(data)
