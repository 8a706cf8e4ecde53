"""Messages to nodes and their replies, in the SuperLink's database: post, collect, forget.

The content is sealed: nothing may be added here that looks into it. Whatever was posted is deleted
again, with all that came in answer to it, by `forget`.

A small message is in its announcement, which a node fetches, or sends, by one request. A larger one
is announced with the names of its pieces, each of which is a request.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from sqlalchemy.exc import SQLAlchemyError

from umbel_common.protocol.wire import size_limit
from umbel_host.transport.flower import (
    packed,
    packed_names,
    packed_piece,
    regrouped,
    unpacked,
    unpacked_names,
    unpacked_piece,
)
from umbel_host.transport.pieces import FLOWER_INLINE_BYTES, FLOWER_MESSAGE_TYPE
from umbel_server.port import flower_patches
from umbel_server.port.superlink import SuperLink

_logger = logging.getLogger("umbel.port")

_READ_SECONDS = 300.0
"""How long a reply may still be read after its message has expired."""
_ASK_SECONDS = 0.5
"""Time between two questions to Flower about a reply that has not come through this process: each
is several statements of its database. Flower makes an error itself when a message has expired or
its node stays away."""
_TOGETHER_SECONDS = 0.3
"""How long what was read stays: the replies of a stage are read together, and one transaction
deletes them."""


@dataclass(frozen=True)
class _Posted:
    node: int
    expires: float
    """Monotonic clock, seconds."""


@dataclass(frozen=True)
class _Announced:
    """A reply as Flower told of it."""

    whole: bytes | None = None
    names: tuple[str, ...] = ()
    """The names of its pieces. A reply without the whole and without names is an error, or none of
    ours."""


@dataclass(frozen=True)
class Collected:
    """What became of a message."""

    pieces: Iterator[bytes] | None
    """The reply, read from the database one piece at a time and deleted when all are read. None:
    the node is gone, the message expired, or the reply is not an Umbel message."""


class NodeMailbox:
    """The mailbox of one SuperLink; its methods may be called from any thread."""

    def __init__(self, superlink: SuperLink) -> None:
        self._superlink = superlink
        self._state = superlink.state
        self._lock = threading.Lock()
        self._posted: dict[str, _Posted] = {}
        """Message that was not collected -> its receiver."""
        self._announced: dict[str, _Announced] = {}
        """Message -> the reply of which Flower has told: it tells once."""
        self._asked: dict[str, float] = {}
        """Message -> when Flower was last asked for its reply; monotonic clock, seconds."""
        self._read_out: list[str] = []
        """Messages whose replies were read, and which are still to be deleted."""
        self._is_deleting = False
        """Whether a thread is about to take them."""
        self._deleting = ThreadPoolExecutor(1, "deleting")
        # Who posted a message may be gone, and post no other.
        superlink.tidy = self._forget_expired

    def make_way(self, key: bytes) -> int | None:
        """Ends the former connection of a relay (public key, PEM) that connects again; returns its
        node, or None if it has none.

        Whatever the former connection received and did not answer is delivered again. Flower would
        do neither.
        """
        node = self._superlink.disconnect(key)
        if node is None:
            return None
        with self._lock:
            unanswered = [name for name, posted in self._posted.items() if posted.node == node]
        flower_patches.deliver_again(self._state, unanswered)
        return node

    def post(
        self,
        node: int,
        label: str,
        sealed: Iterator[bytes],
        seconds: float,
        largest_reply: int = size_limit(None),
    ) -> str | None:
        """Leaves a message for a node; returns its ID, or None if the node was never connected.

        Args:
            label: what Flower shows of it.
            sealed: its bytes, in parts of any size.
            seconds: how long its sender waits for the reply.
            largest_reply: bytes; a larger reply is not taken.
        """
        # Nobody can guess it, so nobody can be in the way of its pieces.
        identifier = secrets.token_hex(32)
        pieces = regrouped(sealed)
        first = next(pieces, b"")
        names: list[str] = []
        try:
            # A piece that is not full is the last one.
            if len(first) > FLOWER_INLINE_BYTES:
                if not self._superlink.was_connected(node):
                    return None
                for piece in chain([first], pieces):
                    names.append(self._stored(identifier, len(names), piece))
            content = packed_names(names) if names else packed(first)
            if self._announce(identifier, node, label, content, names, seconds, largest_reply):
                return identifier
        except Exception:
            self._discard(identifier, names)
            raise
        self._discard(identifier, names)
        return None

    def _stored(self, identifier: str, number: int, piece: bytes) -> str:
        """Stores a piece of a message, which is not announced yet; returns its name."""
        name, content = packed_piece(piece, identifier, number)
        store: Any = self._state.object_store
        store.preregister(self._superlink.run_id, ObjectTree(object_id=name))
        store.put(name, content)
        return name

    def _announce(
        self,
        identifier: str,
        node: int,
        label: str,
        content: RecordDict,
        names: list[str],
        seconds: float,
        largest_reply: int,
    ) -> bool:
        message = Message(
            content,
            dst_node_id=node,
            message_type=FLOWER_MESSAGE_TYPE,
            ttl=seconds,
            group_id=label,
        )
        flower_patches.set_message_id(message, identifier)
        tree = ObjectTree(
            object_id=identifier, children=[ObjectTree(object_id=name) for name in names]
        )
        now = time.monotonic()
        with self._lock:
            self._posted[identifier] = _Posted(node, now + seconds)
            self._asked[identifier] = now
        self._superlink.expected.expect(identifier, node, largest_reply)
        if not flower_patches.store(self._state, message, tree):
            return False
        self._superlink.expected.posted(identifier)
        return True

    def _discard(self, identifier: str, names: list[str]) -> None:
        """Deletes a message that was not stored, and the pieces of it that were."""
        self.forget(identifier)
        for name in names:
            self._state.object_store.delete(name)

    def wait(self, identifiers: Collection[str], seconds: float) -> None:
        """Waits until the whole reply to one of these messages has come, or for so long."""
        self._superlink.expected.wait(identifiers, seconds)

    def collect(self, identifier: str) -> Collected | None:
        """Returns the reply to a message, once; None while it may still come."""
        with self._lock:
            posted = self._posted.get(identifier)
        if posted is None:
            # Posted to a former run of this process.
            return Collected(None)
        if not self._is_to_ask(identifier):
            return None
        if identifier not in self._announced:
            # Flower would not wait for a node that is away. A whole reply needs none.
            has_come = self._superlink.expected.has_come(identifier)
            if not has_come and self._superlink.is_away(posted.node):
                return None
            try:
                replies = self._state.get_message_res({identifier}, self._superlink.run_id)
            except SQLAlchemyError:
                raise
            except Exception as error:
                # Flower takes replies that it cannot read: a time that is no number, for one.
                _logger.debug("a reply cannot be read: %s", type(error).__name__)
                self.forget(identifier)
                return Collected(None)
            if not replies:
                return None
            # Flower tells of a reply once, when its node has announced it: pieces may be missing.
            (reply,) = replies
            if reply.has_error() and reply.metadata.src_node_id == SUPERLINK_NODE_ID:
                # An error that Flower made itself is not in the table of replies.
                self._state.object_store.delete(str(reply.metadata.message_id))
                unavailable = reply.error.code == ErrorCode.NODE_UNAVAILABLE
                if unavailable and not self._superlink.is_gone(posted.node):
                    # The node was cut off, or connected again, in this very moment.
                    return None
            self._announced[identifier] = _Announced(
                unpacked(reply), tuple(unpacked_names(reply) or ())
            )
        announced = self._announced[identifier]
        if announced.whole is not None:
            return Collected(self._read(identifier, iter([announced.whole])))
        if announced.names:
            if not self._superlink.expected.has_come(identifier):
                return None
            return Collected(self._read(identifier, self._pieces(announced.names)))
        self.forget(identifier)
        return Collected(None)

    def forget(self, identifier: str) -> None:
        """Deletes a message and every reply to it, with all parts that came."""
        self._take_no_more(identifier)
        self._delete([identifier])

    def _forget_soon(self, identifier: str) -> None:
        """As `forget`, but nobody waits for the database. What is still there when this process
        ends, its next start deletes."""
        self._take_no_more(identifier)
        with self._lock:
            self._read_out.append(identifier)
            if not self._is_deleting:
                self._is_deleting = True
                self._deleting.submit(self._delete_read)

    def _take_no_more(self, identifier: str) -> None:
        self._superlink.expected.forget(identifier)
        with self._lock:
            self._announced.pop(identifier, None)
            self._asked.pop(identifier, None)
            self._posted.pop(identifier, None)

    def _delete_read(self) -> None:
        time.sleep(_TOGETHER_SECONDS)
        with self._lock:
            names, self._read_out = self._read_out, []
            self._is_deleting = False
        try:
            self._delete(names)
        except SQLAlchemyError as error:
            # The disk is full or slow. The next message that is read takes these with it.
            _logger.warning("the SuperLink's database: %s", str(error).splitlines()[0])
            with self._lock:
                self._read_out += names

    def _delete(self, identifiers: list[str]) -> None:
        """Deletes messages that are not expected any more, and the replies to them."""
        # One transaction: no reply slips in between.
        with self._state.session():
            replies = flower_patches.replies_to(self._state, identifiers)
            self._state.delete_messages(set(identifiers))
            for name in (*replies, *identifiers):
                self._state.object_store.delete(name)
            flower_patches.end_sessions(self._state, [*identifiers, *replies])

    def _is_to_ask(self, identifier: str) -> bool:
        """Whether Flower may have more of the reply to a message than before: this process has let
        it pass, or Flower was not asked for some time."""
        expected, now = self._superlink.expected, time.monotonic()
        if identifier not in self._announced:
            has_more = expected.is_announced(identifier)
        else:
            has_more = expected.has_come(identifier)
        if not has_more and now - self._asked.get(identifier, -math.inf) < _ASK_SECONDS:
            return False
        self._asked[identifier] = now
        return True

    def _forget_expired(self) -> None:
        """Deletes the messages of sites that were too slow: nobody waits for them any more."""
        late = time.monotonic() - _READ_SECONDS
        with self._lock:
            expired = [name for name, posted in self._posted.items() if posted.expires < late]
        for name in expired:
            self.forget(name)

    def _read(self, identifier: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yields the pieces of a reply. A reply that is not read to its end is still there."""
        yield from pieces
        self._forget_soon(identifier)

    def _pieces(self, names: tuple[str, ...]) -> Iterator[bytes]:
        for name in names:
            content = self._state.get_object(self._superlink.run_id, name)
            piece = unpacked_piece(content) if content else None
            if piece is None:
                # The reply is too short now: its seal will show it.
                return
            yield piece
