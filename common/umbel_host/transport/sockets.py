"""gRPC over Unix sockets between processes of one machine, with grpc.health.v1 for probes."""

import io
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from umbel_common.errors import StorageError, UnreachableError
from umbel_host.processes.lifecycle import reason

_PIECE_BYTES = 1 << 20
"""Size of a piece: a message may be larger than gRPC takes at once."""
_CALLS_PER_WORKER = 8
_OPTIONS = (
    # gRPC would look for a proxy of the machine even for a file.
    ("grpc.enable_http_proxy", 0),
    # The longer a process is away, the later gRPC would look for it again: after two minutes in the
    # end. To look for a file costs nothing.
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_LONGEST_PATH = 107
"""Number of bytes of a path that fit a socket's address."""


class SocketServer:
    """A gRPC server on one Unix socket."""

    def __init__(self, path: Path, mode: int, *, workers: int = 8) -> None:
        """Prepares a server; `start` opens its socket.

        Args:
            mode: permissions of the socket's file, which say who may connect.
        """
        self._path = path
        self._mode = mode
        self._health = health.HealthServicer()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=path.stem)
        # More calls than this are refused, and not kept until a worker is free.
        self._server = grpc.server(self._pool, maximum_concurrent_rpcs=_CALLS_PER_WORKER * workers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(self, service: str, methods: dict[str, grpc.RpcMethodHandler]) -> None:
        """Adds a service of this name with `methods`; to be called before `start`."""
        handlers = grpc.method_handlers_generic_handler(service, methods)
        self._server.add_generic_rpc_handlers((handlers,))

    def start(self) -> None:
        """Opens the socket and begins to answer.

        At no moment can anybody connect whom `mode` does not allow to.

        Raises:
            StorageError: the path is too long or in use, or its folder cannot be written.
        """
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

    def report_health(self, healthy: bool) -> None:
        """Sets the answer that probes get."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        self._health.set("", status.SERVING if healthy else status.NOT_SERVING)

    def stop(self, seconds: float) -> None:
        """Takes no new call, and gives those under way `seconds` to end."""
        self.report_health(False)
        self._server.stop(seconds).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._path.unlink(missing_ok=True)


def is_healthy(path: Path, seconds: float) -> bool:
    """Whether the process behind a socket says that it is well.

    Raises:
        UnreachableError: it does not answer within `seconds`.
    """
    with channel(path) as connection:
        stub: Any = health_pb2_grpc.HealthStub(connection)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError as error:
            raise unreachable(path, error) from None
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def channel(path: Path) -> grpc.Channel:
    """A connection to the process behind a socket."""
    return grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)


def pieces(message: bytes) -> Iterator[bytes]:
    """The pieces of a message, at least one."""
    view = memoryview(message)
    for start in range(0, max(len(message), 1), _PIECE_BYTES):
        yield bytes(view[start : start + _PIECE_BYTES])


def joined(parts: Iterable[bytes], limit: int) -> bytes:
    """The message that these pieces make, cut one byte past `limit`.

    The process at the other end must not be able to fill this process' memory: a longer message is
    not read to its end, and the receiver refuses what it has of it for its size.
    """
    # A BytesIO hands its value out without a copy.
    buffer = io.BytesIO()
    for piece in parts:
        buffer.write(piece[: limit + 1 - buffer.tell()])
        if buffer.tell() > limit:
            break
    return buffer.getvalue()


def unreachable(path: Path, error: grpc.RpcError) -> UnreachableError:
    """The error for a process of ours that does not answer."""
    return UnreachableError(
        "another process of this machine does not answer",
        file=path,
        found=getattr(error, "details", lambda: str(error))(),
        remedy="check that it is running, and that you may open its socket",
    )


def _make_room(path: Path) -> None:
    """Makes the folder of a socket, and removes a socket that an earlier process left there."""
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
            "a socket's folder cannot be used", file=path.parent, found=reason(error)
        ) from None
