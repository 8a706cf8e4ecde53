"""Everything that Umbel needs of Flower's private parts: after an upgrade, this fails first.

`docs/adr/0011-flower-as-a-carrier.md` lists each name and what it is for; here is what each must
do.
"""

import ast
import importlib
import importlib.metadata
import inspect
import math
import os
import re
import shutil
import socket
import sqlite3
import ssl
import threading
import time
import timeit
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flwr.supercore.corestate.sql_corestate
import flwr.superlink.routers.fleet.node_auth
import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER, ErrorCode
from flwr.common.serde import recorddict_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.state.schema.corestate_models import ObjectPushSession
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.main import create_app
from flwr.supernode.fleet_http_client import FleetHttpClient
from sqlalchemy import event, select, text
from sqlalchemy.exc import OperationalError
from support.waiting import HANGING

import umbel_client.relay.messages as relay
import umbel_server.port.flower_patches
import umbel_server.port.mailbox
import umbel_server.port.reply_filter
import umbel_server.port.superlink
from umbel_client.relay.flower_patches import fleet_client, set_lifetime, set_message_id
from umbel_client.relay.proxy import Way
from umbel_client.relay.server_clock import TOLERATED_SKEW, ServerClock
from umbel_client.relay.signature import Signature
from umbel_host.transport.flower import (
    packed,
    packed_names,
    packed_piece,
    regrouped,
    unpacked,
    unpacked_names,
    unpacked_piece,
)
from umbel_host.transport.pieces import (
    FLOWER_FIELD,
    FLOWER_INLINE_BYTES,
    FLOWER_MESSAGE_TYPE,
    FLOWER_NAMES,
    FLOWER_PIECE_BYTES,
    FLOWER_PLACE,
    FLOWER_RECORD,
)
from umbel_server.port import gate
from umbel_server.port.expected_replies import ExpectedReplies, Verdict
from umbel_server.port.flower_patches import _TIDY_SECONDS, PUSH_SECONDS
from umbel_server.port.gate import PATHS
from umbel_server.port.mailbox import NodeMailbox
from umbel_server.port.reply_filter import ReplyFilter, announcement
from umbel_server.port.superlink import _KEEP_ALIVE_SECONDS, SuperLink
from umbel_server.port_process import FLOWER_ENVIRONMENT

ROOT = Path(__file__).parent.parent.parent
ADR = ROOT / "docs" / "adr" / "0011-flower-as-a-carrier.md"
PACKAGES = ("common", "server", "client", "simulations")
LONG_ENOUGH = 60.0


# Names


def used() -> set[tuple[str, str]]:
    """Module and name of everything that the packages import from Flower."""
    return {
        (node.module, alias.name)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr"
        for alias in node.names
        if node.module
    }


def documented() -> set[tuple[str, str]]:
    """Module and name of everything in the tables of the decision record."""
    rows = re.findall(r"^\| `(flwr[\w.]*)` \| ([^|]+) \| [^|]+ \|$", ADR.read_text(), re.MULTILINE)
    return {(module, name) for module, names in rows for name in re.findall(r"`(\w+)`", names)}


def test_every_name_of_flowers_that_is_used_is_documented_with_its_purpose() -> None:
    assert documented() == used()


def test_the_version_is_the_one_that_was_read() -> None:
    assert importlib.metadata.version("flwr").startswith("1.42.")


@pytest.mark.parametrize(("module", "name"), sorted(documented()))
def test_the_name_is_still_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


STATE = {
    "acknowledge_task_heartbeat": ("task_id",),
    "activate_task": ("task_id",),
    "claim_task": ("task_id",),
    "cleanup_run": ("run_id",),
    "create_node": ("owner_aid", "owner_name", "public_key", "heartbeat_interval"),
    "create_run": (
        "fab_id",
        "fab_version",
        "fab_hash",
        "override_config",
        "federation_id",
        "federation_config",
        "flwr_aid",
        "primary_task_type",
    ),
    "deactivate_node": ("node_id",),
    "delete_messages": ("message_ins_ids",),
    "get_message_res": ("message_ids", "run_id"),
    "get_node_id_by_public_key": ("public_key",),
    "get_node_info": (),
    "get_object": ("run_id", "object_id"),
    "get_run_info": (),
    "stop_run": ("run_id",),
    "store_message_ins": ("message",),
}
"""Methods of the state that are called, with the arguments that they must have, in this order."""


@pytest.mark.parametrize(
    ("owner", "name", "arguments"),
    [(LinkState, name, arguments) for name, arguments in STATE.items()]
    + [
        (ObjectStore, "get_object_tree", ("object_id",)),
        (ObjectStore, "delete", ("object_id",)),
        (ObjectStore, "preregister", ("run_id", "object_tree")),
        (ObjectStore, "put", ("object_id", "object_content")),
    ],
)
def test_a_method_takes_what_it_took(owner: type, name: str, arguments: tuple[str, ...]) -> None:
    parameters = list(inspect.signature(getattr(owner, name)).parameters.values())[1:]
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    assert tuple(required) == arguments


def test_no_method_of_the_state_is_called_that_is_not_tested_here() -> None:
    port = ROOT / "server" / "umbel_server" / "port"
    text = "".join(path.read_text() for path in port.glob("*.py"))
    assert set(re.findall(r"\b_?state\.(\w+)\(", text)) - {"session"} == set(STATE)


def test_every_patch_names_tests_that_are_here() -> None:
    patches = [
        function
        for name, function in inspect.getmembers(umbel_server.port.flower_patches)
        if inspect.isfunction(function)
        and function.__module__ == umbel_server.port.flower_patches.__name__
        and not name.startswith("_")
    ]
    assert patches
    for patch in patches:
        tests = re.findall(r"\btest_\w+", inspect.getdoc(patch) or "")
        assert tests, patch.__name__
        assert set(tests) <= globals().keys(), patch.__name__


def test_the_state_is_told_by_the_environment_where_its_database_is(
    migrated: Path, link: "Link"
) -> None:
    assert migrated.with_name("superlink.sqlite").exists()
    # That of a `Link` was there before, and is used.
    assert link.rows("run") > 0


@pytest.mark.parametrize(
    ("name", "value"),
    # Of temp_store, 1 is a file.
    [("cache_size", -2000), ("mmap_size", 4_000_000), ("temp_store", 1), ("busy_timeout", 60_000)],
)
def test_how_a_database_connection_uses_memory_and_time_is_ours_to_set(
    link: "Link", name: str, value: int
) -> None:
    with link.superlink.state.session() as session:
        assert session.execute(text(f"PRAGMA {name}")).scalar() == value


