"""What an operator that means harm can make a site's relay do in the site's own network."""

import json
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from e2e import echo_relay
from e2e.daemons import write_all
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.error import ApiErrorCode, FlowerError
from support import warm_python
from support.relays import whole
from support.waiting import HANGING

import umbel_client.relay.flower
from umbel_client.relay.flower import Connection, serve
from umbel_client.relay.messages import LARGEST_MESSAGE
from umbel_host.transport.flower import packed_names
from umbel_host.transport.pieces import FLOWER_FIELD, FLOWER_MESSAGE_TYPE, FLOWER_PLACE
from umbel_server.operator.authority import (
    Authority,
    certificate_pem,
    key_pem,
    new_authority,
    new_key,
)
from umbel_server.port.listener import tls_context
from umbel_server.port.reply_filter import ACTIVATE

METADATA = ProtoMetadata(run_id=1, message_type=FLOWER_MESSAGE_TYPE)


def announcing(content: RecordDict | None) -> PullMessagesResponse:
    proto = None if content is None else recorddict_to_proto(content)
    return PullMessagesResponse(messages_list=[ProtoMessage(metadata=METADATA, content=proto)])


WITH_A_PIECE = announcing(packed_names(["0" * 64]))
WRONG_VERSION = FlowerError(ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE, "go away")


@contextmanager
def web_server(
    context: ssl.SSLContext | None,
    status: int = 200,
    redirect: str = "",
    bodies: Callable[[str], bytes] = lambda path: b"",
) -> Iterator[tuple[int, list[str]]]:
    """Its port, and the requests that it has got."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", "0")))
            requests.append(self.path)
            body = bodies(self.path)
            self.send_response(status)
            if redirect:
                self.send_header("location", redirect)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_port, requests
    finally:
        server.shutdown()
        thread.join(HANGING)
        server.server_close()


class Kit:
    """Certificates of an operator and one site."""

    def __init__(self, folder: Path) -> None:
        now, ca_key, server_key, site_key = datetime.now(UTC), new_key(), new_key(), new_key()
        authority = Authority(new_authority("clinics", ca_key, now), ca_key)
        server = authority.server(server_key.public_key(), ["127.0.0.1"], now)
        site = authority.site("east", site_key.public_key(), now)
        write_all(
            folder,
            {
                "server-ca.pem": certificate_pem(authority.certificate),
                "server.pem": certificate_pem(server),
                "server-key.pem": key_pem(server_key),
                "certificate.pem": certificate_pem(site),
                "key.pem": key_pem(site_key),
            },
        )
        self.folder = folder

    def context(self) -> ssl.SSLContext:
        return tls_context(
            self.folder / "server.pem",
            self.folder / "server-key.pem",
            self.folder / "server-ca.pem",
        )

    def connection(self, port: int) -> Connection:
        return Connection(
            server=f"127.0.0.1:{port}",
            server_ca=self.folder / "server-ca.pem",
            certificate=self.folder / "certificate.pem",
            key=self.folder / "key.pem",
        )


def offering(
    messages: PullMessagesResponse, part: PullObjectResponse | None = None
) -> Callable[[str], bytes]:
    """Answers that bring a relay as far as a message's parts."""
    answers = {
        "activate-node": ActivateNodeResponse(node_id=7),
        "pull-messages": messages,
        "pull-object": part or PullObjectResponse(),
    }

    def bodies(path: str) -> bytes:
        answer = answers.get(path.rpartition("/")[2])
        return b"" if answer is None else answer.SerializeToString()

    return bodies


def content(data: bytes) -> PullObjectResponse:
    return PullObjectResponse(object_found=True, object_available=True, object_content=data)


@contextmanager
def relay(connection: Connection, largest: int = LARGEST_MESSAGE) -> Iterator[None]:
    """A relay at work, whose trainer is never asked."""

    def handle(sealed: bytes) -> bytes:
        raise AssertionError(sealed)

    stopping = threading.Event()
    thread = threading.Thread(
        target=serve,
        args=(connection, whole(handle), stopping, lambda _: None, lambda: largest),
    )
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(HANGING)


def wait_for(requests: list[str], count: int) -> None:
    deadline = time.monotonic() + HANGING
    while len(requests) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(requests) >= count


@pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
def test_a_server_cannot_send_a_relays_requests_on_to_the_sites_own_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    if not checked:
        always = property(lambda self: True, lambda self, value: None)
        monkeypatch.setattr(httpx.Client, "follow_redirects", always, raising=False)
    kit = Kit(tmp_path)
    with web_server(None) as (inner, reached):
        redirect = f"http://127.0.0.1:{inner}/admin/delete-everything"
        with (
            web_server(kit.context(), 307, redirect) as (port, asked),
            relay(kit.connection(port)),
        ):
            wait_for(asked, 2)
            if not checked:
                wait_for(reached, 1)
    assert bool(reached) is not checked


@pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
def test_a_server_of_another_authority_hears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    if not checked:
        credentials = umbel_client.relay.flower._credentials

        def trusting(connection: Connection) -> tuple[ssl.SSLContext, EllipticCurvePrivateKey]:
            context, key = credentials(connection)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context, key

        monkeypatch.setattr(umbel_client.relay.flower, "_credentials", trusting)
    ours, other = Kit(tmp_path / "ours"), Kit(tmp_path / "other")
    context = other.context()
    # It would take anybody, so that it is the relay that refuses.
    context.verify_mode = ssl.CERT_NONE
    with (
        web_server(context) as (port, asked),
        relay(ours.connection(port)),
    ):
        if checked:
            time.sleep(2.5)
        else:
            wait_for(asked, 1)
    assert bool(asked) is not checked


@pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
def test_a_message_that_no_plan_can_need_does_not_fill_a_relays_memory(
    tmp_path: Path, checked: bool
) -> None:
    piece = ConfigRecord({FLOWER_FIELD: bytes(100_000), FLOWER_PLACE: "0"}).deflate()
    endless = announcing(packed_names([f"{number:064x}" for number in range(41)]))
    kit = Kit(tmp_path)
    bodies = offering(endless, content(piece))
    with (
        web_server(kit.context(), bodies=bodies) as (port, asked),
        relay(kit.connection(port), 150_000 if checked else LARGEST_MESSAGE),
    ):
        deadline = time.monotonic() + HANGING
        while [*map(pulls, asked)].count("pull-messages") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    names = [*map(pulls, asked)]
    first = names.index("pull-messages") + 1
    taken = names[first : names.index("pull-messages", first)].count("pull-object")
    assert taken == (2 if checked else 41)


def pulls(path: str) -> str:
    return path.rpartition("/")[2]


@contextmanager
def endless(
    context: ssl.SSLContext, said: bytes, over: threading.Event
) -> Iterator[tuple[int, list[str]]]:
    """A server that says the same again and again until it is over: its port, and the connections
    that it got."""
    listening, connections = socket.create_server(("127.0.0.1", 0)), list[str]()

    def answer(opened: socket.socket) -> None:
        with suppress(OSError), context.wrap_socket(opened, server_side=True) as tls:
            tls.recv(1 << 16)
            connections.append("one")
            while not over.wait(0.001):
                tls.sendall(said)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield int(listening.getsockname()[1]), connections
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        accepting.join(HANGING)


@pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 "], ids=["promises", "crumbs"]
)
def test_a_relay_waits_for_no_answer_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes, checked: bool
) -> None:
    monkeypatch.setattr(umbel_client.relay.flower, "_ANSWER_SECONDS", 0.2)
    if not checked:
        monkeypatch.setattr(umbel_client.relay.flower, "_Socket", ssl.SSLSocket)
    kit = Kit(tmp_path)
    over = threading.Event()
    with (
        endless(kit.context(), said, over) as (port, connections),
        relay(kit.connection(port)),
    ):
        if checked:
            wait_for(connections, 2)
        else:
            time.sleep(1.7)
            assert len(connections) == 1
        over.set()


@pytest.mark.parametrize(
    ("status", "bodies"),
    [
        # What a stock SuperNode ends at.
        (400, lambda path: json.dumps(WRONG_VERSION.to_json("go away")).encode()),
        (200, lambda path: b"no protobuf"),
        (500, lambda path: b"x" * 1000),
        (200, offering(announcing(None))),
        (200, offering(WITH_A_PIECE, PullObjectResponse())),
        (200, offering(WITH_A_PIECE, content(b"no object"))),
        (200, offering(WITH_A_PIECE, content(b"RecordDict 0 \x00"))),
        (200, offering(WITH_A_PIECE, content(ConfigRecord({"a": 1}).deflate()))),
    ],
    ids=[
        "wrong version",
        "no protobuf",
        "error",
        "no content",
        "no object",
        "nonsense",
        "no body",
        "no message",
    ],
)
def test_no_answer_ends_a_relay(
    tmp_path: Path, status: int, bodies: Callable[[str], bytes]
) -> None:
    kit = Kit(tmp_path)
    with web_server(kit.context(), status, bodies=bodies) as (port, asked):
        process = warm_python.start(echo_relay.__file__, f"127.0.0.1:{port}", tmp_path, 0)
        try:
            # It has its answer, and connects again.
            deadline = time.monotonic() + HANGING
            while asked.count(ACTIVATE) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert asked.count(ACTIVATE) >= 2
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
    assert code == 0
