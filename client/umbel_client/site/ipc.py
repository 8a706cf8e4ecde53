"""What a site's processes say to each other over Unix sockets.

There are two sockets. The relay's socket carries sealed bytes and nothing else: a process that can
use it can say to the trainer what a server can say, and no more. The control socket is for the
site's own people: what they see there never leaves the site.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc
import msgspec

from umbel_common.protocol.wire import size_limit
from umbel_host.transport.sockets import channel, joined, pieces, unreachable

TRAINER = "umbel.v1.Trainer"
CONTROL = "umbel.v1.Control"
LARGEST_REPLY = 1 << 31
"""Bytes; no adapter is larger. A relay, which knows no plan, takes no larger reply."""


class SiteEvent(msgspec.Struct, frozen=True):
    """Something that happened at the trainer, for `umbel-client watch` and logs."""

    time: float
    """Seconds since 1970."""
    kind: str
    """One of preparing, charged, step, finished, refused and note."""
    text: str
    """A text for people."""


def against_readers(honest: int) -> str:
    """Whom an epsilon holds against, for people.

    Args:
        honest: number of sites in each sum, this one included, whose noise they must not know.
    """
    return f"against readers of the sums, while {honest} sites in each keep their noise secret"


class SharedEpsilon(msgspec.Struct, frozen=True):
    """What was spent on the data set against readers of the sums whose noise sites share."""

    epsilon: float
    honest: int
    """Number of sites in each sum, this one included, whose noise those readers must not know."""

    def text(self) -> str:
        """The figure for people, with what it rests on."""
        return f"epsilon {self.epsilon:.4g} {against_readers(self.honest)}"


class TrainerStatus(msgspec.Struct, frozen=True):
    """The state of the trainer, for the site's own people."""

    site: str
    federation: str
    isolated: bool
    """Whether the trainer has neither a network nor another way out."""
    paused: bool
    waiting: tuple[str, ...]
    """Jobs whose plans wait for approval."""
    epsilon: float | None
    """Epsilon spent on the data set, against everybody, when a round was last charged;
    `umbel-client budget` reads the ledger itself."""
    last: SiteEvent | None
    """The last event."""
    not_apart: str | None = None
    """Why trainer and relay are not kept apart; None if nothing speaks against it."""
    device: str | None = None
    """The device that trains, with its model and memory where it is a GPU."""
    memory: str | None = None
    """The memory in use: of a GPU, or of the trainer's process."""
    starting: bool = False
    """Whether it does not take requests yet: it reads data and model."""
    pinned: str | None = None
    """Digest of what the trainer holds for the pinned roster and for revoked keys."""
    shared: SharedEpsilon | None = None
    """The second total at that moment; None: nothing was charged in distributed mode."""


Handle = Callable[[bytes], bytes]


def handle_method(
    handle: Handle, largest: Callable[[], int] = lambda: size_limit(None)
) -> grpc.RpcMethodHandler:
    """Method `Handle`: the pieces of a sealed request in, the pieces of a sealed reply out.

    One message is taken at a time: what calls there are beside it wait at the other end.

    Args:
        largest: returns the size of the largest request that `handle` can need, in bytes; of what
            is larger, it gets a beginning, which it refuses for its size.
    """
    turn = threading.Lock()

    def answer(request: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        with turn:
            reply = handle(joined(request, largest()))
        yield from pieces(reply)

    return grpc.stream_stream_rpc_method_handler(answer)


def largest_method(largest: Callable[[], int]) -> grpc.RpcMethodHandler:
    """Method `Largest`: the size of the largest request that the trainer takes, in bytes."""
    return grpc.unary_unary_rpc_method_handler(lambda _, __: str(largest()).encode())


class TrainerStub:
    """The relay's end of the trainer's socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel = channel(path)
        self._handle = self._channel.stream_stream(f"/{TRAINER}/Handle")
        self._largest = self._channel.unary_unary(f"/{TRAINER}/Largest")

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def handle(self, sealed: bytes) -> bytes:
        """The trainer's sealed reply; waits for a trainer that is being restarted.

        Raises:
            UnreachableError: the trainer ended before it answered.
        """
        return joined(self.stream([sealed]), LARGEST_REPLY)

    def largest(self) -> int:
        """The size of the largest request that the trainer takes, in bytes; waits as `handle` does.

        Raises:
            UnreachableError: the trainer ended before it answered.
        """
        try:
            return int(self._largest(b"", wait_for_ready=True))
        except grpc.RpcError as error:
            raise unreachable(self._path, error) from None

    def stream(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """As `handle`, with request and reply in parts of any size.

        Raises:
            UnreachableError: while the reply is read.
        """
        request = (piece for part in parts for piece in pieces(part))
        try:
            yield from self._handle(request, wait_for_ready=True)
        except grpc.RpcError as error:
            raise unreachable(self._path, error) from None


class ControlStub:
    """The end of the control socket for the site's own people."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel = channel(path)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def status(self, seconds: float = 5.0) -> TrainerStatus:
        """The state of the trainer.

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
        """Events from now on, until the trainer ends.

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
    """Method `Status`."""
    return grpc.unary_unary_rpc_method_handler(lambda _, __: msgspec.json.encode(status()))


def watch_method(
    events: Callable[[Callable[[], bool]], Iterator[SiteEvent]],
) -> grpc.RpcMethodHandler:
    """Method `Watch`: `events` gets a function that says whether the caller is still there."""

    def watch(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for event in events(context.is_active):
            yield msgspec.json.encode(event)

    return grpc.unary_stream_rpc_method_handler(watch)
