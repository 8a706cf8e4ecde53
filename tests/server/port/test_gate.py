"""Requests are judged before their bytes are taken, and bytes are counted as they come."""

import asyncio
import logging
import re
import ssl
import threading
import time
import tracemalloc
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import starlette.datastructures
from server.port.conftest import Certified, OpenPort, Port, request, status, wait_until
from starlette.datastructures import URL
from support.waiting import HANGING

from umbel_server.port import gate, listener
from umbel_server.port.gate import _BODIES, _SENT_AT_ONCE, PATHS, _parts
from umbel_server.port.reply_filter import ACTIVATE, PUSH, PUSH_OBJECT

CHECKED = pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
CHUNK = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"
CHUNKED = b"transfer-encoding: chunked"


def answer(port: Port, site: Certified, data: bytes) -> int | None:
    with port.secure(site) as connection:
        # The connection may end before all is sent; the answer has come before that.
        with suppress(OSError):
            connection.sendall(data)
        return status(connection)


def judge_the_announced_length_alone(patch: pytest.MonkeyPatch) -> None:
    """As if a body were as large as its header says."""

    async def trusting(receive: Any, length: int, connection: Any) -> bytes:
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        return b"".join(parts)

    judge = gate.Gate._judge

    def judged(self: gate.Gate, scope: Any) -> int | None:
        kept = [one for one in scope["headers"] if one[0] != b"transfer-encoding"]
        lengths = [one for one in kept if one[0] == b"content-length"]
        scope["headers"] = kept if lengths else [*kept, (b"content-length", b"10")]
        return judge(self, scope)

    patch.setattr(gate, "_body", trusting)
    patch.setattr(gate.Gate, "_judge", judged)


@CHECKED
@pytest.mark.parametrize("length", [10, None], ids=["beside a length", "alone"])
def test_a_body_in_chunks_is_not_taken(
    open_port: OpenPort,
    east: Certified,
    monkeypatch: pytest.MonkeyPatch,
    length: int | None,
    checked: bool,
) -> None:
    if not checked:
        judge_the_announced_length_alone(monkeypatch)
    port = open_port()
    body = 6 * CHUNK + b"0\r\n\r\n"
    data = request(east, PUSH_OBJECT, body, CHUNKED, length=length)
    assert answer(port, east, data) == (413 if checked else 200)
    assert port.bodies == ([] if checked else [6 << 20])


class Endless:
    """What a web server would give that counts nothing: a body without an end."""

    def __init__(self) -> None:
        self.given = 0
        self.ended = False

    def abort(self) -> None:
        self.ended = True

    async def receive(self) -> dict[str, Any]:
        if self.ended:
            return {"type": "http.disconnect"}
        self.given += 1000
        return {"type": "http.request", "body": bytes(1000), "more_body": self.given < 100_000}


