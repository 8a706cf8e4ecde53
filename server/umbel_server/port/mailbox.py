"""Messages to nodes and their replies, in the SuperLink's database: post, collect, forget.

The content is sealed: nothing may be added here that looks into it. Whatever was posted is deleted
again, with all that came in answer to it, by `forget`.

A small message is a part of its announcement, which a node fetches, or sends, by one request. A
larger one is announced with the names of its parts, each of which is a request.
"""

import math
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError

from umbel_common.protocol.wire import size_limit
from umbel_host.transport.flower import (
    PieceElsewhere,
    mark,
    names_of_pieces,
    packed_file,
    packed_pieces,
    piece_of,
    regrouped,
    unpacked_pieces,
)
from umbel_host.transport.pieces import (
    FLOWER_INLINE_BYTES,
    FLOWER_MESSAGE_TYPE,
    FLOWER_PIECE_BYTES,
)
from umbel_server.port import flower_patches
from umbel_server.port.superlink import SuperLink

_READ_SECONDS = 300.0
"""How long a reply may still be read after its message has expired."""
_ASK_SECONDS = 0.5
"""Time between two questions to Flower about a reply that has not come through this process: each
is several statements of its database. Flower makes an error itself when a message has expired or
its node stays away, and takes no part of a reply that it has from another message."""


