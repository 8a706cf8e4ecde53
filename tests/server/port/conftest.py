"""A listening port in this process, with certificates, and clients of all kinds."""

import base64
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from anyio.to_thread import current_default_thread_limiter
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.waiting import HANGING

from umbel_server.operator.authority import (
    Authority,
    certificate_pem,
    key_pem,
    new_authority,
    new_key,
)
from umbel_server.port import gate, listener


@dataclass(frozen=True)
class Certified:
    """One site's relay."""

    name: str
    key: str
    """The public key, PEM."""
    context: ssl.SSLContext


class Kit:
    """An operator's certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        now, ca_key, server_key = datetime.now(UTC), new_key(), new_key()
        self._authority = Authority(new_authority("clinics", ca_key, now), ca_key)
        made = self._authority.server(server_key.public_key(), ["127.0.0.1"], now)
        for name, data in {
            "ca.pem": certificate_pem(self._authority.certificate),
            "server.pem": certificate_pem(made),
            "server-key.pem": key_pem(server_key),
        }.items():
            self._write(name, data)

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        path.chmod(0o600)
        return path

    def server_context(self) -> ssl.SSLContext:
        names = ("server.pem", "server-key.pem", "ca.pem")
        return listener.tls_context(*(self.folder / name for name in names))

    def stranger(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    def site(self, name: str) -> Certified:
        key = new_key()
        certificate = self._authority.site(name, key.public_key(), datetime.now(UTC))
        context = self.stranger()
        context.load_cert_chain(
            self._write(f"{name}.pem", certificate_pem(certificate)),
            self._write(f"{name}-key.pem", key_pem(key)),
        )
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return Certified(name, public.decode(), context)


class Port:
    """A gate, whose Flower is an echo, on a port of this machine."""

    def __init__(self, kit: Kit, sites: list[Certified]) -> None:
        self.kit = kit
        self.refused: list[str] = []
        self.bodies: list[int] = []
        """The sizes of the bodies that came through."""
        self.working = threading.Event()
        """Cleared, it makes Flower's work last."""
        self.threads = 0.0
        """How many threads work for Flower at most."""
        self.answer: bytes | None = None
        """What Flower answers, instead of the request's body."""
        self.working.set()
        admitted = {site.key: site.name for site in sites}
        self._gate = gate.Gate(self._echo, lambda: admitted, self.refused.append)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.number = int(self._listening.getsockname()[1])
        self.server: Any = listener.server(self._gate, kit.server_context())
        self._thread = threading.Thread(target=self.server.run, args=([self._listening],))
        self._thread.start()
        wait_until(lambda: self.server.started)

    def close(self) -> None:
        self.working.set()
        self.server.should_exit = True
        self.server.force_exit = True
        self._thread.join(HANGING)

    async def _echo(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
            return
        self.threads = current_default_thread_limiter().total_tokens
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(len(body))
        body = body if self.answer is None else self.answer
        while not self.working.is_set():
            await gate.asyncio.sleep(0.01)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", str(len(body)).encode())],
            }
        )
        await send({"type": "http.response.body", "body": body})

    @property
    def door(self) -> Any:
        (made,) = self.server.servers
        return made

    def connect(self) -> socket.socket:
        """A plain connection that says nothing."""
        opened = socket.create_connection(("127.0.0.1", self.number), timeout=HANGING)
        opened.settimeout(HANGING)
        return opened

    def secure(self, who: Certified | ssl.SSLContext) -> ssl.SSLSocket:
        context = who.context if isinstance(who, Certified) else who
        return context.wrap_socket(self.connect(), server_hostname="127.0.0.1")


def request(
    site: Certified, path: str = gate.ACTIVATE, body: bytes = b"", *headers: bytes, **more: Any
) -> bytes:
    """A request of a site's; `length=N` announces another size than the body's, None announces
    none."""
    length = more.get("length", len(body))
    lines = [
        f"POST {path} HTTP/1.1".encode(),
        b"host: x",
        b"flwr-public-key: " + base64.b64encode(site.key.encode()),
        *headers,
        *([] if length is None else [f"content-length: {length}".encode()]),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def status(connection: socket.socket) -> int | None:
    """The status of the next answer; None if the connection ends."""
    answer = b""
    try:
        while b"\r\n\r\n" not in answer:
            part = connection.recv(4096)
            if not part:
                return None
            answer += part
    except OSError:
        return None
    head, _, rest = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length")]
    missing = (lengths or [0])[0] - len(rest)
    while missing > 0:
        missing -= len(connection.recv(1 << 16))
    return int(head.split(b" ")[1])


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANGING
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(scope="session")
def east(kit: Kit) -> Certified:
    return kit.site("east")


@pytest.fixture(scope="session")
def north(kit: Kit) -> Certified:
    return kit.site("north")


OpenPort = Callable[..., Port]


@pytest.fixture
def open_port(kit: Kit, east: Certified, north: Certified) -> Iterator[OpenPort]:
    """Opens a port that admits east, north and the sites that are given."""
    opened: list[Port] = []

    def open_one(*more: Certified) -> Port:
        opened.append(Port(kit, [east, north, *more]))
        return opened[-1]

    yield open_one
    for port in opened:
        port.close()


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))