@CHECKED
def test_bytes_are_counted_as_they_come_whatever_was_announced(
    monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    if not checked:
        judge_the_announced_length_alone(monkeypatch)
    peer: Any = Endless()
    body = asyncio.run(gate._body(peer.receive, 10, peer))
    assert (body is None) is checked
    assert (peer.given <= 1000) is checked


class Crumbs(Endless):
    """What the web server gives of a body that comes in TLS records of three bytes."""

    async def receive(self) -> dict[str, Any]:
        self.given += 3
        body = self.given.to_bytes(3, "big")
        return {"type": "http.request", "body": body, "more_body": self.given < 300_000}


def test_a_body_takes_as_much_memory_as_it_has_bytes() -> None:
    """However small the parts are that it comes in: each, as an object, takes forty."""
    peer: Any = Crumbs()
    tracemalloc.start()
    try:
        body = asyncio.run(gate._body(peer.receive, 300_000, peer))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(body or b"") == 300_000
    assert most < 10 * 300_000


@CHECKED
def test_what_is_judged_by_its_url_has_the_path_that_the_gate_saw(
    open_port: OpenPort, east: Certified, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """A URL begins with the header that names the host, and Flower authenticates by the URL."""
    if not checked:
        judge = gate.Gate._judge

        def judged(self: gate.Gate, scope: Any) -> int | None:
            headers = scope["headers"]
            refused = judge(self, scope)
            scope["headers"] = headers
            return refused

        monkeypatch.setattr(gate.Gate, "_judge", judged)
    # What starlette itself does about it, since lately.
    monkeypatch.setattr(starlette.datastructures, "_HOST_RE", re.compile(".*"))
    port, seen = open_port(), list[str]()
    fleet = port._gate._fleet

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        seen.append(URL(scope=scope).path)
        await fleet(scope, receive, send)

    port._gate._fleet = noting
    data = request(east).replace(b"host: x", b"host: x/v1/runtime/pull-object?")
    assert answer(port, east, data) == 200
    assert seen == [ACTIVATE if checked else "/v1/runtime/pull-object"]


@pytest.mark.parametrize("path", sorted(PATHS))
def test_a_body_is_no_larger_than_its_path_needs(
    open_port: OpenPort, east: Certified, path: str
) -> None:
    port, most = open_port(), _BODIES[path]
    assert answer(port, east, request(east, path, bytes(most))) == 200
    assert answer(port, east, request(east, path, length=most + 1)) == 413
    assert port.bodies == [most]
    # What Flower parses of small parts costs far more memory than its bytes.
    assert most <= 1 << 16 or path == PUSH_OBJECT


def test_few_threads_work_for_flower(open_port: OpenPort, east: Certified) -> None:
    """Each keeps connections to the database, and they take turns at it."""
    port = open_port()
    assert answer(port, east, request(east)) == 200
    assert port.threads == gate._THREADS


@CHECKED
@pytest.mark.parametrize("name", [b"flwr-public-key", b"content-type", b"x-any"])
def test_a_header_that_stands_twice_is_refused(
    open_port: OpenPort,
    east: Certified,
    north: Certified,
    monkeypatch: pytest.MonkeyPatch,
    name: bytes,
    checked: bool,
) -> None:
    if not checked:
        judge = gate.Gate._judge

        def judged(self: gate.Gate, scope: Any) -> int | None:
            read = {**scope, "headers": list(dict(scope["headers"]).items())}
            return judge(self, read)

        monkeypatch.setattr(gate.Gate, "_judge", judged)
    more = {
        b"flwr-public-key": request(east).split(b"\r\n")[2],
        b"content-type": b"content-type: text/plain",
        b"x-any": b"X-Any: 1",
    }[name]
    data = request(east, ACTIVATE, b"", name + b": x", more)
    assert answer(open_port(), east, data) == (400 if checked else 200)


@CHECKED
def test_bodies_that_do_not_come_hold_up_neither_their_site_nor_others(
    open_port: OpenPort,
    east: Certified,
    north: Certified,
    monkeypatch: pytest.MonkeyPatch,
    checked: bool,
) -> None:
    """The oldest gives way: a line that was cut leaves them behind."""
    if not checked:
        monkeypatch.setattr(asyncio, "Semaphore", lambda _: Unlimited())
    port = open_port()
    with ExitStack() as stack:
        stalled = []
        for _ in range(6):
            connection = stack.enter_context(port.secure(east))
            connection.sendall(request(east, PUSH_OBJECT, bytes(1000), length=2000))
            stalled.append(connection)
        assert answer(port, north, request(north)) == 200
        assert answer(port, east, request(east)) == 200
        under_way = port._gate._under_way[east.key]
        assert (len(under_way.moving) <= gate._AT_ONCE) is checked
        # The newest of them was not ended, and may come still.
        stalled[-1].sendall(bytes(1000))
        assert status(stalled[-1]) == 200


class Unlimited:
    """A semaphore that holds nobody up."""

    def locked(self) -> bool:
        return False

    async def acquire(self) -> None:
        pass

    def release(self) -> None:
        pass


def under_way(port: Port, site: Certified) -> int:
    """How many requests are worked on or wait."""
    known = port._gate._under_way.get(site.key)
    return len(port.bodies) + (known.waiting if known else 0)


@CHECKED
def test_a_sites_requests_take_few_of_flowers_threads(
    open_port: OpenPort,
    east: Certified,
    north: Certified,
    monkeypatch: pytest.MonkeyPatch,
    checked: bool,
) -> None:
    if not checked:
        monkeypatch.setattr(asyncio, "Semaphore", lambda _: Unlimited())
    port = open_port()
    port.working.clear()
    with ExitStack() as stack:
        waiting = []
        for count in range(1, 14):
            connection = stack.enter_context(port.secure(east))
            connection.sendall(request(east, PUSH, bytes(100)))
            waiting.append(connection)
            if checked and count > 3 + 8:
                # Three are worked on, eight wait, and more are told to come again.
                assert status(connection) == 503
            else:
                wait_until(lambda count=count: under_way(port, east) == count)
        if not checked:
            assert port.bodies == [100] * 13
            return
        assert port.bodies == [100] * 3
        other = stack.enter_context(port.secure(north))
        other.sendall(request(north))
        wait_until(lambda: len(port.bodies) == 4)
        port.working.set()
        assert {status(connection) for connection in [*waiting[:11], other]} == {200}


@CHECKED
def test_a_body_has_its_time(
    open_port: OpenPort, east: Certified, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    monkeypatch.setattr(gate, "_REQUEST_SECONDS", 0.2 if checked else HANGING)
    with open_port().secure(east) as connection:
        connection.sendall(request(east, PUSH, bytes(10), length=20))
        connection.settimeout(HANGING if checked else 0.7)
        began = time.monotonic()
        ended = status(connection) is None
        assert ended
        assert (time.monotonic() - began < 0.6) or not checked


@CHECKED
def test_answers_that_are_not_taken_are_few(
    open_port: OpenPort, east: Certified, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Each holds a piece of a message in memory."""
    if not checked:
        monkeypatch.setattr(asyncio, "Semaphore", lambda _: Unlimited())
    port = open_port()
    # More than what the kernel keeps for a connection.
    port.answer = bytes(32 << 20)
    with ExitStack() as stack:
        for count in range(1, 6):
            stack.enter_context(port.secure(east)).sendall(request(east))
            wait_until(lambda count=count: len(port.bodies) == count)
        under_way = port._gate._under_way[east.key]
        wait_until(lambda: len(under_way.moving) == (gate._AT_ONCE if checked else 5))
        port.answer = b""
        assert answer(port, east, request(east)) == 200


@pytest.mark.parametrize("size", [0, 1, _SENT_AT_ONCE, _SENT_AT_ONCE + 1, 3 * _SENT_AT_ONCE])
def test_an_answer_of_any_size_is_sent_whole(
    open_port: OpenPort, east: Certified, size: int
) -> None:
    port = open_port()
    port.answer = bytes(size)
    assert answer(port, east, request(east)) == 200
    parts = list(_parts({"type": "http.response.body", "body": port.answer}))
    assert b"".join(part["body"] for part in parts) == port.answer
    assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]
    assert max(len(part["body"]) for part in parts) <= _SENT_AT_ONCE


@CHECKED
def test_a_site_that_asks_all_the_time_waits(
    open_port: OpenPort,
    east: Certified,
    north: Certified,
    monkeypatch: pytest.MonkeyPatch,
    checked: bool,
) -> None:
    monkeypatch.setattr(gate, "_BURST", 3.0)
    monkeypatch.setattr(gate, "_PER_SECOND", 10.0 if checked else 1e9)
    port = open_port()
    with port.secure(east) as connection, port.secure(north) as other:
        began = time.monotonic()
        for _ in range(8):
            connection.sendall(request(east))
            assert status(connection) == 200
        took = time.monotonic() - began
        other.sendall(request(north))
        assert status(other) == 200
    assert took > 0.4 or not checked


def test_the_rest_of_a_refused_request_is_not_read_for_long(
    open_port: OpenPort, east: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_LINGER_SECONDS", 0.2)
    with open_port().secure(east) as connection:
        connection.sendall(request(east, PUSH_OBJECT, b"", CHUNKED))
        assert status(connection) == 413
        ended = threading.Event()

        def flood() -> None:
            try:
                while True:
                    connection.sendall(CHUNK)
            except (OSError, ssl.SSLError):
                ended.set()

        flooding = threading.Thread(target=flood)
        flooding.start()
        assert ended.wait(HANGING)
        flooding.join(HANGING)


def test_what_follows_a_refused_request_is_read_whole(
    open_port: OpenPort, east: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the same connection: also more than is read of a refused one, and for longer."""
    monkeypatch.setattr(listener, "_LINGER_SECONDS", 0.1)
    body = bytes(2 * listener._LINGER_BYTES)
    with open_port().secure(east) as connection:
        connection.sendall(request(east, "/"))
        assert status(connection) == 404
        connection.sendall(request(east, PUSH_OBJECT, body[:-1], length=len(body)))
        time.sleep(0.3)
        connection.sendall(body[-1:])
        assert status(connection) == 200


def test_what_is_no_request_of_a_relay_is_not_told_in_the_log(
    caplog: pytest.LogCaptureFixture, open_port: OpenPort, east: Certified
) -> None:
    """Who was revoked still has a certificate, and could fill the operator's disk."""
    port = open_port()
    assert answer(port, east, b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n") == 400
    upgrade = b"connection: upgrade", b"upgrade: websocket"
    assert answer(port, east, request(east, "/", b"", *upgrade)) == 404
    assert caplog.text == ""


def test_a_site_that_makes_flower_fail_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
    open_port: OpenPort,
    east: Certified,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Another test may have used up this minute's events.
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])
    port = open_port()

    async def failing(*_: Any) -> None:
        raise OverflowError("a number that no database takes")

    port._gate._fleet = failing
    for _ in range(22):
        assert answer(port, east, request(east)) == 500
    assert "OverflowError" in caplog.text
    assert len(caplog.records) <= 20
