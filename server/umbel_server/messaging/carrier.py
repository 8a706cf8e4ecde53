"""Between the operator's two processes: the one with jobs and key, and the one with the port.

A Unix socket. `Post` leaves a sealed message for a site, `Collect` asks for its reply, once it is
there. The process with the port never sees the operator's key, and cannot read or change what it
carries unnoticed.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import grpc
import msgspec

from umbel_host.transport.sockets import channel, joined, pieces
from umbel_server.messaging.link import JobStopped, Step

CARRIER = "umbel.v1.Carrier"
_POLL_SECONDS = 0.05
_AGAIN_SECONDS = 0.5
_KEPT_BYTES = 1 << 20
"""A message up to this size is kept until its reply is there, to be posted again if it is lost."""


class _Address(msgspec.Struct, frozen=True):
    """The first piece of a `Post`."""

    site: str
    label: str
    seconds: float


class Posted(msgspec.Struct, frozen=True):
    """The answer to a `Post`."""

    identifier: str | None
    """Of the message; None while the site was never connected, or is not admitted."""


class _Collected(msgspec.Struct, frozen=True):
    """The first piece of the answer to a `Collect`."""

    over: bool
    """Whether anything will still come."""
    replied: bool = False
    """Whether the reply follows."""


class Mailbox(Protocol):
    """What the process with the port offers."""

    def post(self, site: str, label: str, sealed: Iterator[bytes], seconds: float) -> str | None:
        """Leaves a message for a site; its ID, or None while that cannot be.

        Args:
            sealed: the message in parts; whatever its size, it is not put together.
        """
        ...

    def collect(self, identifier: str) -> tuple[bool, Iterator[bytes] | None]:
        """Whether the waiting is over, and the sealed reply in pieces if there is one. Who does not
        read to the end may collect it again."""
        ...


def methods(mailbox: Mailbox) -> dict[str, grpc.RpcMethodHandler]:
    """The service over a mailbox."""

    def post(request: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
        address = msgspec.json.decode(next(request), type=_Address)
        identifier = mailbox.post(address.site, address.label, request, address.seconds)
        return msgspec.json.encode(Posted(identifier))

    def collect(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        over, sealed = mailbox.collect(request.decode())
        yield msgspec.json.encode(_Collected(over, sealed is not None))
        if sealed is not None:
            for piece in sealed:
                yield from pieces(piece)

    return {
        "Post": grpc.stream_unary_rpc_method_handler(post),
        "Collect": grpc.unary_stream_rpc_method_handler(collect),
    }


class _Waiting:
    """A site whose reply has not come."""

    def __init__(self, site: str, sealed: bytes | None, identifier: str | None) -> None:
        self.site = site
        self.sealed = sealed
        self.identifier = identifier
        self.next_post = 0.0


class CarrierLink:
    """`ports.Link` over the socket; outlives the other process, which may be restarted."""

    def __init__(self, path: Path, stopped: Callable[[], bool] = lambda: False) -> None:
        """`stopped`: asked again and again whether to give up, by `JobStopped`."""
        self._path = path
        self._stopped = stopped
        self._channel = channel(path)
        self._post = self._channel.stream_unary(f"/{CARRIER}/Post")
        self._collect = self._channel.unary_stream(f"/{CARRIER}/Collect")

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """See `Link`.

        Small messages are posted again if the other process lost them, or if their site was not
        connected yet; for an adapter that is lost the attempt does without the site.

        Raises:
            JobStopped: the job is to be given up.
        """
        deadline = time.monotonic() + seconds
        waiting = []
        for site, sealed in requests:
            self._check_stopped()
            identifier = self._leave(step, site, sealed, deadline)
            kept = sealed if len(sealed) <= _KEPT_BYTES else None
            waiting.append(_Waiting(site, kept, identifier))
            del sealed, kept
        while waiting and time.monotonic() < deadline:
            self._check_stopped()
            for one in list(waiting):
                over, reply = self._look(step, one, deadline)
                if over:
                    waiting.remove(one)
                if reply is not None:
                    yield one.site, reply
                del reply
            time.sleep(_POLL_SECONDS)

    def _check_stopped(self) -> None:
        if self._stopped():
            raise JobStopped

    def _look(self, step: Step, one: _Waiting, deadline: float) -> tuple[bool, bytes | None]:
        """Whether the waiting for a site is over, and its reply."""
        if one.identifier is None:
            if one.sealed is None:
                return True, None
            if time.monotonic() >= one.next_post:
                one.identifier = self._leave(step, one.site, one.sealed, deadline)
                one.next_post = time.monotonic() + _AGAIN_SECONDS
            return False, None
        try:
            answer = self._collect(one.identifier.encode())
            collected = msgspec.json.decode(next(answer), type=_Collected)
            reply = joined(answer) if collected.replied else None
        except grpc.RpcError:
            # The other process is gone. It may come back with the message or without.
            return False, None
        if not collected.over:
            return False, None
        if reply is None and one.sealed is not None:
            # Lost, or the site went away: what is small is posted again.
            one.identifier, one.next_post = None, time.monotonic() + _AGAIN_SECONDS
            return False, None
        return True, reply

    def _leave(self, step: Step, site: str, sealed: bytes, deadline: float) -> str | None:
        """The ID of the posted message; None while the site was never connected.

        Waits for the other process while it is being restarted: every message goes through it.
        """
        while True:
            address = _Address(site, str(step), max(deadline - time.monotonic(), 1.0))
            try:
                answer = self._post(_request(address, sealed), timeout=address.seconds)
            except grpc.RpcError:
                self._check_stopped()
                if time.monotonic() >= deadline:
                    return None
                time.sleep(_AGAIN_SECONDS)
            else:
                return msgspec.json.decode(answer, type=Posted).identifier


def _request(address: _Address, sealed: bytes) -> Iterator[bytes]:
    yield msgspec.json.encode(address)
    yield from pieces(sealed)