def test_a_database_that_is_locked_for_a_while_does_not_end_the_run(
    own_link: "Link", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who keeps the run alive tries again: else nothing could be posted a minute later."""
    superlink, state = own_link.superlink, own_link.superlink.state
    acknowledge, failures = state.acknowledge_task_heartbeat, []

    def locked(task: int) -> bool:
        if not failures:
            failures.append(task)
            raise OperationalError("UPDATE", {}, Exception("database is locked"))
        failures.append(task)
        return bool(acknowledge(task))

    monkeypatch.setattr(state, "acknowledge_task_heartbeat", locked)
    monkeypatch.setattr(umbel_server.port.superlink, "_KEEP_ALIVE_SECONDS", 0.05)
    superlink._alive = threading.Thread(target=superlink._keep_alive, daemon=True)
    superlink._alive.start()
    deadline = time.monotonic() + HANGING
    while len(failures) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert set(failures) == {superlink._task_id}


def test_flower_still_listens_to_what_switches_off_its_calls_home() -> None:
    for name in FLOWER_ENVIRONMENT:
        constant = name if name != "FLWR_TELEMETRY_ENABLED" else None
        if constant is not None:
            module = (
                "flwr.supercore.constant"
                if hasattr(importlib.import_module("flwr.supercore.constant"), name)
                else "flwr.common.constant"
            )
            assert getattr(importlib.import_module(module), name) == name
    telemetry = inspect.getsource(importlib.import_module("flwr.supercore.telemetry"))
    assert 'os.getenv("FLWR_TELEMETRY_ENABLED"' in telemetry


# Messages


IDENTITY = ("_task_id", "_run_id", "_node_id")


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes messages in this process; Flower keeps it for the whole process."""
    for name in IDENTITY:
        monkeypatch.setattr(TaskIdentity, name, 1)


def message(sealed: bytes = b"sealed", node: int = 7) -> Message:
    return Message(
        packed(sealed), dst_node_id=node, message_type=FLOWER_MESSAGE_TYPE, ttl=60.0, group_id="x"
    )


@pytest.mark.usefixtures("identity")
def test_what_flower_hides_of_a_messages_metadata_can_be_set() -> None:
    made = message()
    set_message_id(made, "0" * 64)
    set_lifetime(made, 12.0, 3.0)
    assert made.metadata.message_id == "0" * 64
    assert (made.metadata.created_at, made.metadata.ttl) == (12.0, 3.0)


def test_a_piece_is_an_object_that_flower_takes() -> None:
    sealed = os.urandom(FLOWER_PIECE_BYTES) + bytes(2 * FLOWER_PIECE_BYTES) + b"end"
    pieces = list(regrouped([sealed]))
    objects = dict(packed_piece(piece, "a", number) for number, piece in enumerate(pieces))
    assert len(objects) == len(pieces) == 4
    assert max(map(len, objects.values())) < FLOWER_PIECE_BYTES + 1000
    for name, content in objects.items():
        validate_object_content(content)
        assert get_object_id(content) == name
    again = [unpacked_piece(content) for content in objects.values()]
    assert again == pieces


@pytest.mark.usefixtures("identity")
def test_a_message_says_what_its_pieces_are() -> None:
    names = [os.urandom(32).hex() for _ in range(3)]
    made = message()
    assert (unpacked(made), unpacked_names(made)) == (b"sealed", None)
    made = Message(packed_names(names), dst_node_id=7, message_type=FLOWER_MESSAGE_TYPE)
    assert (unpacked(made), unpacked_names(made)) == (None, names)
    odd = RecordDict({FLOWER_RECORD: ConfigRecord({FLOWER_NAMES: bytes(33)})})
    made = Message(odd, dst_node_id=7, message_type=FLOWER_MESSAGE_TYPE)
    assert (unpacked(made), unpacked_names(made)) == (None, None)


@pytest.mark.usefixtures("identity")
def test_a_reply_goes_where_its_request_came_from() -> None:
    request = message(node=7)
    request.metadata.__dict__["_message_id"] = "1" * 64
    for reply in (
        Message(packed(b"reply"), reply_to=request),
        Message(Error(1, "no"), reply_to=request),
    ):
        assert reply.metadata.reply_to_message_id == "1" * 64
        assert reply.metadata.src_node_id == 7
        assert reply.metadata.dst_node_id == request.metadata.src_node_id
        assert reply.metadata.run_id == request.metadata.run_id


@pytest.mark.usefixtures("identity")
def test_what_is_no_message_of_ours_is_answered_by_an_error() -> None:
    def handle(sealed: bytes) -> bytes:
        raise AssertionError(sealed)

    foreign = Message(packed(b"x"), dst_node_id=7, message_type="train")
    other_record = Message(
        RecordDict({FLOWER_RECORD: ConfigRecord({"pickle": b"x"})}),
        dst_node_id=7,
        message_type=FLOWER_MESSAGE_TYPE,
    )
    for asked in (foreign, other_record):
        asked.metadata.__dict__["_message_id"] = "2" * 64
        answer = relay.answer_message(asked, handle)
        assert answer.has_error()
        assert answer.error.code == relay.NOT_OURS


# A SuperLink, and nodes that speak to it over plain HTTP


MESSAGE_TABLES = (
    "message_ins",
    "message_res",
    "objects",
    "object_children",
    "run_objects",
    "object_push_sessions",
    "object_push_session_roots",
    "object_push_session_pending",
)
"""Every table that grows with messages."""


class Link:
    """A SuperLink whose Fleet interface is served without the gate."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "superlink.sqlite"
        self.superlink = SuperLink()
        self.mailbox = NodeMailbox(self.superlink)
        self.port = 0
        self.served: object = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.serve(self.superlink.fleet)

    def serve(self, app: object) -> None:
        self.stop()
        self.served = app
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(listener.getsockname()[1])
        config = uvicorn.Config(app, log_level="critical", ws="none")  # type: ignore[arg-type]
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(HANGING)

    def rows(self, table: str) -> int:
        with sqlite3.connect(self.database) as database:
            return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def stored_bytes(self) -> int:
        """Of all objects, and of the replies that are in their announcements."""
        with sqlite3.connect(self.database) as database:
            queries = (
                f"SELECT coalesce(sum(length(content)), 0) FROM {table}"
                for table in ("objects", "message_res")
            )
            return sum(int(database.execute(query).fetchone()[0]) for query in queries)

    def is_empty(self) -> bool:
        """Whether nothing of any message is left in the database."""
        return not any(map(self.rows, MESSAGE_TABLES))


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with Flower's tables and nothing in them: to make them takes most of a second."""
    path = tmp_path_factory.mktemp("migrated") / "superlink.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_DATABASE", str(path))
        create_app()
    # What Flower still holds open does not keep the copy from being whole.
    whole = path.with_name("whole.sqlite")
    with sqlite3.connect(path) as database, sqlite3.connect(whole) as copy:
        database.backup(copy)
    return whole


@pytest.fixture(scope="module")
def shared_link(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Link]:
    """One SuperLink for most tests: to start one takes most of a second."""
    with pytest.MonkeyPatch.context() as patch:
        yield from started(tmp_path_factory.mktemp("link"), patch, migrated)


