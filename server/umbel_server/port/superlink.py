"""Flower's SuperLink as a carrier of sealed bytes: nodes, messages and objects in SQLite.

Of Flower's three interfaces only Fleet is there, for relays. What Control and Runtime are for, to
start a run and to speak for it, happens inside this process: no app bundle exists, and no token
that could be stolen. `docs/adr/0011-flower-as-a-carrier.md` says why;
`tests/e2e/test_flower_contract.py` holds every name of Flower's that is used here.
"""

import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastapi import FastAPI
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    ErrorCode,
)
from flwr.supercore import sql_mixin
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp

from umbel_host.transport.flower import PieceElsewhere, names_of_pieces, packed_file, piece_of
from umbel_host.transport.pieces import FLOWER_MESSAGE_TYPE, FLOWER_PIECE_BYTES
from umbel_server.port.reply_filter import ReplyFilter

_logger = logging.getLogger("umbel.port")

_KEEP_ALIVE_SECONDS = 15.0
_TIDY_SECONDS = 5.0
"""Between two looks for runs whose app is silent. Flower would look at nearly every request of a
relay, by statements that wait for a turn to write: a sixth of what a round costs this process."""
_RETURN_SECONDS = 120.0
"""How long a node that went away is waited for: a relay may be restarted, or its line be cut."""
_READ_SECONDS = 300.0
"""How long after its message has expired a reply may still be read."""


@dataclass(frozen=True)
class _Posted:
    node: int
    expires: float
    """Monotonic clock, seconds."""


@dataclass(frozen=True)
class Collected:
    """What became of a message."""

    pieces: Iterator[bytes] | None
    """Read from the database one at a time; when all are read, they are deleted. None: the node is
    gone, the message expired, or the reply is none of ours."""


