"""gRPC over Unix sockets between a site's processes: a trainer that is asked, and who asks.

Two sockets. The relay's carries sealed bytes and nothing else: whoever holds it can say to the
trainer what a server can say, no more. The control socket is for the site's own people: what they
see there never leaves the site. Both serve grpc.health.v1, for probes.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from umbel_common.errors import StorageError, UnreachableError

TRAINER = "umbel.v1.Trainer"
CONTROL = "umbel.v1.Control"
_CHUNK_BYTES = 1 << 20
"""A sealed message may be larger than what gRPC takes at once: it travels in pieces."""
_LONGEST_PATH = 107
"""Bytes of a path that fit a socket's address."""


class SiteEvent(msgspec.Struct, frozen=True):
    """Something that happened at the trainer, for `umbel-client watch` and logs."""

    time: float
    """Seconds since 1970."""
    kind: str
    """preparing, charged, step, refused or answered."""
    text: str
    """For people."""


class TrainerStatus(msgspec.Struct, frozen=True):
    """How the trainer stands, for the site's own people."""

    site: str
    federation: str
    isolated: bool
    """Whether the trainer has no network."""
    paused: bool
    waiting: tuple[str, ...]
    """Jobs whose plans wait for approval."""
    epsilon: float | None
    """Spent on the data set, as this process last heard: `umbel-client budget` reads the ledger."""
    last: SiteEvent | None
    """What happened last."""


Handle = Callable[[bytes], bytes]


class SocketServer:
    """A gRPC server on one Unix socket."""

    def __init__(self, path: Path, mode: int, *, workers: int = 8) -> None:
        """Args:
        mode: of the socket's file: who may connect.

        Raises:
            StorageError: the path is too long, in use, or its folder not writable.
        """
        self._path = path
        self._mode = mode
        self._health = health.HealthServicer()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=path.stem)
        self._server = grpc.server(self._pool)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(self, service: str, methods: dict[str, grpc.RpcMethodHandler]) -> None:
        """Serves `methods` under the name of a service; before `start`."""
        handlers = grpc.method_handlers_generic_handler(service, methods)
        self._server.add_generic_rpc_handlers((handlers,))

    def start(self) -> None:
        """Begins to answer; nobody but the file's owner and group can connect at any moment."""
        _make_room(self._path)
        former = os.umask(0o777 & ~self._mode)
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise StorageError(
                "a socket cannot be opened", file=self._path, found=str(error).splitlines()[0]
            ) from None
        finally:
            os.umask(former)
        self._server.start()

    def serving(self, healthy: bool) -> None:
        """What probes are told."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        self._health.set("", status.SERVING if healthy else status.NOT_SERVING)

    def stop(self, seconds: float) -> None:
        """Takes nothing new, and lets calls under way end within `seconds`."""
        self.serving(False)
        self._server.stop(seconds).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._path.unlink(missing_ok=True)


def handle_method(handle: Handle) -> grpc.RpcMethodHandler:
    """`Handle`: the pieces of a sealed request in, the pieces of a sealed reply out."""

    def answer(request: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        yield from _pieces(handle(_joined(request)))

    return grpc.stream_stream_rpc_method_handler(answer)


class TrainerStub:
    """The relay's end of the trainer's socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel = _channel(path)
        self._handle = self._channel.stream_stream(f"/{TRAINER}/Handle")

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def handle(self, sealed: bytes) -> bytes:
        """The trainer's sealed reply; waits for a trainer that is being restarted.

        Raises:
            UnreachableError: the trainer ended before it answered.
        """
        try:
            return _joined(self._handle(_pieces(sealed), wait_for_ready=True))
        except grpc.RpcError as error:
            raise unreachable(self._path, error) from None


def healthy(path: Path, seconds: float) -> bool:
    """Whether the process behind a socket says that it is well.

    Raises:
        UnreachableError: it does not answer within `seconds`.
    """
    with _channel(path) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError as error:
            raise unreachable(path, error) from None
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class ControlStub:
    """The end of the control socket for the site's own people."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel = _channel(path)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def status(self, seconds: float = 5.0) -> TrainerStatus:
        """How the trainer stands.

        Raises:
            UnreachableError: it does not answer.
        """
        call = self._channel.unary_unary(f"/{CONTROL}/Status")
        try:
            answer = call(b"", timeout=seconds)
        except grpc.RpcError as error:
            raise unreachable(self._path, error) from None
        return msgspec.json.decode(answer, type=TrainerStatus)

    def watch(self) -> Iterator[SiteEvent]:
        """What happens from now on, until the trainer ends.

        Raises:
            UnreachableError: it does not answer.
        """
        call = self._channel.unary_stream(f"/{CONTROL}/Watch")
        try:
            for event in call(b""):
                yield msgspec.json.decode(event, type=SiteEvent)
        except grpc.RpcError as error:
            raise unreachable(self._path, error) from None


def status_method(status: Callable[[], TrainerStatus]) -> grpc.RpcMethodHandler:
    """`Status`."""
    return grpc.unary_unary_rpc_method_handler(lambda _, __: msgspec.json.encode(status()))


def watch_method(
    events: Callable[[Callable[[], bool]], Iterator[SiteEvent]],
) -> grpc.RpcMethodHandler:
    """`Watch`: `events` is told how to find out whether the caller is still there."""

    def watch(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for event in events(context.is_active):
            yield msgspec.json.encode(event)

    return grpc.unary_stream_rpc_method_handler(watch)


def unreachable(path: Path, error: grpc.RpcError) -> UnreachableError:
    """A process of this site that does not answer."""
    return UnreachableError(
        "a process of this site does not answer",
        file=path,
        found=getattr(error, "details", lambda: str(error))(),
        remedy="see that `umbel-client run` is running, and that you may open its socket",
    )


def _channel(path: Path) -> grpc.Channel:
    # Without this option gRPC would look for a proxy of the machine, also for a file.
    return grpc.insecure_channel(f"unix:{path}", options=(("grpc.enable_http_proxy", 0),))


def _pieces(message: bytes) -> Iterator[bytes]:
    view = memoryview(message)
    for start in range(0, max(len(message), 1), _CHUNK_BYTES):
        yield bytes(view[start : start + _CHUNK_BYTES])


def _joined(pieces: Iterator[bytes]) -> bytes:
    # Its value is handed out without a copy.
    buffer = io.BytesIO()
    for piece in pieces:
        buffer.write(piece)
    return buffer.getvalue()


def _make_room(path: Path) -> None:
    """Removes the socket of a process that was killed; a living one's is not removed."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise StorageError(
            "the path of a socket is too long",
            file=path,
            found=f"{len(os.fsencode(path))} bytes",
            accepted=f"at most {_LONGEST_PATH} bytes",
        )
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise StorageError("the path of a socket is taken by another file", file=path)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            "a socket's folder cannot be used", file=path.parent, found=error.strerror
        ) from None