@pytest.fixture
def link(shared_link: Link, identity: None) -> Link:
    """The SuperLink with nothing in it, in a run of this test's own."""
    link, server = shared_link, shared_link.superlink
    server._run_id, server._task_id = server._begin()
    link.mailbox = NodeMailbox(server)
    if link.served is not server.fleet:
        link.serve(server.fleet)
    return link


@pytest.fixture
def own_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, migrated: Path, identity: None
) -> Iterator[Link]:
    """A SuperLink that a test may spoil."""
    yield from started(tmp_path, monkeypatch, migrated)


def started(folder: Path, patch: pytest.MonkeyPatch, migrated: Path) -> Iterator[Link]:
    shutil.copy(migrated, folder / "superlink.sqlite")
    for name, value in FLOWER_ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.setenv("FLWR_DATABASE", str(folder / "superlink.sqlite"))
    # A question for messages is answered at once, but in the tests of its waiting.
    patch.setattr(umbel_server.port.reply_filter, "_HOLD_SECONDS", 0)
    patch.setattr(umbel_server.port.mailbox, "_TOGETHER_SECONDS", 0)
    for name in IDENTITY:
        patch.setattr(TaskIdentity, name, 1)
    made = Link(folder)
    yield made
    made.stop()
    made.superlink.close()


class SiteNode:
    """A node as Flower sees it."""

    def __init__(self, link: Link, ahead: float = 0) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.public = public_key_to_bytes(self.key.public_key())
        clock = ServerClock()
        clock.offset = timedelta(seconds=ahead)
        clock.learn = lambda response, asked: None  # type: ignore[method-assign]  # stays wrong
        self.client = FleetHttpClient(
            f"http://127.0.0.1:{link.port}",
            interceptors=[Signature(self.key, clock)],
            verify=False,  # there is no TLS, and to read the system's authorities takes long
        )
        self.stopping = threading.Event()

    def activate(self) -> Node:
        request = ActivateNodeRequest(public_key=self.public, heartbeat_interval=30.0)
        return Node(node_id=self.client.ActivateNode(request).node_id)

    def pull(self, node: Node) -> Message | None:
        """The next message, of which a large one is only announced."""
        pulled = self.client.PullMessages(PullMessagesRequest(node=node))
        return relay._opened(pulled.messages_list[0]) if pulled.messages_list else None

    def read(self, node: Node, message: Message) -> bytes:
        """What is in it."""
        pieces = self.talk(node).fetch(message, relay.LARGEST_MESSAGE)
        assert pieces is not None
        return b"".join(pieces)

    def reply(self, node: Node, request: Message, sealed: bytes) -> None:
        self.talk(node).reply(request, list(regrouped([sealed])))

    def talk(self, node: Node) -> relay.Conversation:
        return relay.Conversation(self.client, node, ServerClock(), self.stopping)


def joined(link: Link) -> tuple[SiteNode, Node]:
    """A site that is registered and connected."""
    site = SiteNode(link)
    link.superlink.register(site.public)
    return site, site.activate()


def posted(link: Link, node: Node) -> str:
    """The ID of a message that was left for a node."""
    identifier = link.mailbox.post(node.node_id, "x", iter([b"sealed"]), LONG_ENOUGH)
    assert identifier is not None
    return identifier


def test_a_node_registers_neither_itself_nor_others(link: Link) -> None:
    site = SiteNode(link)
    with pytest.raises(httpx.HTTPStatusError):
        site.client.RegisterNode(RegisterNodeFleetRequest(public_key=site.public))
    with pytest.raises(httpx.HTTPStatusError):
        site.activate()
    assert link.superlink.register(site.public) == link.superlink.register(site.public)
    assert site.activate().node_id == link.superlink.register(site.public)


@pytest.mark.parametrize(("ahead", "taken"), [(3, True), (7, False), (-290, True), (-320, False)])
def test_a_signature_is_taken_from_five_seconds_ahead_to_five_minutes_ago(
    link: Link, ahead: float, taken: bool
) -> None:
    site = SiteNode(link, ahead)
    link.superlink.register(site.public)
    if taken:
        site.activate()
    else:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            site.activate()
    assert timedelta(seconds=5) > TOLERATED_SKEW


def test_the_relay_signs_a_time_with_the_key_that_it_names(link: Link) -> None:
    site = SiteNode(link)
    link.superlink.register(site.public)
    request = ActivateNodeRequest(public_key=site.public, heartbeat_interval=30.0)

    def status(key: ec.EllipticCurvePrivateKey) -> int:
        stamp = datetime.now(UTC).isoformat()
        return httpx.post(
            f"http://127.0.0.1:{link.port}/v1/fleet/activate-node",
            content=request.SerializeToString(),
            headers={
                "content-type": PROTOBUF_MEDIA_TYPE,
                FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(site.public).decode(),
                TIMESTAMP_HEADER: stamp,
                FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, stamp.encode())).decode(),
            },
        ).status_code

    assert status(ec.generate_private_key(ec.SECP384R1())) == 401
    assert status(site.key) == 200


def test_a_node_that_never_came_gets_no_message(link: Link) -> None:
    site = SiteNode(link)
    node = link.superlink.register(site.public)
    assert link.mailbox.post(node, "x", iter([b"sealed"]), LONG_ENOUGH) is None
    site.activate()
    assert link.mailbox.post(node, "x", iter([b"sealed"]), LONG_ENOUGH) is not None


def test_a_connected_node_is_not_connected_again_unless_way_is_made(link: Link) -> None:
    site, node = joined(link)
    with pytest.raises(httpx.HTTPStatusError):
        site.activate()
    link.mailbox.make_way(site.public)
    assert site.activate() == node


def settled(link: Link) -> bool:
    """Whether nothing of any message is left, once what was read is deleted."""
    link.mailbox._deleting.submit(lambda: None).result(HANGING)
    return link.is_empty()


@pytest.mark.parametrize("size", [6, FLOWER_INLINE_BYTES, 3 * FLOWER_PIECE_BYTES])
def test_a_message_and_its_reply_leave_nothing_behind(link: Link, size: int) -> None:
    site, node = joined(link)
    sealed = os.urandom(size)
    identifier = link.mailbox.post(node.node_id, "x", iter([sealed]), LONG_ENOUGH, size)
    assert identifier is not None
    assert link.mailbox.collect(identifier) is None
    request = site.pull(node)
    assert request is not None
    assert site.read(node, request) == sealed
    site.reply(node, request, sealed[::-1])
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert reply.pieces is not None
    assert b"".join(reply.pieces) == sealed[::-1]
    assert settled(link)