class SuperLink:
    """One SuperLink; its methods may be called from any thread."""

    def __init__(self) -> None:
        """Opens the database that the environment names, and begins a new run in it.

        What former runs left undelivered is deleted: nobody waits for it any more.
        """
        # A cache of 64 MB in each of up to thirty connections, 256 MB of the file mapped into
        # memory, and a copy in memory of every message that is being deleted (to undo it if the
        # statement fails) would be most of this process.
        databases: Any = sql_mixin
        ours = {"cache_size": "-2000", "mmap_size": "4000000", "temp_store": "FILE"}
        # To delete a large message takes longer than Flower's five seconds on a busy machine, and
        # meanwhile nobody else can write.
        ours["busy_timeout"] = "60000"
        databases.SQLITE_PRAGMAS = tuple(
            (name, ours.get(name, value)) for name, value in databases.SQLITE_PRAGMAS
        )
        self._folder = str(Path(os.environ["FLWR_DATABASE"]).parent)
        flower = create_app()
        # Nodes are registered here and by nobody else.
        flower.state.enable_supernode_auth = True
        self.fleet: ASGIApp = ReplyFilter(_fleet_of(flower))
        """Flower's application for relays."""
        self._state = flower.state.linkstate_factory.state()
        self._state._cleanup_expired_task_tokens = _seldom(self._state._cleanup_expired_task_tokens)
        # A sum that nobody reads, at the price of a turn to write for each piece of a message.
        self._state.store_traffic = lambda run_id, *, bytes_sent, bytes_recv: None
        self._posting = threading.Lock()
        self._posted_lock = threading.Lock()
        self._posted: dict[str, _Posted] = {}
        """Message that was not collected -> who it is for."""
        self._arriving: dict[str, str | None] = {}
        """Message -> its reply, whose pieces are being pushed; None: an error, which has none."""
        self._arrived: dict[str, set[str]] = {}
        """Reply -> the parts of it that are there."""
        self._stopped = threading.Event()
        self._run_id, self._task_id = self._begin()
        self._alive = threading.Thread(target=self._keep_alive, daemon=True)
        self._alive.start()

    def close(self) -> None:
        """Ends the run, and deletes what it holds."""
        self._stopped.set()
        self._alive.join()
        self._state.stop_run(self._run_id)

    def register(self, key: bytes) -> int:
        """The node of a relay's public key (PEM), which may connect from now on."""
        known = self._state.get_node_id_by_public_key(key)
        if known is not None:
            return int(known)
        return int(self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0))

    def make_way(self, key: bytes) -> None:
        """Ends the former connection of a relay that connects again.

        Flower would refuse it until the former connection has been silent for a minute, and would
        not deliver again what the former connection was given and did not answer.
        """
        node = self._state.get_node_id_by_public_key(key)
        if node is None:
            return
        self._state.deactivate_node(node)
        with self._posted_lock:
            unanswered = [name for name, posted in self._posted.items() if posted.node == node]
            for name in unanswered:
                if name in self._arriving:
                    # The rest of that reply was lost with the connection.
                    self._arriving[name] = None
        again = update(MessageIns).where(
            MessageIns.message_id.in_(unanswered), MessageIns.delivered_at != ""
        )
        with self._state.session() as session:
            session.execute(again.values(delivered_at=""))

    def post(self, node: int, label: str, sealed: Iterator[bytes], seconds: float) -> str | None:
        """Leaves a message for a node; its ID, or None while the node was never connected.

        Args:
            label: what Flower shows of it.
            sealed: its bytes, in parts of any size.
            seconds: after which nobody waits for the reply.
        """
        self._forget_expired()
        (info,) = self._state.get_node_info(node_ids=[node])
        if info.status not in (NodeStatus.ONLINE, NodeStatus.OFFLINE):
            return None
        # Flower wants to know the digests of all pieces before it takes the first one. A message
        # may be as large as an adapter: it waits in a file, without a name, and one at a time.
        with (
            self._posting,
            no_object_id_recompute(),
            tempfile.SpooledTemporaryFile(FLOWER_PIECE_BYTES, dir=self._folder) as spool,
        ):
            message = Message(
                packed_file(sealed, cast(BinaryIO, spool)),
                dst_node_id=node,
                message_type=FLOWER_MESSAGE_TYPE,
                ttl=seconds,
                group_id=label,
            )
            identifier = str(message.object_id)
            message.metadata.__dict__["_message_id"] = identifier
            objects = get_all_nested_objects(message)
            session = self._state.start_session(self._run_id)
            stored, missing = self._state.store_message_and_object_tree(
                remove_content_from_message(message), get_object_tree(message), session
            )
            if not stored:
                return None
            for name in missing:
                self._state.store_object(self._run_id, session, name, objects[name].deflate())
            with self._posted_lock:
                self._posted[identifier] = _Posted(node, time.monotonic() + seconds)
            return identifier

    def collect(self, identifier: str) -> Collected | None:
        """The reply to a message, once; None while it may still come."""
        with self._posted_lock:
            posted = self._posted.get(identifier)
        if posted is None:
            # Posted to a former run of this process.
            return Collected(None)
        if identifier not in self._arriving:
            if self._is_away(posted.node):
                return None
            replies = self._state.get_message_res({identifier}, self._run_id)
            if not replies:
                return None
            # Flower tells of a reply once, when its node has announced it: not all is there yet.
            (reply,) = replies
            name = str(reply.metadata.message_id)
            if reply.has_error():
                # One that Flower made itself is not in the table of replies.
                self._state.object_store.delete(name)
                unavailable = reply.error.code == ErrorCode.NODE_UNAVAILABLE
                if unavailable and not self._is_gone(posted.node):
                    # It was cut off, or connected again, in this very moment.
                    return None
            self._arriving[identifier] = None if reply.has_error() else name
        announced = self._arriving[identifier]
        names = None
        if announced is not None:
            if not self._is_complete(announced):
                return None
            names = self._names(announced)
        if announced is None or names is None:
            self._forget(identifier)
            return Collected(None)
        return Collected(self._read(identifier, names))

    def _read(self, identifier: str, names: list[str]) -> Iterator[bytes]:
        """The pieces of a reply. Who does not read to the end may collect it again."""
        for name in names:
            piece = self._piece(name)
            if piece is None:
                # Too short now: the seal will show it.
                break
            yield piece
        self._forget(identifier)

    def _forget_expired(self) -> None:
        """Deletes what nobody waits for any more: the messages of sites that were too slow."""
        late = time.monotonic() - _READ_SECONDS
        with self._posted_lock:
            expired = [name for name, posted in self._posted.items() if posted.expires < late]
        for name in expired:
            self._forget(name)

    def _forget(self, identifier: str) -> None:
        """Deletes a message and whatever was answered to it."""
        answers = select(MessageRes.message_id).where(MessageRes.reply_to_message_id == identifier)
        with self._state.session() as session:
            replies = session.scalars(answers).all()
        self._state.delete_messages({identifier})
        for name in (identifier, *replies):
            self._state.object_store.delete(name)
            self._arrived.pop(name, None)
        with self._posted_lock:
            self._arriving.pop(identifier, None)
            self._posted.pop(identifier, None)

    def _is_away(self, node: int) -> bool:
        """Whether a node is not there but may come back. Flower gives such a node up at once."""
        return 0 < self._silence(node) < _RETURN_SECONDS

    def _is_gone(self, node: int) -> bool:
        """Whether a node is given up."""
        return self._silence(node) >= _RETURN_SECONDS

    def _silence(self, node: int) -> float:
        """For how many seconds a node has been away; 0: it is there."""
        (info,) = self._state.get_node_info(node_ids=[node])
        return time.time() - info.online_until if info.status == NodeStatus.OFFLINE else 0.0

    def _is_complete(self, reply: str) -> bool:
        """Whether nothing of a reply is still to be pushed. What has come is looked at once: it may
        be as large as an adapter."""
        arrived = self._arrived.setdefault(reply, set())
        for name in self._parts(reply):
            if name not in arrived:
                if self._state.get_object(self._run_id, name) == b"":
                    return False
                arrived.add(name)
        return True

    def _names(self, reply: str) -> list[str] | None:
        """The names of a complete reply's pieces, in their order; None if it is none of ours, or
        parts are gone."""
        contents, pieces = {}, {}
        for name, is_piece in self._parts(reply).items():
            if is_piece:
                pieces[name] = PieceElsewhere(name)
                continue
            content = self._state.get_object(self._run_id, name)
            if not content:
                return None
            contents[name] = content
        try:
            message = inflate_object_from_contents(reply, contents, objects=dict(pieces))
        except Exception:
            # Whatever Flower makes of bytes that are none of its own.
            return None
        return names_of_pieces(message) if isinstance(message, Message) else None

    def _piece(self, name: str) -> bytes | None:
        content = self._state.get_object(self._run_id, name)
        if not content:
            return None
        try:
            return piece_of(inflate_object_from_contents(name, {name: content}))
        except Exception:
            # As above.
            return None

    def _parts(self, reply: str) -> dict[str, bool]:
        """What a node announced as the parts of its reply, and whether each has no parts."""
        try:
            tree = self._state.object_store.get_object_tree(reply)
        except NoObjectInStoreError:
            return {}
        return {part.object_id: not part.children for part in iterate_object_tree(tree)}

    def _begin(self) -> tuple[int, int]:
        for run in self._state.get_run_info():
            self._state.stop_run(run.run_id)
            self._state.cleanup_run(run.run_id)
        run_id = self._state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        (run,) = self._state.get_run_info(run_ids=[run_id])
        task_id = run.primary_task_id
        self._state.claim_task(task_id)
        self._state.activate_task(task_id)
        TaskIdentity.task_id = task_id
        TaskIdentity.run_id = run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        return run_id, task_id

    def _keep_alive(self) -> None:
        """Flower ends a run whose app is silent for a minute."""
        while not self._stopped.wait(_KEEP_ALIVE_SECONDS):
            try:
                if not self._state.acknowledge_task_heartbeat(self._task_id):
                    # The machine slept. What was under way is lost; who waits is told so.
                    self._run_id, self._task_id = self._begin()
            except SQLAlchemyError as error:
                # A disk that is full or slow: whoever gave up here would end the run for good.
                _logger.warning("the SuperLink's database: %s", str(error).splitlines()[0])


def _fleet_of(flower: FastAPI) -> FastAPI:
    """Of Flower's application what relays speak to: without Control, Runtime and pages of
    documentation, and without what every request would pass through for Control's sake."""
    passed: tuple[Any, ...] = (
        BaseHTTPMiddleware,
        ProtobufTranslationMiddleware,
        NodeAuthMiddleware,
    )
    fleet = FastAPI(
        openapi_url=None, middleware=[one for one in flower.user_middleware if one.cls in passed]
    )
    fleet.state = flower.state
    fleet.include_router(router)
    return fleet


def _seldom(call: Callable[[], None]) -> Callable[[], None]:
    """Calls, unless it did so `_TIDY_SECONDS` ago or less."""
    called = -math.inf

    def sometimes() -> None:
        nonlocal called
        if time.monotonic() - called >= _TIDY_SECONDS:
            called = time.monotonic()
            call()

    return sometimes
