"""Connections of strangers cost little and keep nobody out, behind whatever address sites are."""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from server.port.conftest import Certified, Kit, OpenPort, Port, request, status, wait_until
from support.waiting import HANGING

from umbel_server.port import listener
from umbel_server.port.listener import Listener, place_of
from umbel_server.port.reply_filter import PUSH_OBJECT

CHECKED = pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
FEW = 20
"""Places for strangers in these tests; one address gets half of them."""


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_STRANGERS", FEW)


def is_served(port: Port, site: Certified) -> bool:
    try:
        with port.secure(site) as connection:
            connection.sendall(request(site))
            return status(connection) == 200
    except OSError:
        return False


def turn_newcomers_away(patch: pytest.MonkeyPatch) -> None:
    """As if a full house were the newcomer's bad luck."""
    let_wait = Listener._let_wait

    def limited(self: Any, opened: socket.socket, address: str) -> None:
        if self._strangers >= self._most // 2:
            opened.close()
        else:
            let_wait(self, opened, address)

    patch.setattr(Listener, "_let_wait", limited)


def count_verified_ones_for_their_address(patch: pytest.MonkeyPatch) -> None:
    async def staying(self: Any, stranger: Any) -> None:
        stranger.begun = True
        transport, _ = await self._loop.connect_accepted_socket(
            self._make_protocol, stranger.socket, ssl=self._context
        )
        stranger.handshake = SimpleNamespace(cancel=transport.abort)

    patch.setattr(Listener, "_shake_hands", staying)


