"""Between the operator's two processes: the one with jobs and key, and the one with the port.

They meet at a Unix socket. `Post` leaves a sealed message for a site, together with the size of the
largest reply that is taken; `Collect` asks for the reply, and `Wait` when to ask.
The process with the port cannot read what it carries, nor change it unnoticed: no key and nothing
unsealed may ever pass here. `Forget` deletes a message that nobody waits for any more. The process
with the port is open to strangers and may say anything: whatever it says that is not an answer is a
lost message, and never an error of the process with the key.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Annotated, Any, Protocol, TypeVar

import grpc
import msgspec

from umbel_common.errors import UnreachableError
from umbel_host.transport.polling import pause
from umbel_host.transport.sockets import channel, joined, pieces, unreachable
from umbel_server.messaging.link import JobStopped, Step

CARRIER = "umbel.v1.Carrier"
_SHORTEST_POLL_SECONDS = 0.05
_LONGEST_POLL_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 1.0
"""How long one `Wait` takes at most: a job that is to stop does not wait longer, for no answer."""
_AGAIN_SECONDS = 0.5
_FORGET_SECONDS, _FORGET_ALL_SECONDS = 10.0, 30.0
"""How long one `Forget` is waited for, and those of a stage together."""
_COMPLAIN_SECONDS = 60.0
_logger = logging.getLogger("umbel.rounds")
T = TypeVar("T")

_KEPT_BYTES = 1 << 20
"""Largest message that is kept until its reply comes, to be posted again if it is lost."""


class _Address(msgspec.Struct, frozen=True):
    """The first piece of a `Post`."""

    site: str
    label: str
    seconds: float
    largest_reply: int
    """Bytes."""


class Posted(msgspec.Struct, frozen=True):
    """The answer to a `Post`."""

    identifier: str | None
    """The message's ID; None if the site was never connected, or is not admitted."""


class _Wait(msgspec.Struct, frozen=True):
    """The request of a `Wait`."""

    identifiers: tuple[str, ...]
    seconds: float


class _Collected(msgspec.Struct, frozen=True):
    """The first piece of the answer to a `Collect`."""

    over: bool
    """Whether the waiting is over: the reply follows, or none will ever come."""
    replied: bool = False
    """Whether the reply follows."""


Moment = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
"""Seconds since 1970; what is later is no date, and the process with the port may say anything."""


class Contact(msgspec.Struct, frozen=True):
    """What the process with the port saw of one site's relay."""

    last: Moment
    """When it spoke last."""
    twice: Moment | None = None
    """When two relays with the site's keys were last seen at once; None: never."""
    places: tuple[str, ...] = ()
    """The addresses of the two."""


class Mailbox(Protocol):
    """What the process with the port offers."""

    def post(
        self, site: str, label: str, sealed: Iterator[bytes], seconds: float, largest_reply: int
    ) -> str | None:
        """Leaves a message for a site; returns its ID, or None if the site cannot get it yet.

        Args:
            sealed: the message in parts, which are not joined, however large it is.
            seconds: how long its sender waits for the reply.
            largest_reply: bytes; a larger reply is not taken.
        """
        ...

    def collect(self, identifier: str) -> tuple[bool, Iterator[bytes] | None]:
        """Returns whether the waiting is over, and the sealed reply in pieces if there is one. A
        reply that was not read to its end can be collected again."""
        ...

    def wait(self, identifiers: Sequence[str], seconds: float) -> None:
        """Waits until one of these messages may be over, but at most so long."""
        ...

    def forget(self, identifier: str) -> None:
        """Deletes a message and whatever came in answer to it."""
        ...