@pytest.mark.full
def test_the_database_does_not_grow_over_a_thousand_messages(own_link: Link) -> None:
    site, node = joined(own_link)

    def exchanged(count: int) -> int:
        """The size of the database after so many messages and replies, in bytes."""
        for number in range(count):
            if number % 20 == 0:
                # Flower gives up a node that is silent for a minute.
                beat = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30.0)
                site.client.SendNodeHeartbeat(beat)
            sealed = os.urandom(5_000 if number % 10 else FLOWER_INLINE_BYTES + 1)
            identifier = own_link.mailbox.post(
                node.node_id, "x", iter([sealed]), LONG_ENOUGH, len(sealed)
            )
            request = site.pull(node)
            assert identifier is not None
            assert request is not None
            assert site.read(node, request) == sealed
            site.reply(node, request, sealed)
            reply = own_link.mailbox.collect(identifier)
            assert reply is not None
            assert b"".join(reply.pieces or ()) == sealed
        assert settled(own_link)
        with sqlite3.connect(own_link.database) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return own_link.database.stat().st_size

    before = exchanged(100)
    assert exchanged(1_000) <= 1.1 * before


def requests(site: SiteNode) -> list[str]:
    """The paths that the site asks from now on."""
    asked: list[str] = []
    site.client._client.event_hooks["request"].append(
        lambda request: asked.append(request.url.path.rpartition("/")[2])
    )
    return asked


@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (FLOWER_INLINE_BYTES, 0),
        (FLOWER_INLINE_BYTES + 1, 1),
        (2 * FLOWER_PIECE_BYTES, 2),
    ],
)
def test_a_message_is_one_request_and_one_for_each_piece(
    link: Link, size: int, pieces: int
) -> None:
    """So is a reply. The pieces are different ones also where they have the same bytes."""
    site, node = joined(link)
    asked = requests(site)
    sealed = bytes(size)
    identifier = link.mailbox.post(node.node_id, "x", iter([sealed]), LONG_ENOUGH, size)
    request = site.pull(node)
    assert request is not None
    assert site.read(node, request) == sealed
    site.reply(node, request, sealed[::-1])
    expected = {"pull-messages": 1, "push-messages": 1}
    if pieces:
        expected |= {"pull-object": pieces, "push-object": pieces}
    assert Counter(asked) == expected
    assert identifier is not None
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert b"".join(reply.pieces or ()) == sealed[::-1]


def test_a_large_message_may_have_a_small_reply(link: Link) -> None:
    site, node = joined(link)
    sealed = os.urandom(FLOWER_INLINE_BYTES + 1)
    assert link.mailbox.post(node.node_id, "x", iter([sealed]), LONG_ENOUGH) is not None
    request = site.pull(node)
    assert request is not None
    asked = requests(site)
    site.reply(node, request, b"reply")
    assert asked == ["push-messages"]


def test_a_relay_that_answers_again_gives_the_same_reply(link: Link) -> None:
    """As one does whose line was cut after its reply had come."""
    site, node = joined(link)
    identifier = posted(link, node)
    request = site.pull(node)
    assert request is not None
    for _ in range(2):
        site.reply(node, request, b"reply")
    with pytest.raises(httpx.HTTPStatusError, match="410"):
        site.reply(node, request, b"another")
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert b"".join(reply.pieces or ()) == b"reply"
    assert settled(link)


