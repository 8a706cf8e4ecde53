"""A server's answers end no relay, fill no memory, and set no clock out of the calendar.

Each attack is run a second time without the fix, where it must reach its goal. More answers are in
tests/e2e/test_hostile_server.py.
"""

import logging
import threading
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.cookiejar import DefaultCookiePolicy as CookiePolicy
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse

from umbel_client.relay import flower, flower_patches, process, server_clock
from umbel_client.relay.flower import Connection, serve
from umbel_client.relay.messages import Pieces
from umbel_client.relay.server_clock import ServerClock
from umbel_common.errors import UnreachableError
from umbel_host.transport.pieces import FLOWER_PIECE_BYTES
from umbel_server.operator.authority import (
    Authority,
    certificate_pem,
    key_pem,
    new_authority,
    new_key,
)

Handler = Callable[[httpx.Request], httpx.Response]
ANSWERS = {
    "activate-node": ActivateNodeResponse(node_id=7),
    "send-node-heartbeat": SendNodeHeartbeatResponse(success=True),
    "pull-messages": PullMessagesResponse(),
}


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Connection:
    """The certificates of a site."""
    folder = tmp_path_factory.mktemp("relay")
    key, relay_key, now = new_key(), new_key(), datetime.now(UTC)
    authority = Authority(new_authority("clinics", key, now), key)
    site = authority.site("east", relay_key.public_key(), now)
    for name, data in {
        "ca.pem": certificate_pem(authority.certificate),
        "certificate.pem": certificate_pem(site),
        "key.pem": key_pem(relay_key),
    }.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return Connection("server:1", folder / "ca.pem", folder / "certificate.pem", folder / "key.pem")


class Impatient(threading.Event):
    """An event that nobody waits for."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0.0)


@pytest.fixture
def relay(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a relay over answers of a test's own, until it has asked a few times."""

    def run(answer: Handler, times: int = 12) -> None:
        stopping = Impatient()
        asked: list[str] = []

        def counted(request: httpx.Request) -> httpx.Response:
            asked.append(request.url.path)
            if len(asked) == times:
                stopping.set()
            return answer(request)

        class Way:
            def client(self, context: object, seconds: float) -> httpx.Client:
                return httpx.Client(transport=httpx.MockTransport(counted))

        def handle(pieces: Pieces) -> Pieces:
            raise UnreachableError("the trainer is asked")

        monkeypatch.setattr(flower, "way_to", lambda server: Way())
        serve(connection, handle, stopping, lambda up: None)
        assert len(asked) >= times

    return run


def normal(request: httpx.Request, **headers: str) -> httpx.Response:
    answer = ANSWERS.get(request.url.path.rpartition("/")[2])
    if answer is None:
        return httpx.Response(500)
    return httpx.Response(200, headers=headers, content=answer.SerializeToString())


def crash(request: httpx.Request) -> httpx.Response:
    """Stands for anything that Flower or httpx may raise at bytes that they did not expect."""
    raise RecursionError("deep")


def unknown_decoder(request: httpx.Request) -> httpx.Response:
    headers = {"content-type": "text/plain; charset=zlib"}
    return httpx.Response(418, headers=headers, content=b"no text")


@pytest.mark.parametrize("answer", [crash, normal, lambda request: httpx.Response(999)])
def test_a_relay_goes_on(relay: Callable[..., None], answer: Handler) -> None:
    relay(answer)


def test_without_the_fix_an_answer_ends_it(
    relay: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "Exception", httpx.HTTPError, raising=False)
    with pytest.raises(RecursionError):
        relay(crash)


def test_a_server_does_not_choose_the_decoder_of_its_error(
    relay: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    relay(unknown_decoder)
    response = unknown_decoder(httpx.Request("POST", "https://server"))
    with pytest.raises(AssertionError):
        _ = response.text


@pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
def test_a_server_does_not_fill_a_relays_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, checked: bool
) -> None:
    """It may offer messages that are too large as fast as the relay can drop them."""
    monkeypatch.setattr(logging.getLogger("umbel.relay"), "filters", [])
    for name in ("hide_memory", "give_memory_back", "configure"):
        monkeypatch.setattr(process, name, lambda: None)
    monkeypatch.setattr(process, "adopt", lambda name: None)
    if not checked:
        monkeypatch.setattr(process, "limit", lambda name: None)

    def run(path: Path) -> None:
        for _ in range(100):
            logging.getLogger("umbel.relay").warning("a message is dropped")

    monkeypatch.setattr(process, "run", run)
    monkeypatch.setattr("sys.argv", ["relay", "client.toml"])
    assert process.main() == 0
    assert len(caplog.records) == (20 if checked else 100)


