"""Which replies may come, and how much of each: asked before Flower stores a byte of them.

Flower takes any number of objects of any size from a node, whether they belong to a message or not,
and deletes only what belongs to one. So the port stores nothing that is not announced as a part of
the one reply to a message that is waited for, and no more of it than that message allows.
"""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

from umbel_host.transport.pieces import FLOWER_PIECE_BYTES

_ENVELOPE_BYTES = 4096
"""Room for what Flower writes around a part of a reply."""


class Verdict(Enum):
    """What is to be done with a request of a relay."""

    TAKEN = "taken"
    OVER = "nobody waits for this reply any more"
    REFUSED = "not the reply that was asked for"


@dataclass
class _Expected:
    node: int
    most_pieces: int
    left: int
    """Bytes that may still come."""
    posted: bool = False
    """Whether the message can be fetched."""
    delivered: int = 0
    """How often its node has fetched the message."""
    reply: str | None = None
    """The reply's ID, once it is announced."""
    pieces: frozenset[str] = frozenset()
    taken: set[str] = field(default_factory=set)
    """The pieces that were let through to Flower."""
    stored: set[str] = field(default_factory=set)
    """What Flower has stored: the reply's ID, and names of pieces."""

    def has_come(self) -> bool:
        return self.reply is not None and self.stored >= {self.reply, *self.pieces}


class ExpectedReplies:
    """The messages that are waited for; the methods may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._expected: dict[str, _Expected] = {}
        self.on_posted: Callable[[int], None] = lambda node: None
        """Called with a node when a message can be fetched by it; from any thread."""
        self.on_closed: Callable[[], None] = lambda: None
        """Called when nobody is to wait for messages any more; from any thread."""
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nobody is to wait for messages any more."""
        return self._closed

    def close(self) -> None:
        """Lets nobody wait for messages any more: this process ends."""
        self._closed = True
        self.on_closed()

    def expect(self, identifier: str, node: int, largest_reply: int) -> None:
        """Lets a node answer a message.

        Args:
            largest_reply: bytes.
        """
        pieces = -(-largest_reply // FLOWER_PIECE_BYTES)
        left = largest_reply + (pieces + 1) * _ENVELOPE_BYTES
        with self._changed:
            self._expected[identifier] = _Expected(node, pieces, left)

    def posted(self, identifier: str) -> None:
        """Lets a message be fetched."""
        with self._changed:
            expected = self._expected.get(identifier)
            if expected is None:
                return
            expected.posted = True
        self.on_posted(expected.node)

    def forget(self, identifier: str) -> None:
        """Lets nothing more come in answer to a message."""
        with self._changed:
            self._expected.pop(identifier, None)
            self._changed.notify_all()

    def is_asked(self, node: int) -> bool:
        """Whether a node has a message that can be fetched, and whose reply has not come."""
        with self._changed:
            return any(
                expected.node == node and expected.posted and not expected.has_come()
                for expected in self._expected.values()
            )

    def delivered(self, identifier: str) -> None:
        """Takes note that a node has fetched a message."""
        with self._changed:
            expected = self._expected.get(identifier)
            if expected is not None:
                expected.delivered += 1

    def lost(self, node: int) -> list[str]:
        """The messages that a node has fetched once, and does not seem to have: it asks for another
        while it has not answered them.

        One that it has fetched twice it has dropped.
        """
        with self._changed:
            return [
                identifier
                for identifier, expected in self._expected.items()
                if expected.node == node and expected.delivered == 1 and expected.reply is None
            ]

    def is_announced(self, identifier: str) -> bool:
        """Whether Flower has the announcement of a reply to a message."""
        with self._changed:
            expected = self._expected.get(identifier)
            return expected is not None and expected.reply in expected.stored

    def has_come(self, identifier: str) -> bool:
        """Whether Flower has the whole reply to a message."""
        with self._changed:
            expected = self._expected.get(identifier)
            return expected is not None and expected.has_come()

    def wait(self, identifiers: Collection[str], seconds: float) -> None:
        """Waits until one of these messages has its reply, or is not expected; at most so long."""

        def is_one_over() -> bool:
            found = (self._expected.get(identifier) for identifier in identifiers)
            return any(expected is None or expected.has_come() for expected in found)

        with self._changed:
            self._changed.wait_for(is_one_over, seconds)

    def announce(
        self, node: int, identifier: str, reply: str, pieces: Collection[str], size: int
    ) -> Verdict:
        """Judges the announcement of a reply.

        Args:
            node: the authenticated sender.
            identifier: the message that is answered.
            reply: its ID.
            pieces: the names of its pieces, which are to come.
            size: bytes of the reply in its announcement.
        """
        with self._changed:
            expected = self._expected.get(identifier)
            if expected is None:
                return Verdict.OVER
            if expected.reply is None:
                if (
                    expected.node != node
                    or len(pieces) > expected.most_pieces
                    or size > expected.left
                    or reply in pieces
                ):
                    return Verdict.REFUSED
                expected.reply = reply
                expected.pieces = frozenset(pieces)
                expected.left -= size
                return Verdict.TAKEN
            # A relay that was cut off, or started again, announces the same answer again.
            same = (expected.node, expected.reply, expected.pieces) == (
                node,
                reply,
                frozenset(pieces),
            )
            return Verdict.TAKEN if same else Verdict.OVER

    def take(self, node: int, name: str, size: int) -> Verdict:
        """Judges an object that comes: it must be a piece of a reply that its sender announced.

        Args:
            node: the authenticated sender.
            size: bytes.
        """
        with self._changed:
            for expected in self._expected.values():
                if expected.node != node or name not in expected.pieces:
                    continue
                # Sent again after a cut, an object is not counted again: its name is its digest.
                if name in expected.taken:
                    return Verdict.TAKEN
                if size > expected.left:
                    return Verdict.REFUSED
                expected.left -= size
                expected.taken.add(name)
                return Verdict.TAKEN
        return Verdict.OVER

    def stored(self, node: int, name: str) -> None:
        """Takes note that Flower has stored a reply's announcement, or a piece."""
        with self._changed:
            for expected in self._expected.values():
                if expected.node == node and (name == expected.reply or name in expected.pieces):
                    expected.stored.add(name)
            self._changed.notify_all()