def test_a_question_for_messages_waits_for_one(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umbel_server.port.reply_filter, "_HOLD_SECONDS", HANGING)
    site, node = joined(link)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(site.pull, node)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        posted(link, node)
        assert waiting.result(HANGING) is not None


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANGING
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("ends", ["another question", "a heartbeat", "a connection"])
def test_a_question_that_nobody_may_wait_for_gets_no_message(
    own_link: Link, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A relay whose line was cut leaves one behind, and a message that it got would be lost. And a
    relay that stops does not wait for its own."""
    monkeypatch.setattr(umbel_server.port.reply_filter, "_HOLD_SECONDS", HANGING)
    link = own_link
    link.superlink.make_way = link.mailbox.make_way
    site, node = joined(link)
    filter_: Any = link.superlink.expected.on_posted.__self__  # type: ignore[attr-defined]
    beat = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30.0)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(site.pull, node)
        until(lambda: node.node_id in filter_._waiting)
        match ends:
            case "another question":
                second = pool.submit(site.pull, node)
            case "a heartbeat":
                site.client.SendNodeHeartbeat(beat)
            case "a connection":
                site.activate()
        assert first.result(HANGING) is None
        posted(link, node)
        if ends != "another question":
            second = pool.submit(site.pull, node)
        assert second.result(HANGING) is not None


def test_nobody_waits_for_messages_when_the_process_ends(
    own_link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(umbel_server.port.reply_filter, "_HOLD_SECONDS", HANGING)
    site, node = joined(own_link)
    filter_: Any = own_link.superlink.expected.on_posted.__self__  # type: ignore[attr-defined]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(site.pull, node)
        until(lambda: node.node_id in filter_._waiting)
        own_link.superlink.expected.close()
        assert waiting.result(HANGING) is None
        assert pool.submit(site.pull, node).result(HANGING) is None


def test_no_thread_sleeps_until_another_has_written(own_link: Link) -> None:
    """Without turns, SQLite's second writer sleeps, for up to a minute; here it waits for the lock,
    and so does not find the database locked even where SQLite would not sleep at all."""
    state = own_link.superlink.state
    with state.session() as session:
        session.execute(text("PRAGMA busy_timeout = 0"))
    _, node = joined(own_link)
    begun, over = threading.Event(), threading.Event()

    def write() -> None:
        with state.session() as session:
            session.execute(text("UPDATE node SET owner_name = owner_name"))
            begun.set()
            over.wait(HANGING)

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write)
        assert begun.wait(HANGING)
        posting = pool.submit(posted, own_link, node)
        with pytest.raises(TimeoutError):
            posting.result(0.3)
        over.set()
        writing.result(HANGING)
        assert posting.result(HANGING)


@contextmanager
def statements(link: Link) -> Iterator[list[str]]:
    """What the database is asked to do meanwhile."""
    did: list[str] = []

    def note(*asked: Any) -> None:
        did.append(asked[2])

    engine = link.superlink.state._engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield did
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_a_node_that_is_asked_nothing_is_told_so_without_the_database(link: Link) -> None:
    (site, node), (other, other_node) = joined(link), joined(link)
    identifier = link.mailbox.post(other_node.node_id, "x", iter([b"sealed"]), LONG_ENOUGH)
    assert identifier is not None
    with statements(link) as did:
        assert site.pull(node) is None
    # Only whose key it is.
    assert [statement for statement in did if not statement.startswith("SELECT node")] == []
    with statements(link) as did:
        assert other.pull(other_node) is not None
    assert any("UPDATE message_ins" in statement for statement in did)
    link.mailbox.forget(identifier)
    with statements(link) as did:
        assert other.pull(other_node) is None
    assert not any("message_ins" in statement for statement in did)


def test_the_database_is_asked_seldom_for_a_reply_of_which_nothing_has_come(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, node = joined(link)
    large = os.urandom(FLOWER_INLINE_BYTES + 1)
    identifier = link.mailbox.post(node.node_id, "x", iter([b"sealed"]), LONG_ENOUGH, len(large))
    assert identifier is not None
    request = site.pull(node)
    assert request is not None
    # A message that may have expired is looked for after a while, and then seldom.
    monkeypatch.setattr(umbel_server.port.mailbox, "_ASK_SECONDS", 0)
    with statements(link) as did:
        assert link.mailbox.collect(identifier) is None
    assert did
    monkeypatch.setattr(umbel_server.port.mailbox, "_ASK_SECONDS", HANGING)
    with statements(link) as did:
        assert link.mailbox.collect(identifier) is None
    assert did == []
    # So is a reply that is announced, and has not come.
    push, parts = site.client.PushObject, list[Any]()
    monkeypatch.setattr(site.client, "PushObject", parts.append)
    site.reply(node, request, large)
    assert link.mailbox.collect(identifier) is None
    with statements(link) as did:
        assert link.mailbox.collect(identifier) is None
    assert did == []
    # As soon as all of it has come, it is there.
    for part in parts:
        push(part)
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert reply.pieces is not None
    assert b"".join(reply.pieces) == large


def test_a_message_whose_delivery_was_lost_is_delivered_once_more(link: Link) -> None:
    """Flower delivers a message once. A relay asks for the next one when it has answered, so one
    that asks before that has not got the message, or has dropped it."""
    site, node = joined(link)
    first, second = posted(link, node), posted(link, node)
    one = site.pull(node)
    again = site.pull(node)
    assert one is not None
    assert again is not None
    assert {one.metadata.message_id, again.metadata.message_id} <= {first, second}
    found = [site.pull(node) for _ in range(4)]
    seen = Counter(got.metadata.message_id for got in (one, again, *found) if got is not None)
    assert seen == {first: 2, second: 2}


def test_what_was_delivered_and_not_answered_is_delivered_again(link: Link) -> None:
    site, node = joined(link)
    identifier = posted(link, node)
    assert site.pull(node) is not None
    link.mailbox.make_way(site.public)
    site.activate()
    again = site.pull(node)
    assert again is not None
    site.reply(node, again, b"reply")
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert reply.pieces is not None
    assert b"".join(reply.pieces) == b"reply"


def test_flower_gives_up_a_node_that_is_away_and_we_wait_for_it(link: Link) -> None:
    site, node = joined(link)
    identifier = posted(link, node)
    state = link.superlink.state
    state.deactivate_node(node.node_id)
    assert link.mailbox.collect(identifier) is None
    (given_up,) = state.get_message_res({identifier}, link.superlink.run_id)
    assert given_up.has_error()
    site.activate()
    request = site.pull(node)
    assert request is not None
    site.reply(node, request, b"reply")
    assert (reply := link.mailbox.collect(identifier)) is not None
    assert reply.pieces is not None
    assert b"".join(reply.pieces) == b"reply"


def test_a_node_that_is_cut_off_while_its_reply_is_looked_for_is_not_given_up(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two questions, whether it is there and whether it has answered."""
    site, node = joined(link)
    identifier = posted(link, node)
    state = link.superlink.state
    ask = state.get_message_res

    def cut_off(*arguments: Any) -> Any:
        link.mailbox.make_way(site.public)
        replies = ask(*arguments)
        assert [reply.error.code for reply in replies] == [ErrorCode.NODE_UNAVAILABLE]
        site.activate()
        return replies

    monkeypatch.setattr(umbel_server.port.mailbox, "_ASK_SECONDS", 0)
    monkeypatch.setattr(state, "get_message_res", cut_off)
    assert link.mailbox.collect(identifier) is None
    monkeypatch.undo()
    request = site.pull(node)
    assert request is not None
    site.reply(node, request, b"reply")
    assert (reply := link.mailbox.collect(identifier)) is not None
    assert reply.pieces is not None
    assert b"".join(reply.pieces) == b"reply"
    settled(link)
    assert link.rows("objects") == 0


def test_a_node_that_stays_away_is_given_up_and_its_message_deleted(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, node = joined(link)
    identifier = posted(link, node)
    assert site.pull(node) is not None
    link.superlink.state.deactivate_node(node.node_id)
    monkeypatch.setattr(umbel_server.port.superlink, "_RETURN_SECONDS", 0.5)
    assert link.mailbox.collect(identifier) is None
    time.sleep(0.6)
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert reply.pieces is None
    assert link.rows("objects") == link.rows("message_ins") == 0


def test_a_run_whose_app_is_silent_for_a_minute_ends_and_ours_is_not(
    own_link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = own_link.superlink._task_id
    assert own_link.superlink.state.acknowledge_task_heartbeat(task)
    assert _KEEP_ALIVE_SECONDS < 60 / 3

    def later() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=61)

    monkeypatch.setattr(flwr.supercore.corestate.sql_corestate, "now", later)
    monkeypatch.setattr(umbel_server.port.flower_patches, "_TIDY_SECONDS", 0)
    assert not own_link.superlink.state.acknowledge_task_heartbeat(task)


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 3), (_TIDY_SECONDS, 0)])
def test_silent_runs_are_looked_for_seldom(
    own_link: Link, monkeypatch: pytest.MonkeyPatch, seconds: float, times: int
) -> None:
    monkeypatch.setattr(umbel_server.port.flower_patches, "_TIDY_SECONDS", seconds)
    state = own_link.superlink.state
    state.get_run_status({own_link.superlink.run_id})
    written: list[str] = []
    event.listen(state._engine, "before_cursor_execute", lambda *did: written.append(did[2]))
    for _ in range(3):
        # As Flower does before it answers nearly every request of a relay.
        state.get_run_status({own_link.superlink.run_id})
    # One for runs that are starting, one for those that run.
    assert len([statement for statement in written if "UPDATE task" in statement]) == 2 * times


def test_what_flower_sums_of_traffic_is_not_written(link: Link) -> None:
    inspect.signature(LinkState.store_traffic).bind(None, 1, bytes_sent=1, bytes_recv=1)
    site, node = joined(link)
    link.mailbox.post(node.node_id, "x", iter([b"sealed"]), LONG_ENOUGH)
    assert site.pull(node) is not None
    (run,) = link.superlink.state.get_run_info(run_ids=[link.superlink.run_id])
    assert run.bytes_sent == run.bytes_recv == 0