FAR = "Fri, 31 Dec 9999 23:59:59 GMT"
NONE = httpx.Request("POST", "https://server")


@pytest.mark.parametrize(
    "date",
    [FAR, "Mon, 01 Jan 0001 00:00:00 GMT", "Mon, 99 Jan 2024 99:99:99 +9999", "", "1"],
)
def test_no_date_leads_out_of_the_calendar(date: str) -> None:
    clock = ServerClock()
    clock.learn(httpx.Response(200, headers={"date": date}, request=NONE), datetime.now(UTC))
    assert abs(clock.now() - datetime.now(UTC)) < timedelta(minutes=1)


def test_without_the_fix_a_date_ends_the_clock(
    relay: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    relay(lambda request: normal(request, date=FAR))
    monkeypatch.setattr(server_clock, "LARGEST_SKEW", timedelta.max)
    clock = ServerClock()
    clock.learn(httpx.Response(200, headers={"date": FAR}), datetime.now(UTC))
    with pytest.raises(OverflowError):
        clock.now() + timedelta(days=1)


def test_a_clock_that_is_wrong_by_months_is_still_set_right() -> None:
    clock = ServerClock()
    clock.learn(dated(datetime.now(UTC) + timedelta(days=100)), datetime.now(UTC))
    assert clock.offset > timedelta(days=99)


def dated(moment: datetime) -> httpx.Response:
    return httpx.Response(200, headers={"date": f"{moment:%a, %d %b %Y %H:%M:%S} GMT"})


@pytest.mark.parametrize("ahead", [0, 100])
def test_an_answer_that_was_long_in_coming_does_not_set_the_clock_wrong(ahead: float) -> None:
    """Its date is that of the question; another server's may be that of the answer."""
    clock = ServerClock()
    clock.offset = timedelta(seconds=ahead)
    asked = datetime.now(UTC) - timedelta(seconds=15)
    for moment in (asked, datetime.now(UTC)):
        clock.learn(dated(moment + clock.offset), asked)
        assert clock.offset == timedelta(seconds=ahead)
    clock.learn(dated(asked + timedelta(seconds=200)), asked)
    assert abs(clock.offset - timedelta(seconds=200)) < timedelta(seconds=1)


@pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
def test_no_cookie_is_kept(
    relay: Callable[..., None], monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """A server may send others with each answer, and would get all of them with each request."""
    if not checked:
        monkeypatch.setattr(flower_patches, "DefaultCookiePolicy", lambda **_: CookiePolicy())
    cookies: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        cookies.append(request.headers.get("cookie", ""))
        return normal(request, **{"set-cookie": f"a{len(cookies)}={1000 * 'x'}"})

    relay(answer)
    assert (max(map(len, cookies)) > 5000) is not checked
    assert any(cookies) is not checked


@pytest.mark.parametrize(
    ("path", "size", "taken"),
    [
        ("pull-object", FLOWER_PIECE_BYTES + (1 << 16), True),
        ("pull-messages", 1 << 16, True),
        ("pull-messages", 1 << 20, False),
        ("push-messages", 1 << 20, False),
    ],
)
def test_an_answer_is_no_larger_than_its_path_needs(path: str, size: int, taken: bool) -> None:
    """What a relay makes of a message of 8 MiB in small parts took 8 seconds and 300 MB."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=httpx.ByteStream(bytes(size)))

    http = httpx.Client(transport=httpx.MockTransport(answer))
    client = flower_patches.fleet_client("server:1", True, http, None)  # type: ignore[arg-type]
    url = f"https://server:1/v1/fleet/{path}"
    if taken:
        assert len(client._client.post(url).content) == size
    else:
        with pytest.raises(httpx.DecodingError):
            client._client.post(url)


BOMB_BYTES = 3 * flower_patches.LARGEST_ANSWER


def bomb() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(bytes(BOMB_BYTES)) + packer.flush()


@pytest.mark.parametrize("packed", [True, False])
def test_an_answer_is_neither_unpacked_nor_endless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    headers = {"content-encoding": "gzip"} if packed else {}
    body = bomb() if packed else bytes(BOMB_BYTES)
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["accept-encoding"])
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(body))

    def ask() -> httpx.Response:
        http = httpx.Client(transport=httpx.MockTransport(answer))
        client = flower_patches.fleet_client("server:1", True, http, None)  # type: ignore[arg-type]
        return client._client.post("https://server")

    with pytest.raises(httpx.DecodingError):
        ask()
    monkeypatch.setattr(flower_patches, "_limit", lambda response: None)
    assert len(ask().content) == BOMB_BYTES
    assert asked == ["identity", "identity"]