@dataclass(frozen=True)
class _Posted:
    node: int
    expires: float
    """Monotonic clock, seconds."""


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
        self._folder = str(Path(os.environ["FLWR_DATABASE"]).parent)
        self._posting = threading.Lock()
        self._posted_lock = threading.Lock()
        self._posted: dict[str, _Posted] = {}
        """Message that was not collected -> its receiver."""
        self._arriving: dict[str, str | list[bytes] | None] = {}
        """Message -> its reply: the whole, or the name of one whose pieces are being pushed. None:
        an error, which has none."""
        self._arrived: dict[str, set[str]] = {}
        """Reply -> the parts of it that have come."""
        self._asked: dict[str, float] = {}
        """Message -> when Flower was last asked for its reply; monotonic clock, seconds."""

    def make_way(self, key: bytes) -> None:
        """Ends the former connection of a relay (public key, PEM) that connects again.

        Whatever the former connection received and did not answer is delivered again. Flower would
        do neither.
        """
        node = self._superlink.disconnect(key)
        if node is None:
            return
        with self._posted_lock:
            unanswered = [name for name, posted in self._posted.items() if posted.node == node]
            for name in unanswered:
                if name in self._arriving:
                    # The rest of that reply was lost with the connection.
                    self._arriving[name] = None
        flower_patches.deliver_again(self._state, unanswered)

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
        self._forget_expired()
        if not self._superlink.was_connected(node):
            return None
        parts = regrouped(sealed)
        first = next(parts, b"")
        if len(first) <= FLOWER_INLINE_BYTES and self._superlink.expected.takes_inline(node):
            # A piece that is not full is the last one.
            return self._post_inline(node, label, first, seconds, largest_reply)
        return self._post_pieces(node, label, chain([first], parts), seconds, largest_reply)

    def _post_inline(
        self, node: int, label: str, sealed: bytes, seconds: float, largest_reply: int
    ) -> str | None:
        message = Message(
            packed_pieces([sealed]),
            dst_node_id=node,
            message_type=FLOWER_MESSAGE_TYPE,
            ttl=seconds,
            group_id=label,
        )
        # Nothing but its name: no part of it is ever fetched.
        identifier = secrets.token_hex(32)
        flower_patches.set_message_id(message, identifier)
        self._expect(identifier, node, seconds, largest_reply)
        try:
            stored = flower_patches.store(self._state, message, ObjectTree(object_id=identifier))
        except Exception:
            self.forget(identifier)
            raise
        return self._posted_or_not(identifier, stored)

    def _post_pieces(
        self, node: int, label: str, sealed: Iterator[bytes], seconds: float, largest_reply: int
    ) -> str | None:
        # Flower wants the digests of all pieces before it takes the first one. A message may be as
        # large as an adapter, so it waits in a file without a name, one message at a time.
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
            flower_patches.set_message_id(message, identifier)
            objects = get_all_nested_objects(message)
            run = self._superlink.run_id
            for squatter in self._superlink.expected.in_the_way(objects.keys()):
                self._refuse(squatter)
            session = self._state.start_session(run)
            self._expect(identifier, node, seconds, largest_reply)
            try:
                stored, missing = self._state.store_message_and_object_tree(
                    flower_patches.with_content(message, mark()), get_object_tree(message), session
                )
                for name in missing:
                    self._state.store_object(run, session, name, objects[name].deflate())
            except Exception:
                self.forget(identifier)
                raise
            return self._posted_or_not(identifier, stored)

    def _expect(self, identifier: str, node: int, seconds: float, largest_reply: int) -> None:
        with self._posted_lock:
            self._posted[identifier] = _Posted(node, time.monotonic() + seconds)
        self._superlink.expected.expect(identifier, node, largest_reply)

    def _posted_or_not(self, identifier: str, stored: bool) -> str | None:
        if not stored:
            self.forget(identifier)
            return None
        self._superlink.expected.posted(identifier)
        return identifier

    def wait(self, identifiers: Collection[str], seconds: float) -> None:
        """Waits until the whole reply to one of these messages may have come, or for so long."""
        self._superlink.expected.wait(identifiers, seconds)

    def collect(self, identifier: str) -> Collected | None:
        """Returns the reply to a message, once; None while it may still come."""
        with self._posted_lock:
            posted = self._posted.get(identifier)
        if posted is None:
            # Posted to a former run of this process.
            return Collected(None)
        if not self._is_to_ask(identifier):
            return None
        if identifier not in self._arriving:
            if self._superlink.is_away(posted.node):
                return None
            replies = self._state.get_message_res({identifier}, self._superlink.run_id)
            if not replies:
                return None
            # Flower tells of a reply once, when its node has announced it: parts may be missing.
            (reply,) = replies
            name = str(reply.metadata.message_id)
            if reply.has_error():
                # An error that Flower made itself is not in the table of replies.
                self._state.object_store.delete(name)
                unavailable = reply.error.code == ErrorCode.NODE_UNAVAILABLE
                if unavailable and not self._superlink.is_gone(posted.node):
                    # The node was cut off, or connected again, in this very moment.
                    return None
            whole = None if reply.has_error() else unpacked_pieces(reply)
            self._arriving[identifier] = None if reply.has_error() else whole or name
        arriving = self._arriving[identifier]
        if isinstance(arriving, list):
            return Collected(self._given(identifier, arriving))
        names = None
        if arriving is not None:
            if not self._is_complete(arriving):
                return None
            names = self._names(arriving)
        if names is None:
            self.forget(identifier)
            return Collected(None)
        return Collected(self._read(identifier, names))

    def forget(self, identifier: str) -> None:
        """Deletes a message and every reply to it, with all parts that came."""
        # The order lets no reply slip in between: from here on, none is taken.
        self._superlink.expected.forget(identifier)
        # One transaction, which is one turn to write.
        with self._state.session():
            flower_patches.withdraw(self._state, identifier)
            self._delete_replies(identifier)
            self._state.object_store.delete(identifier)
        with self._posted_lock:
            self._arriving.pop(identifier, None)
            self._asked.pop(identifier, None)
            self._posted.pop(identifier, None)

    def _is_to_ask(self, identifier: str) -> bool:
        """Whether Flower may have more of the reply to a message than before: this process has let
        it pass, or Flower was not asked for some time."""
        expected, now = self._superlink.expected, time.monotonic()
        if identifier not in self._arriving:
            has_more = expected.is_announced(identifier)
        else:
            has_more = self._arriving[identifier] is None or expected.has_come(identifier)
        if not has_more and now - self._asked.get(identifier, -math.inf) < _ASK_SECONDS:
            return False
        self._asked[identifier] = now
        return True

    def _refuse(self, identifier: str) -> None:
        """Deletes the reply to a message; the message's sender gets no reply."""
        self._superlink.expected.forget(identifier)
        flower_patches.withdraw(self._state, identifier)
        self._delete_replies(identifier)
        with self._posted_lock:
            if identifier in self._posted:
                self._arriving[identifier] = None

    def _delete_replies(self, identifier: str) -> None:
        replies = flower_patches.replies_to(self._state, identifier)
        self._state.delete_messages({identifier})
        for name in replies:
            self._state.object_store.delete(name)
            self._arrived.pop(name, None)
        flower_patches.end_sessions(self._state, [identifier, *replies])

    def _forget_expired(self) -> None:
        """Deletes the messages of sites that were too slow: nobody waits for them any more."""
        late = time.monotonic() - _READ_SECONDS
        with self._posted_lock:
            expired = [name for name, posted in self._posted.items() if posted.expires < late]
        for name in expired:
            self.forget(name)

    def _given(self, identifier: str, pieces: list[bytes]) -> Iterator[bytes]:
        """As `_read`, for a reply that came whole."""
        yield from pieces
        self.forget(identifier)

    def _read(self, identifier: str, names: list[str]) -> Iterator[bytes]:
        """Yields the pieces of a reply. A reply that is not read to its end is still there."""
        for name in names:
            piece = self._piece(name)
            if piece is None:
                # The reply is too short now: its seal will show it.
                break
            yield piece
        self.forget(identifier)

    def _is_complete(self, reply: str) -> bool:
        """Whether all parts of a reply have come. Each part is read only once: a reply may be as
        large as an adapter."""
        arrived = self._arrived.setdefault(reply, set())
        for name in self._parts(reply):
            if name not in arrived:
                if self._state.get_object(self._superlink.run_id, name) == b"":
                    return False
                arrived.add(name)
        return True

    def _names(self, reply: str) -> list[str] | None:
        """Returns the names of a complete reply's pieces, in their order; None if it is not an
        Umbel message, or if parts are gone."""
        contents, pieces = {}, {}
        for name, is_piece in self._parts(reply).items():
            if is_piece:
                pieces[name] = PieceElsewhere(name)
                continue
            content = self._state.get_object(self._superlink.run_id, name)
            if not content:
                return None
            contents[name] = content
        try:
            message = inflate_object_from_contents(reply, contents, objects=dict(pieces))
        except Exception:
            # Flower may raise anything on bytes that it did not make.
            return None
        return names_of_pieces(message) if isinstance(message, Message) else None

    def _piece(self, name: str) -> bytes | None:
        content = self._state.get_object(self._superlink.run_id, name)
        if not content:
            return None
        try:
            return piece_of(inflate_object_from_contents(name, {name: content}))
        except Exception:
            # As above.
            return None

    def _parts(self, reply: str) -> dict[str, bool]:
        """Returns the parts of a reply as its node announced them, and whether each is a piece: a
        part without parts of its own."""
        try:
            tree = self._state.object_store.get_object_tree(reply)
        except NoObjectInStoreError:
            return {}
        return {part.object_id: not part.children for part in iterate_object_tree(tree)}