def methods(mailbox: Mailbox) -> dict[str, grpc.RpcMethodHandler]:
    """Returns the handlers of the service over a mailbox."""

    def post(request: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
        address = msgspec.json.decode(next(request), type=_Address)
        identifier = mailbox.post(
            address.site, address.label, request, address.seconds, address.largest_reply
        )
        return msgspec.json.encode(Posted(identifier))

    def collect(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        over, sealed = mailbox.collect(request.decode())
        yield msgspec.json.encode(_Collected(over, sealed is not None))
        if sealed is not None:
            for piece in sealed:
                yield from pieces(piece)

    def wait(request: bytes, _: grpc.ServicerContext) -> bytes:
        asked = msgspec.json.decode(request, type=_Wait)
        mailbox.wait(asked.identifiers, min(asked.seconds, _LONGEST_WAIT_SECONDS))
        return b""

    def forget(request: bytes, _: grpc.ServicerContext) -> bytes:
        mailbox.forget(request.decode())
        return b""

    return {
        "Post": grpc.stream_unary_rpc_method_handler(post),
        "Collect": grpc.unary_stream_rpc_method_handler(collect),
        "Wait": grpc.unary_unary_rpc_method_handler(wait),
        "Forget": grpc.unary_unary_rpc_method_handler(forget),
    }


def contacts_method(read: Callable[[], dict[str, Contact]]) -> grpc.RpcMethodHandler:
    """Method `Contacts`: what was seen of each site's relay, for the operator's commands."""
    return grpc.unary_unary_rpc_method_handler(lambda _, __: msgspec.json.encode(read()))


def read_contacts(path: Path, seconds: float) -> dict[str, Contact]:
    """What the process with the port saw of each site's relay since it started.

    Raises:
        UnreachableError: it does not answer, or not as it should.
    """
    with channel(path) as connection:
        call = connection.unary_unary(f"/{CARRIER}/Contacts")
        try:
            return msgspec.json.decode(call(b"", timeout=seconds), type=dict[str, Contact])
        except grpc.RpcError as error:
            raise unreachable(path, error) from None
        except Exception:
            # Whatever a stranger inside that process can make our decoder raise.
            raise UnreachableError("the process with the port gives no answer", file=path) from None


class _Waiting:
    """A site whose reply has not come yet."""

    def __init__(self, site: str, sealed: bytes | None, identifier: str | None) -> None:
        self.site = site
        self.sealed = sealed
        self.identifier = identifier
        self.next_post = 0.0


class CarrierLink:
    """A `Link` over the socket; it survives a restart of the other process."""

    def __init__(self, path: Path, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Args:
        should_stop: whether to raise `JobStopped`; called again and again.
        """
        self._path = path
        self._should_stop = should_stop
        self._channel = channel(path)
        self._post = self._channel.stream_unary(f"/{CARRIER}/Post")
        self._collect = self._channel.unary_stream(f"/{CARRIER}/Collect")
        self._wait = self._channel.unary_unary(f"/{CARRIER}/Wait")
        self._complained = -math.inf
        self._forget = self._channel.unary_unary(f"/{CARRIER}/Forget")

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """See `Link`.

        Small messages are posted again if the other process lost them, or if their site was not
        connected yet. If an adapter is lost, the attempt continues without its site.

        Raises:
            JobStopped: the job is to stop.
        """
        began = time.monotonic()
        deadline = began + seconds
        waiting: list[_Waiting] = []
        try:
            for site, sealed in requests:
                self._check_stopped()
                identifier = self._leave(step, site, sealed, deadline)
                kept = sealed if len(sealed) <= _KEPT_BYTES else None
                waiting.append(_Waiting(site, kept, identifier))
                del sealed, kept
            while waiting and time.monotonic() < deadline:
                self._check_stopped()
                asked = time.monotonic()
                self._until_news(waiting)
                before = len(waiting)
                for one in list(waiting):
                    over, reply = self._look(step, one, deadline)
                    if over:
                        waiting.remove(one)
                    if reply is not None:
                        yield one.site, reply
                    del reply
                if len(waiting) == before:
                    # The other process may say anything: it is asked no more often than without it.
                    now = time.monotonic()
                    least = pause(
                        now - began, shortest=_SHORTEST_POLL_SECONDS, longest=_LONGEST_POLL_SECONDS
                    )
                    time.sleep(max(least - (now - asked), 0.0))
        finally:
            self._abandon(waiting)

    def _until_news(self, waiting: Sequence[_Waiting]) -> None:
        """Waits until a reply may be there, as far as the other process can say."""
        posted = tuple(one.identifier for one in waiting if one.identifier is not None)
        # A site that could not get its message yet gets it soon.
        seconds = _LONGEST_WAIT_SECONDS if len(posted) == len(waiting) else _AGAIN_SECONDS
        if posted:
            with suppress(grpc.RpcError):
                self._wait(msgspec.json.encode(_Wait(posted, seconds)), timeout=2 * seconds)

    def _abandon(self, waiting: list[_Waiting]) -> None:
        """Deletes the messages that were not answered: what comes now would stay for nobody."""
        deadline = time.monotonic() + _FORGET_ALL_SECONDS
        for one in waiting:
            seconds = min(_FORGET_SECONDS, deadline - time.monotonic())
            if one.identifier is not None and seconds > 0:
                # If the other process does not answer, it deletes what has expired, and its next
                # start deletes everything.
                with suppress(grpc.RpcError):
                    self._forget(one.identifier.encode(), timeout=seconds)

    def _check_stopped(self) -> None:
        if self._should_stop():
            raise JobStopped

    def _look(self, step: Step, one: _Waiting, deadline: float) -> tuple[bool, bytes | None]:
        """Returns whether the waiting for a site is over, and its reply if there is one."""
        if one.identifier is None:
            if one.sealed is None:
                return True, None
            if time.monotonic() >= one.next_post:
                one.identifier = self._leave(step, one.site, one.sealed, deadline)
                one.next_post = time.monotonic() + _AGAIN_SECONDS
            return False, None
        lost: tuple[bool, bytes | None] = (True, None)
        try:
            over, reply = self._heard(partial(self._collected, step, one, deadline), lost)
        except grpc.RpcError:
            # The other process has ended. It may come back with the message or without.
            return False, None
        if not over:
            return False, None
        if reply is None and one.sealed is not None:
            # The message was lost, or the site went away: a small message is posted again.
            one.identifier, one.next_post = None, time.monotonic() + _AGAIN_SECONDS
            return False, None
        return True, reply

    def _collected(self, step: Step, one: _Waiting, deadline: float) -> tuple[bool, bytes | None]:
        assert one.identifier is not None  # it was posted
        seconds = max(deadline - time.monotonic(), _AGAIN_SECONDS)
        call = self._collect(one.identifier.encode(), timeout=seconds)
        reply = None
        try:
            answer = self._until_stopped(call)
            collected = msgspec.json.decode(next(answer), type=_Collected)
            if collected.replied:
                reply = joined(answer, step.largest_reply)
        finally:
            # The rest of a reply that is too large is not read, and so not deleted as it is read.
            call.cancel()
        if reply is not None and len(reply) > step.largest_reply:
            self._abandon([one])
        return collected.over, reply

    def _until_stopped(self, call: Any) -> Iterator[bytes]:
        """Yields the parts of an answer as they come. Raises `JobStopped` also while none comes, or
        while parts without content come, which never reach the limit of a reply."""
        parts: Queue[bytes | Exception | None] = Queue(1)

        def read() -> None:
            try:
                for part in call:
                    parts.put(part)
                parts.put(None)
            except Exception as error:
                parts.put(error)

        reader = threading.Thread(target=read, name="collect", daemon=True)
        reader.start()
        try:
            while True:
                self._check_stopped()
                try:
                    part = parts.get(timeout=_LONGEST_WAIT_SECONDS)
                except Empty:
                    continue
                if isinstance(part, Exception):
                    raise part
                if part is None:
                    return
                yield part
                del part
        finally:
            call.cancel()
            while reader.is_alive():
                # It may wait for room.
                with suppress(Empty):
                    parts.get_nowait()
                reader.join(_SHORTEST_POLL_SECONDS)

    def _heard(self, ask: Callable[[], T], lost: T) -> T:
        """Returns an answer of the other process, or `lost` for anything else that it sends.

        Raises:
            grpc.RpcError: it does not answer.
            JobStopped: the job is to stop.
        """
        try:
            return ask()
        except (grpc.RpcError, JobStopped):
            raise
        except Exception as error:
            # Whatever a stranger inside that process can make our decoders raise.
            now = time.monotonic()
            if now - self._complained >= _COMPLAIN_SECONDS:
                self._complained = now
                what = type(error).__name__
                _logger.error("the process with the port gives no answer: %s %s", what, error)
            return lost

    def _leave(self, step: Step, site: str, sealed: bytes, deadline: float) -> str | None:
        """Posts a message; returns its ID, or None if the site was never connected.

        Waits for the other process while it restarts: every message passes through it.
        """
        while True:
            seconds = max(deadline - time.monotonic(), 1.0)
            address = _Address(site, str(step), seconds, step.largest_reply)
            try:
                return self._heard(partial(self._posted, address, sealed), None)
            except grpc.RpcError:
                self._check_stopped()
                if time.monotonic() >= deadline:
                    return None
                time.sleep(_AGAIN_SECONDS)

    def _posted(self, address: _Address, sealed: bytes) -> str | None:
        call = self._post.future(_request(address, sealed), timeout=address.seconds)
        try:
            while True:
                self._check_stopped()
                with suppress(grpc.FutureTimeoutError):
                    answer = call.result(timeout=_LONGEST_WAIT_SECONDS)
                    return msgspec.json.decode(answer, type=Posted).identifier
        finally:
            call.cancel()


def _request(address: _Address, sealed: bytes) -> Iterator[bytes]:
    yield msgspec.json.encode(address)
    yield from pieces(sealed)
