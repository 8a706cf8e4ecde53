"""The process with the port, in a stranger's hands: nothing it says ends the process with the key.

Each answer is given a second time to a link without the fix, which it ends.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from umbel_common.errors import UnreachableError
from umbel_host.transport.sockets import SocketServer
from umbel_server.messaging import carrier
from umbel_server.messaging.carrier import (
    CARRIER,
    CarrierLink,
    Posted,
    contacts_method,
    read_contacts,
)
from umbel_server.messaging.link import JobStopped, Step

POSTED = msgspec.json.encode(Posted("a-message"))
REPLIED = b'{"over": true, "replied": true}'
DEEP = b"[" * 100_000

ANSWERS: dict[str, tuple[bytes, list[bytes]]] = {
    "an empty answer": (b"", []),
    "no JSON": (b"\xff\xfe", []),
    "another shape": (b'{"identifier": 5}', []),
    "a tree without an end": (DEEP, []),
    "an empty stream": (POSTED, []),
    "a stream that is no JSON": (POSTED, [b"\xff"]),
    "a stream of another shape": (POSTED, [b'{"over": "yes"}']),
    "a stream with a deep tree": (POSTED, [DEEP]),
    "a reply that is too large": (POSTED, [REPLIED, b"much"]),
}


@pytest.fixture
def lying(tmp_path: Path) -> Iterator[Callable[..., CarrierLink]]:
    """Links to a process that gives these answers to `Post` and `Collect`, and none to a method
    that is `silent`."""
    over = threading.Event()
    servers: list[SocketServer] = []
    links: list[CarrierLink] = []

    def listen(
        posted: bytes,
        collected: Iterable[bytes],
        should_stop: Callable[[], bool] = lambda: False,
        silent: Collection[str] = (),
    ) -> CarrierLink:
        def post(request: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
            wait_in("Post")
            return posted

        def collect(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
            wait_in("Collect")
            yield from collected

        def forget(request: bytes, _: grpc.ServicerContext) -> bytes:
            wait_in("Forget")
            return b""

        def wait_in(method: str) -> None:
            if method in silent:
                over.wait()

        path = tmp_path / f"{len(servers)}.sock"
        server = SocketServer(path, 0o600, workers=6)
        server.add(
            CARRIER,
            {
                "Post": grpc.stream_unary_rpc_method_handler(post),
                "Collect": grpc.unary_stream_rpc_method_handler(collect),
                "Forget": grpc.unary_unary_rpc_method_handler(forget),
            },
        )
        server.start()
        servers.append(server)
        links.append(CarrierLink(path, should_stop))
        return links[-1]

    yield listen
    over.set()
    for link in links:
        link.close()
    for server in servers:
        server.stop(0.0)


def too_large(*arguments: object, **options: object) -> bytes:
    raise ValueError("a message of more than 2147483648 bytes")


@pytest.mark.parametrize(("posted", "collected"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_that_is_none_is_a_lost_message(
    lying: Callable[..., CarrierLink],
    monkeypatch: pytest.MonkeyPatch,
    posted: bytes,
    collected: list[bytes],
) -> None:
    monkeypatch.setattr(carrier, "joined", too_large)
    link = lying(posted, collected)
    assert list(link.exchange(Step("offer"), [("east", b"sealed")], 0.15)) == []
    monkeypatch.setattr(CarrierLink, "_heard", lambda self, ask, lost: ask())
    with pytest.raises((ValueError, StopIteration, RuntimeError, RecursionError)):
        list(link.exchange(Step("offer"), [("east", b"sealed")], 5.0))


def test_a_large_message_that_is_lost_is_not_waited_for(
    lying: Callable[..., CarrierLink],
) -> None:
    large = bytes(carrier._KEPT_BYTES + 1)
    with closing(lying(POSTED, [b"{"])) as link:
        assert list(link.exchange(Step("train"), [("east", large)], 600.0)) == []


def test_a_job_stops_while_a_reply_without_an_end_is_read(
    lying: Callable[..., CarrierLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are empty, so that they never come to the limit of a reply."""
    endless = (part for part in chain([REPLIED], repeat(b"")))
    asked = iter([False] * 5)
    link = lying(POSTED, endless, lambda: next(asked, True))
    with pytest.raises(JobStopped):
        list(link.exchange(Step("offer"), [("east", b"sealed")], 600.0))
    assert next(asked, None) is None
    # Without the check, what is read ends with the time alone.
    monkeypatch.setattr(CarrierLink, "_until_stopped", lambda self, parts: parts)
    link = lying(POSTED, endless)
    assert list(link.exchange(Step("offer"), [("east", b"sealed")], 0.5)) == []


NOT_OVER = b'{"over": false}'


@pytest.mark.parametrize("method", ["Post", "Collect"])
def test_a_job_stops_while_no_answer_comes(lying: Callable[..., CarrierLink], method: str) -> None:
    """A stage may last for hours, and so long may an answer take."""
    wanted = threading.Event()
    link = lying(POSTED, [NOT_OVER], wanted.is_set, [method])
    stopping = threading.Timer(0.3, wanted.set)
    stopping.start()
    began = time.monotonic()
    with pytest.raises(JobStopped):
        list(link.exchange(Step("offer"), [("east", b"sealed")], 20.0))
    assert time.monotonic() - began < 5.0
    stopping.join()


def test_messages_that_nobody_forgets_do_not_hold_a_stage_up(
    lying: Callable[..., CarrierLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrier, "_FORGET_SECONDS", 0.2)
    monkeypatch.setattr(carrier, "_FORGET_ALL_SECONDS", 0.5, raising=False)
    link = lying(POSTED, [NOT_OVER], silent=["Forget"])
    sites = [(f"site-{number}", b"sealed") for number in range(20)]
    began = time.monotonic()
    assert list(link.exchange(Step("offer"), sites, 0.2)) == []
    assert time.monotonic() - began < 2.0


def test_answers_that_are_none_do_not_fill_the_log(
    lying: Callable[..., CarrierLink], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever kinds of them take turns."""
    answers = iter([b"", b"{", DEEP] * 100)
    link = lying(POSTED, (next(answers) for _ in repeat(0)))
    caplog.set_level(logging.ERROR, "umbel.rounds")
    for _ in range(6):
        list(link.exchange(Step("train"), [("east", bytes(carrier._KEPT_BYTES + 1))], 5.0))
    assert len(caplog.records) == 1


def test_contacts_that_are_none_are_one_clear_error(tmp_path: Path) -> None:
    server = SocketServer(tmp_path / "a.sock", 0o600, workers=2)
    deep: Any = b'{"east": {"last": 1, "x": ' + DEEP
    server.add(CARRIER, {"Contacts": contacts_method(lambda: msgspec.Raw(deep))})  # type: ignore[arg-type,return-value]
    server.start()
    try:
        with pytest.raises(UnreachableError):
            read_contacts(tmp_path / "a.sock", 5.0)
    finally:
        server.stop(0.0)