@pytest.mark.parametrize("answered", [False, True])
def test_a_message_that_nobody_waits_for_any_more_is_deleted(
    own_link: Link, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """Also if nobody posts another: the process with the jobs was killed."""
    link = own_link
    monkeypatch.setattr(umbel_server.port.mailbox, "_READ_SECONDS", 0)
    site, node = joined(link)
    slow = link.mailbox.post(node.node_id, "slow", iter([b"sealed"]), 3.0)
    assert slow is not None
    request = site.pull(node)
    assert request is not None
    if answered:
        site.reply(node, request, b"reply")
    assert not link.is_empty()
    monkeypatch.setattr(umbel_server.port.superlink, "_KEEP_ALIVE_SECONDS", 0.05)
    link.superlink._alive = threading.Thread(target=link.superlink._keep_alive, daemon=True)
    link.superlink._alive.start()
    until(link.is_empty)


def test_the_next_start_deletes_what_nobody_fetched(own_link: Link) -> None:
    _, node = joined(own_link)
    own_link.mailbox.post(node.node_id, "x", iter([os.urandom(100)]), LONG_ENOUGH)
    assert own_link.rows("objects") > 0
    following = SuperLink()
    try:
        assert own_link.rows("objects") == own_link.rows("message_ins") == 0
        # And the message of the former run is not waited for.
        assert NodeMailbox(following).collect("0" * 64) is not None
    finally:
        following.close()


def test_the_client_is_httpx_with_a_switch_for_redirections() -> None:
    with FleetHttpClient("https://127.0.0.1:1") as client:
        assert isinstance(client._client, httpx.Client)
        # Flower follows them, which `fleet_client` switches off.
        assert client._client.follow_redirects is True
        assert client._client.trust_env is True
    context = ssl.create_default_context()
    ours = Way("127.0.0.1:1", None).client(context, 1.0)
    signature = Signature(ec.generate_private_key(ec.SECP384R1()), ServerClock())
    with fleet_client("127.0.0.1:1", context, ours, signature) as client:
        assert client._client is ours
        assert client._interceptors == (signature,)
        assert (ours.follow_redirects, ours.trust_env) == (False, False)


def test_every_path_that_the_gate_lets_through_exists(link: Link) -> None:
    http = httpx.Client(verify=False)
    for path in PATHS:
        status = http.post(f"http://127.0.0.1:{link.port}{path}", content=b"").status_code
        assert status not in (404, 405), path


def test_control_runtime_and_the_pages_of_documentation_are_not_there(link: Link) -> None:
    whole = create_app()
    paths = [
        *("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task"),
        *("/v1/runtime/push-messages", "/v1/runtime/responses", "/docs", "/openapi.json"),
    ]

    def statuses() -> set[int]:
        address = f"http://127.0.0.1:{link.port}"
        protobuf = {"content-type": PROTOBUF_MEDIA_TYPE}
        http = httpx.Client(verify=False)
        return {
            status
            for path in paths
            for status in [
                http.get(address + path).status_code,
                http.post(address + path, headers=protobuf, content=b"").status_code,
            ]
        }

    assert statuses() == {404}
    link.serve(whole)
    assert statuses() - {404}


def test_what_requests_pass_through_is_what_was_read() -> None:
    passed = [one.cls.__name__ for one in create_app().user_middleware]
    assert passed == [
        "ControlSensitiveResponseMiddleware",
        "BaseHTTPMiddleware",  # http_error_translator
        "ControlAuthenticationMiddleware",
        "ControlLicenseMiddleware",
        "ProtobufTranslationMiddleware",
        "ControlEventLogMiddleware",
        "NodeAuthMiddleware",
        "FleetEventLogMiddleware",
    ]


# What Flower does not check, and we do


CHECKED = pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])


def take_anything(patch: pytest.MonkeyPatch) -> None:
    """Without the checks of what a site sends in answer."""
    patch.setattr(ReplyFilter, "_judge_reply", lambda self, request: None)
    patch.setattr(ExpectedReplies, "take", lambda *_: Verdict.TAKEN)
    # What was not judged is not known to have come either, and Flower is asked after a while.
    patch.setattr(umbel_server.port.mailbox, "_ASK_SECONDS", 0)


@CHECKED
def test_what_judges_requests_gets_only_those_that_are_authenticated(
    own_link: Link, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """And what waits for the database there does not wait in the event loop."""
    if not checked:
        monkeypatch.setattr(
            flwr.superlink.routers.fleet.node_auth, "authenticate_node", lambda request: None
        )
    made: list[tuple[bytes, threading.Thread]] = []
    own_link.superlink.make_way = lambda key: made.append((key, threading.current_thread()))
    site, stranger = SiteNode(own_link), SiteNode(own_link)
    own_link.superlink.register(site.public)
    claimed = ActivateNodeRequest(public_key=site.public, heartbeat_interval=30.0)
    if checked:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            stranger.client.ActivateNode(claimed)
        assert not made
        site.activate()
    else:
        stranger.client.ActivateNode(claimed)
    ((key, thread),) = made
    assert key == site.public
    assert thread is not own_link._thread


@CHECKED
def test_a_relay_that_connects_all_the_time_is_told_to_wait(
    own_link: Link, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    if not checked:
        monkeypatch.setattr(ReplyFilter, "_is_too_often", lambda *_: False)
    own_link.superlink.make_way = own_link.mailbox.make_way
    site, other = SiteNode(own_link), SiteNode(own_link)
    for node in (site, other):
        own_link.superlink.register(node.public)
    for _ in range(5):
        site.activate()
    if checked:
        with pytest.raises(httpx.HTTPStatusError, match="429"):
            site.activate()
    else:
        site.activate()
    other.activate()


@CHECKED
def test_a_site_cannot_answer_for_another(
    link: Link, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    if not checked:
        take_anything(monkeypatch)
    (north, north_node), (east, east_node) = joined(link), joined(link)
    identifier = link.mailbox.post(north_node.node_id, "x", iter([b"sealed"]), LONG_ENOUGH)
    assert identifier is not None
    # East has learned what north was sent; mostly it could not.
    request = north.pull(north_node)
    assert request is not None
    if checked:
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            east.reply(east_node, request, b"from east")
        north.reply(north_node, request, b"from north")
    else:
        east.reply(east_node, request, b"from east")
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert reply.pieces is not None
    assert b"".join(reply.pieces) == (b"from north" if checked else b"from east")


def test_a_reply_that_is_none_of_ours_is_none(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    take_anything(monkeypatch)
    site, node = joined(link)
    identifier = posted(link, node)
    request = site.pull(node)
    assert request is not None
    site.talk(node)._push(request, relay.no_answer(request), [])
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert reply.pieces is None
    assert link.is_empty()


def asked(link: Link, size: int = 1) -> tuple[SiteNode, Node, str, Message]:
    """A site, and a message to it that it has pulled and may answer with so many bytes."""
    site, node = joined(link)
    sealed = os.urandom(100)
    identifier = link.mailbox.post(node.node_id, "x", iter([sealed]), LONG_ENOUGH, size)
    request = site.pull(node)
    assert identifier is not None
    assert request is not None
    return site, node, identifier, request


OTHER = ObjectTree(object_id=os.urandom(32).hex())
LARGE = os.urandom(FLOWER_INLINE_BYTES + 1)


def under(tree: ObjectTree, *children: ObjectTree) -> ObjectTree:
    return ObjectTree(object_id=tree.object_id, children=children)


BELONGS_TO_NOTHING: dict[str, Callable[[ObjectTree], list[ObjectTree]]] = {
    "another object": lambda tree: [OTHER],
    "a piece more": lambda tree: [under(tree, *tree.children, OTHER)],
    "another piece": lambda tree: [under(tree, OTHER)],
    "parts of a piece": lambda tree: [under(tree, under(tree.children[0], OTHER))],
    "a second tree": lambda tree: [tree, OTHER],
    "no tree": lambda tree: [],
}


@CHECKED
@pytest.mark.parametrize("announced", BELONGS_TO_NOTHING)
def test_objects_that_belong_to_no_message_are_not_stored(
    link: Link, monkeypatch: pytest.MonkeyPatch, announced: str, checked: bool
) -> None:
    if not checked:
        if announced in ("a second tree", "no tree"):
            pytest.skip("Flower stores nothing of it by itself")
        take_anything(monkeypatch)
    site, node, identifier, request = asked(link, len(LARGE))
    before = link.rows("objects")
    push = site.client.PushMessages

    def pushing(announcement: PushMessagesRequest) -> Any:
        (tree,) = announcement.message_object_trees
        changed = BELONGS_TO_NOTHING[announced](tree)
        del announcement.message_object_trees[:]
        announcement.message_object_trees.extend(changed)
        return push(announcement)

    monkeypatch.setattr(site.client, "PushMessages", pushing)
    if checked:
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            site.reply(node, request, LARGE)
        assert link.rows("objects") == before
    else:
        site.reply(node, request, LARGE)
        assert link.rows("objects") > before
    link.mailbox.forget(identifier)
    assert link.is_empty() is (checked or announced != "another object")


CONTENTS: dict[str, RecordDict] = {
    "nothing": RecordDict(),
    "another record": RecordDict({"x": ConfigRecord({FLOWER_FIELD: b"reply"})}),
    "another field": RecordDict({FLOWER_RECORD: ConfigRecord({"x": b"reply"})}),
    "a field more": RecordDict({FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: b"reply", "x": 1})}),
    "a record more": RecordDict(
        {FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: b"reply"}), "x": ConfigRecord()}
    ),
    "numbers": RecordDict({FLOWER_RECORD: MetricRecord({"x": [1] * 20_000})}),
    "names of no pieces": packed_names([os.urandom(32).hex()]),
}