@CHECKED
def test_silent_strangers_keep_no_site_of_the_same_address_out(
    open_port: OpenPort, east: Certified, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    if not checked:
        turn_newcomers_away(monkeypatch)
    port = open_port()
    with ExitStack() as stack:
        for _ in range(2 * FEW):
            stack.enter_context(port.connect())
        wait_until(lambda: port.door._strangers >= FEW // 2)
        if checked:
            assert is_served(port, east)
            assert port.door._strangers <= FEW
        else:
            assert not is_served(port, east)


@CHECKED
def test_strangers_take_only_so_many_files(
    open_port: OpenPort, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    if not checked:
        monkeypatch.setattr(listener, "_STRANGERS", 10_000)
    port = open_port()
    with ExitStack() as stack:
        for _ in range(4 * FEW):
            stack.enter_context(port.connect())
        wait_until(lambda: port.door._strangers >= FEW // 2)
        time.sleep(0.2)
        assert (port.door._strangers <= FEW // 2) is checked


def test_strangers_of_many_addresses_take_turns(
    open_port: OpenPort, east: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address with the most of them loses its oldest."""
    numbers = iter(range(1000))
    monkeypatch.setattr(listener, "place_of", lambda address: f"10.0.0.{next(numbers) % 5}")
    port = open_port()
    with ExitStack() as stack:
        for _ in range(3 * FEW):
            stack.enter_context(port.connect())
        wait_until(lambda: port.door._strangers >= FEW)
        assert is_served(port, east)
        assert port.door._strangers <= FEW
        crowds = [len(place) for place in port.door._places.values()]
        assert len(crowds) == 5
        assert max(crowds) - min(crowds) <= 2


@pytest.mark.parametrize(
    ("count", "checked"),
    [
        pytest.param(FEW // 2 + 2, False, id="without the check"),
        pytest.param(FEW + 2, True, id="with it"),
        pytest.param(100, True, id="a hundred", marks=pytest.mark.full),
    ],
)
def test_sites_behind_one_address_are_served_while_strangers_knock(
    open_port: OpenPort, kit: Kit, monkeypatch: pytest.MonkeyPatch, count: int, checked: bool
) -> None:
    """Behind a proxy or a network's router. A verified certificate ends the limit by address."""
    if not checked:
        count_verified_ones_for_their_address(monkeypatch)
    sites = [kit.site(f"site-{number}") for number in range(count)]
    port = open_port(*sites)
    with ExitStack() as stack:
        connected: list[tuple[Certified, ssl.SSLSocket]] = []
        for site in sites:
            for _ in range(2):
                stack.enter_context(port.connect())
            connected.append((site, stack.enter_context(port.secure(site))))
        answers = []
        for site, connection in connected:
            try:
                connection.sendall(request(site))
                answers.append(status(connection))
            except OSError:
                answers.append(None)
        assert (set(answers) == {200}) is checked


@CHECKED
def test_a_handshake_that_stops_halfway_ends(
    open_port: OpenPort, kit: Kit, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.3 if checked else 600.0)
    port = open_port()
    with port.connect() as connection:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        made = kit.stranger().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            made.do_handshake()
        connection.sendall(outgoing.read())
        connection.settimeout(None if checked else 1.0)
        ended = False
        try:
            while connection.recv(4096):
                pass
            ended = True
        except TimeoutError:
            pass
        assert ended is checked


@CHECKED
def test_a_connection_that_says_nothing_ends(
    open_port: OpenPort, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    monkeypatch.setattr(listener, "HELLO_SECONDS", 0.1 if checked else 600.0)
    port = open_port()
    with port.connect() as connection:
        connection.settimeout(None if checked else 1.2)
        try:
            ended = connection.recv(1) == b""
        except TimeoutError:
            ended = False
        assert ended is checked


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\x00", b"SSH-2.0-x\r\n"])
def test_what_does_not_speak_tls_is_not_answered(open_port: OpenPort, said: bytes) -> None:
    with open_port().connect() as connection:
        connection.sendall(said)
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""


@CHECKED
@pytest.mark.parametrize("said", [b"", b"POST /v1/fleet/activate-node HTTP/1.1\r\nhost: x\r\n"])
def test_a_header_has_its_time(
    open_port: OpenPort,
    east: Certified,
    monkeypatch: pytest.MonkeyPatch,
    said: bytes,
    checked: bool,
) -> None:
    monkeypatch.setattr(listener, "HEADER_SECONDS", 0.3 if checked else 600.0)
    with open_port().secure(east) as connection:
        connection.sendall(said)
        connection.settimeout(None if checked else 1.0)
        try:
            ended = status(connection) is None
        except TimeoutError:
            ended = False
        if not checked:
            connection.sendall(b"x")
        assert ended or not checked


def test_a_header_that_comes_in_time_is_answered_also_the_second(
    open_port: OpenPort, east: Certified
) -> None:
    with open_port().secure(east) as connection:
        for _ in range(2):
            first, rest = (data := request(east))[:30], data[30:]
            connection.sendall(first)
            time.sleep(0.05)
            connection.sendall(rest)
            assert status(connection) == 200


@CHECKED
def test_a_key_has_only_so_many_connections_and_the_newest_are_kept(
    open_port: OpenPort,
    east: Certified,
    north: Certified,
    monkeypatch: pytest.MonkeyPatch,
    checked: bool,
) -> None:
    monkeypatch.setattr(listener, "_CONNECTIONS_OF_A_KEY", 2 if checked else 10_000)
    port = open_port()
    with ExitStack() as stack:
        others = [stack.enter_context(port.secure(north)) for _ in range(2)]
        opened = [stack.enter_context(port.secure(east)) for _ in range(4)]

        def answer(connection: ssl.SSLSocket, site: Certified) -> int | None:
            try:
                connection.sendall(request(site))
                return status(connection)
            except OSError:
                return None

        assert [answer(connection, north) for connection in others] == [200, 200]
        answers = [answer(connection, east) for connection in opened]
        assert answers == ([None] * 2 if checked else [200] * 2) + [200] * 2


def test_who_has_said_something_is_turned_away_last(
    open_port: OpenPort, kit: Kit, east: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a crowd of them keeps nobody out whose handshake is under way."""
    port = open_port()
    with ExitStack() as stack:
        speaking = [stack.enter_context(port.connect()) for _ in range(3)]
        for connection in speaking:
            connection.sendall(b"\x16")
        wait_until(lambda: sum(len(place.shaking) for place in port.door._places.values()) == 3)
        for _ in range(2 * FEW):
            stack.enter_context(port.connect())
        wait_until(lambda: port.door._strangers == FEW // 2)
        assert is_served(port, east)
        assert sum(len(place.shaking) for place in port.door._places.values()) == 3
        for _ in range(2 * FEW):
            stack.enter_context(port.connect()).sendall(b"\x16")
        wait_until(lambda: not any(place.silent for place in port.door._places.values()))
        assert port.door._strangers <= FEW // 2
        assert is_served(port, east)


def test_strangers_without_a_certificate_cost_no_place(
    open_port: OpenPort, kit: Kit, east: Certified
) -> None:
    port = open_port()
    for _ in range(3):
        with suppress(OSError), port.secure(kit.stranger()) as tls:
            assert tls.recv(1) == b""
    wait_until(lambda: port.door._strangers == 0)
    assert is_served(port, east)


def test_handshakes_are_begun_one_after_the_other(
    open_port: OpenPort, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crowd at the door would take all the time of this thread."""
    paces: list[float] = []
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        paces.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(listener.asyncio, "sleep", counted)
    port = open_port()
    for number in range(3):
        assert is_served(port, kit.site(f"other-{number}")) is False
    assert paces.count(listener._PACE_SECONDS) == 3


def test_a_port_that_closes_ends_who_is_at_the_door(open_port: OpenPort) -> None:
    port = open_port()
    with port.connect() as connection:
        wait_until(lambda: port.door._strangers == 1)
        port.close()
        assert connection.recv(1) == b""


@CHECKED
def test_who_sends_crumbs_is_not_served(
    open_port: OpenPort, east: Certified, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """A byte in a record of its own takes the port as long as sixteen thousand."""
    if not checked:
        monkeypatch.setattr(listener, "_RECORDS_AT_ONCE", 1 << 30)
    port = open_port()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = east.context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with port.connect() as connection:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(1 << 16))
        tls.write(request(east, PUSH_OBJECT, length=1000))
        for _ in range(1000):
            tls.write(b"a")
        connection.sendall(outgoing.read())
        if not checked:
            wait_until(lambda: port.bodies == [1000])
            return
        with suppress(ConnectionResetError):
            while connection.recv(1 << 16):
                """What the handshake left: the end comes."""
    assert port.bodies == []
    assert is_served(port, east)


def test_a_large_body_may_come_at_once(open_port: OpenPort, east: Certified) -> None:
    """As much as waits to be read while the port does something else."""
    port, body = open_port(), bytes(4 << 20)
    with port.secure(east) as connection:
        for _ in range(3):
            connection.sendall(request(east, PUSH_OBJECT, body))
            assert status(connection) == 200
    assert port.bodies == 3 * [len(body)]


def idle(connection: ssl.SSLSocket, port: Port, site: Certified) -> None:
    """As a relay's machine that is gone."""
    connection.sendall(request(site))
    assert status(connection) == 200


def stalled(connection: ssl.SSLSocket, port: Port, site: Certified) -> None:
    connection.sendall(request(site, PUSH_OBJECT, b"x", length=1000))


def unread(connection: ssl.SSLSocket, port: Port, site: Certified) -> None:
    port.answer = bytes(30 << 20)
    connection.sendall(request(site))
    assert connection.recv(1)


@CHECKED
@pytest.mark.parametrize("held", [idle, stalled, unread])
def test_a_port_that_closes_waits_for_no_site(
    open_port: OpenPort,
    east: Certified,
    monkeypatch: pytest.MonkeyPatch,
    held: Callable[[ssl.SSLSocket, Port, Certified], None],
    checked: bool,
) -> None:
    monkeypatch.setattr(listener, "_CLOSING_SECONDS", 0.1 if checked else HANGING)
    port = open_port()
    with port.secure(east) as connection:
        held(connection, port, east)
        port.server.should_exit = True
        port._thread.join(HANGING if checked else 0.6)
        assert port._thread.is_alive() is not checked


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_all_addresses_of_a_machine_count_as_one(address: str, place: str) -> None:
    assert place_of(address) == place