@CHECKED
@pytest.mark.parametrize("content", CONTENTS)
def test_what_is_announced_is_a_reply_of_ours(
    link: Link, monkeypatch: pytest.MonkeyPatch, content: str, checked: bool
) -> None:
    """What Flower makes of many small parts takes a hundred times their bytes."""
    if not checked:
        take_anything(monkeypatch)
    site, node, identifier, request = asked(link, len(LARGE))
    made = Message(CONTENTS[content], reply_to=request)
    # As if it were a small reply, whatever it is.
    monkeypatch.setattr(relay, "unpacked_names", lambda reply: None)
    monkeypatch.setattr(relay, "unpacked", lambda reply: b"x")
    if checked:
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            site.talk(node)._push(request, made, [])
        assert link.rows("message_res") == 0
    else:
        site.talk(node)._push(request, made, [])
        assert link.rows("message_res") == 1
    link.mailbox.forget(identifier)
    assert link.is_empty()


def items(count: int) -> bytes:
    """An object of many small parts: over 4 MiB of them Flower takes four seconds."""
    return ConfigRecord({f"{number:05}": number for number in range(count)}).deflate()


NO_PIECES: dict[str, Callable[[], bytes]] = {
    "another object": lambda: MetricRecord({"x": [1]}).deflate(),
    "many parts": lambda: items(1000),
    "many names of parts": lambda: b"ConfigRecord " + 10_000 * b"," + b" 0\0",
    "a list": lambda: ConfigRecord({FLOWER_FIELD: ["a"], FLOWER_PLACE: "0"}).deflate(),
    "a field more": lambda: ConfigRecord({FLOWER_FIELD: b"a", FLOWER_PLACE: "0", "x": 1}).deflate(),
    "a long place": lambda: ConfigRecord({FLOWER_FIELD: b"a", FLOWER_PLACE: 999 * "0"}).deflate(),
}


@CHECKED
@pytest.mark.parametrize("kind", NO_PIECES)
def test_an_object_that_is_no_piece_is_not_given_to_flower(
    link: Link, monkeypatch: pytest.MonkeyPatch, kind: str, checked: bool
) -> None:
    if not checked:
        monkeypatch.setattr(umbel_server.port.reply_filter, "is_piece", lambda content: True)
    site, node, identifier, request = asked(link, len(LARGE))
    content = NO_PIECES[kind]()
    assert unpacked_piece(content) is None
    monkeypatch.setattr(relay, "packed_piece", lambda *_: (get_object_id(content), content))
    if checked:
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            site.reply(node, request, LARGE)
        assert link.stored_bytes() < 5000
    else:
        site.reply(node, request, LARGE)
        assert link.superlink.state.object_store.get(get_object_id(content)) == content
    link.mailbox.forget(identifier)
    assert link.is_empty()


def test_pieces_without_names_are_not_looked_at() -> None:
    """The event loop waits meanwhile: 30,000 of them, in 60 kB, took it 50 ms."""

    def request(pieces: int, named: int) -> PushMessagesRequest:
        names = [f"{number:064x}" for number in range(named)]
        tree = ObjectTree(
            object_id="a" * 64,
            children=[ObjectTree(object_id=name) for name in names]
            + [ObjectTree() for _ in range(pieces - named)],
        )
        made = PushMessagesRequest(node=Node(node_id=7), message_object_trees=[tree])
        message = made.messages_list.add(content=recorddict_to_proto(packed_names(names)))
        message.metadata.message_id, message.metadata.src_node_id = "a" * 64, 7
        return made

    def seconds(judged: PushMessagesRequest) -> float:
        return min(timeit.repeat(lambda: announcement(judged), number=1, repeat=5))

    honest, hostile = request(512, 512), request(30_000, 1)
    assert announcement(honest) is not None
    assert announcement(hostile) is None
    assert hostile.ByteSize() < 1 << 16
    assert seconds(hostile) < seconds(honest)


@CHECKED
@pytest.mark.parametrize("field", ["created_at", "ttl"])
def test_a_reply_that_flower_cannot_read_is_none(
    link: Link, monkeypatch: pytest.MonkeyPatch, field: str, checked: bool
) -> None:
    """It takes a time that is no number, and raises whenever it is asked for the reply."""
    if not checked:
        monkeypatch.setattr(umbel_server.port.mailbox, "SQLAlchemyError", Exception)
    site, node, identifier, request = asked(link)
    push = site.client.PushMessages

    def pushing(announcement: PushMessagesRequest) -> Any:
        setattr(announcement.messages_list[0].metadata, field, math.nan)
        return push(announcement)

    monkeypatch.setattr(site.client, "PushMessages", pushing)
    site.reply(node, request, b"reply")
    if checked:
        reply = link.mailbox.collect(identifier)
        assert reply is not None
        assert reply.pieces is None
        assert link.is_empty()
    else:
        for _ in range(2):
            with pytest.raises(TypeError):
                link.mailbox.collect(identifier)
        link.mailbox.forget(identifier)


def test_a_site_cannot_say_that_its_node_is_away(link: Link) -> None:
    """Flower says so itself, and then the message is waited for."""
    site, node, identifier, request = asked(link)
    away = Message(Error(ErrorCode.NODE_UNAVAILABLE, "away"), reply_to=request)
    site.talk(node)._push(request, away, [])
    reply = link.mailbox.collect(identifier)
    assert reply is not None
    assert reply.pieces is None
    assert link.is_empty()


@CHECKED
def test_a_piece_may_be_long_in_coming(
    link: Link, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """As long as the gate gives it, after a cut that a relay waits out."""
    if not checked:
        monkeypatch.setattr(sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", 180)
    site, node, identifier, request = asked(link, len(LARGE))
    push = site.client.PushObject
    late = timedelta(seconds=gate._REQUEST_SECONDS + relay._PATIENCE_SECONDS)

    def slowly(part: Any) -> Any:
        with link.superlink.state.session() as session:
            (note,) = session.scalars(select(ObjectPushSession))
            note.expires_at -= late
        return push(part)

    monkeypatch.setattr(site.client, "PushObject", slowly)
    site.reply(node, request, LARGE)
    reply = link.mailbox.collect(identifier)
    assert (reply is not None) is checked
    if reply is not None:
        assert b"".join(reply.pieces or ()) == LARGE
    else:
        link.mailbox.forget(identifier)


@CHECKED
@pytest.mark.parametrize("refused", ["a reply", "a piece"])
def test_what_flower_does_not_store_has_not_come(
    link: Link, monkeypatch: pytest.MonkeyPatch, refused: str, checked: bool
) -> None:
    """It answers as if it were well."""
    if not checked:
        note = umbel_server.port.reply_filter.ReplyFilter._note

        def credulous(self: ReplyFilter, scope: Any, request: Any, comes: str | None) -> None:
            if comes is not None:
                self._expected.stored(request.node.node_id, comes)
            else:
                note(self, scope, request, comes)

        monkeypatch.setattr(ReplyFilter, "_note", credulous)
    site, node, identifier, request = asked(link, len(LARGE))
    if refused == "a reply":
        # It would live longer than the message that it answers.
        request.metadata.__dict__["_ttl"] = 2 * LONG_ENOUGH
        site.reply(node, request, b"reply")
    else:
        push = site.client.PushObject

        def changed(part: Any) -> Any:
            part.object_content = packed_piece(b"other", "x", 0)[1]
            return push(part)

        monkeypatch.setattr(site.client, "PushObject", changed)
        site.reply(node, request, LARGE)
    assert link.superlink.expected.has_come(identifier) is not checked
    link.mailbox.forget(identifier)


@CHECKED
@pytest.mark.parametrize("excess", [10_000, FLOWER_PIECE_BYTES])
def test_a_reply_that_is_larger_than_its_message_allows_is_not_stored(
    link: Link, monkeypatch: pytest.MonkeyPatch, excess: int, checked: bool
) -> None:
    if not checked:
        take_anything(monkeypatch)
    site, node, identifier, request = asked(link, size=1000)
    reply = os.urandom(10_000 + excess)
    if checked:
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            site.reply(node, request, reply)
        assert link.stored_bytes() < 10_000
    else:
        site.reply(node, request, reply)
        assert link.stored_bytes() > len(reply)
    link.mailbox.forget(identifier)
    assert link.is_empty()


def test_a_reply_that_comes_while_its_message_is_deleted_leaves_nothing_behind(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the transaction in which the message is deleted, and is refused then."""
    patches = umbel_server.port.flower_patches
    take_anything(monkeypatch)
    site, node, identifier, request = asked(link)
    look, pool = patches.replies_to, ThreadPoolExecutor()
    replying: list[Future[None]] = []

    def meanwhile(state: Any, asked_for: Collection[str]) -> list[str]:
        found = look(state, asked_for)
        replying.append(pool.submit(site.reply, node, request, b"reply"))
        time.sleep(0.3)
        return found

    monkeypatch.setattr(patches, "replies_to", meanwhile)
    link.mailbox.forget(identifier)
    replying[0].result(HANGING)
    assert not any(map(link.rows, ("message_ins", "message_res", "objects")))


@CHECKED
def test_an_answer_that_stops_halfway_leaves_nothing_behind(
    link: Link, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    patches = umbel_server.port.flower_patches
    if not checked:
        monkeypatch.setattr(patches, "end_sessions", lambda state, replies: None)
    site, node, identifier, request = asked(link, len(LARGE))

    def cut(part: object) -> None:
        raise httpx.ConnectError("cut")

    monkeypatch.setattr(site.client, "PushObject", cut)
    site.stopping.set()
    with pytest.raises(httpx.ConnectError):
        site.reply(node, request, LARGE)
    link.mailbox.forget(identifier)
    assert link.is_empty() is checked


@CHECKED
def test_announcements_that_flower_refuses_leave_nothing_behind(
    link: Link, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    patches = umbel_server.port.flower_patches
    if not checked:
        monkeypatch.setattr(patches, "end_sessions", lambda state, replies: None)
    site, node, identifier, request = asked(link)
    # It would live longer than the message that it answers.
    request.metadata.__dict__["_ttl"] = 2 * LONG_ENOUGH
    push = site.client.PushMessages
    monkeypatch.setattr(
        site.client, "PushMessages", lambda announced: [push(announced) for _ in range(3)][-1]
    )
    site.reply(node, request, b"reply")
    assert link.rows("object_push_sessions") == 3
    later = datetime.now(UTC) + timedelta(seconds=PUSH_SECONDS)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]  # no Later
            return later

    monkeypatch.setattr(patches, "datetime", Later)
    link.mailbox.forget(identifier)
    assert link.is_empty() is checked


def test_a_site_cannot_guess_the_names_of_anothers_pieces(link: Link) -> None:
    """Flower stores no object that somebody announced with other parts before, and an adapter's
    pieces are the same bytes in a later attempt."""
    _, node = joined(link)
    names: set[str] = set()
    for _ in range(2):
        identifier = link.mailbox.post(node.node_id, "x", iter([LARGE]), LONG_ENOUGH)
        assert identifier is not None
        names.add(identifier)
        tree = link.superlink.state.object_store.get_object_tree(identifier)
        names |= {piece.object_id for piece in tree.children}
    assert len(names) == 4
