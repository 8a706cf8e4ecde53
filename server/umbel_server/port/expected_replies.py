"""Which replies may come, and how much of each: asked before Flower stores a byte of them.

Flower takes any number of objects of any size from a node, whether they belong to a message or not,
and deletes only what belongs to one. So the port stores nothing that is not announced as a part of
the one reply to a message that is waited for, and no more of it than that message allows.
"""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

from flwr.proto.message_pb2 import ObjectTree

from umbel_host.transport.pieces import FLOWER_PIECE_BYTES

_ENVELOPE_BYTES = 4096
"""Room for what Flower writes around a part of a reply, and for the part's name in its parent."""


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
    root: str | None = None
    """The reply's ID, once it is announced."""
    parents: frozenset[str] = frozenset()
    """The objects of the reply that have parts of their own."""
    pieces: frozenset[str] = frozenset()
    come: set[str] = field(default_factory=set)
    """The objects that were taken."""
    posted: bool = False
    """Whether the message can be fetched."""
    complete: bool = False
    """Whether Flower has had all objects that were taken, and they are the whole reply."""

    def has(self, name: str) -> bool:
        return name in self.parents or name in self.pieces

    def has_come(self) -> bool:
        return self.root is not None and self.come >= self.parents | self.pieces


class ExpectedReplies:
    """The messages that are waited for; the methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._expected: dict[str, _Expected] = {}
        self._inline: set[int] = set()
        self.on_posted: Callable[[int], None] = lambda node: None
        """Called with a node when a message can be fetched by it; from any thread."""

    def expect(self, identifier: str, node: int, largest_reply: int) -> None:
        """Lets a node answer a message.

        Args:
            largest_reply: bytes.
        """
        pieces = -(-largest_reply // FLOWER_PIECE_BYTES)
        left = largest_reply + (pieces + 2) * _ENVELOPE_BYTES
        with self._lock:
            self._expected[identifier] = _Expected(node, pieces, left)

    def forget(self, identifier: str) -> None:
        """Lets nothing more come in answer to a message."""
        with self._lock:
            self._expected.pop(identifier, None)
            self._lock.notify_all()

    def posted(self, identifier: str) -> None:
        """Lets a message be fetched."""
        with self._lock:
            expected = self._expected.get(identifier)
            if expected is None:
                return
            expected.posted = True
        self.on_posted(expected.node)

    def is_asked(self, node: int) -> bool:
        """Whether a node has a message that can be fetched, and whose reply has not come."""
        with self._lock:
            return any(
                expected.node == node and expected.posted and not expected.has_come()
                for expected in self._expected.values()
            )

    def note_inline(self, node: int, takes: bool) -> None:
        """Takes note of whether a node's relay takes messages whole."""
        with self._lock:
            (self._inline.add if takes else self._inline.discard)(node)

    def takes_inline(self, node: int) -> bool:
        """Whether a node's relay takes messages whole, as far as is known."""
        with self._lock:
            return node in self._inline

    def passed(self, node: int) -> None:
        """Takes note that Flower has had all objects of a node that were taken before."""
        with self._lock:
            for expected in self._expected.values():
                if expected.node == node and expected.has_come():
                    expected.complete = True
            self._lock.notify_all()

    def wait(self, identifiers: Collection[str], seconds: float) -> None:
        """Waits until one of these messages has a whole reply, or is not expected; at most so long.

        What Flower refused counts as had: whoever waits asks Flower then.
        """

        def has_one() -> bool:
            found = (self._expected.get(identifier) for identifier in identifiers)
            return any(expected is None or expected.complete for expected in found)

        with self._lock:
            self._lock.wait_for(has_one, seconds)

    def is_announced(self, identifier: str) -> bool:
        """Whether a reply to a message was announced."""
        with self._lock:
            expected = self._expected.get(identifier)
            return expected is not None and expected.root is not None

    def has_come(self, identifier: str) -> bool:
        """Whether all objects of an announced reply were taken."""
        with self._lock:
            expected = self._expected.get(identifier)
            return expected is not None and expected.has_come()

    def announce(
        self, node: int, identifier: str, reply: str, tree: ObjectTree, size: int = 0
    ) -> Verdict:
        """Judges the announcement of a reply; the tree of its parts must be one of ours: a message
        with one content, whose parts are pieces, or a message that comes whole and has no parts.

        Args:
            node: the authenticated sender.
            identifier: the message that is answered.
            size: bytes of the reply in its announcement; 0: its parts are to come.
        """
        inner = tree.children
        leaves = [leaf for content in inner for leaf in content.children]
        with self._lock:
            expected = self._expected.get(identifier)
            if expected is None:
                return Verdict.OVER
            if (
                expected.node != node
                or tree.object_id != reply
                or len(inner) > 1
                or len(leaves) > expected.most_pieces
                or any(leaf.children for leaf in leaves)
                or (size and (inner or size > expected.left))
            ):
                return Verdict.REFUSED
            if expected.root is None:
                expected.root = reply
                if size:
                    expected.left -= size
                    expected.come.add(reply)
                expected.parents = frozenset((reply, *(content.object_id for content in inner)))
                expected.pieces = frozenset(leaf.object_id for leaf in leaves)
            # A relay that was started again makes another announcement of the same answer. Flower
            # keeps the first one until its parts have not come for three minutes.
            return Verdict.TAKEN if expected.root == reply else Verdict.OVER

    def take(self, node: int, name: str, size: int) -> Verdict:
        """Judges an object that comes: it must be a part of a reply that its sender announced.

        Args:
            node: the authenticated sender.
            size: bytes.
        """
        with self._lock:
            for expected in self._expected.values():
                if expected.node != node or not expected.has(name):
                    continue
                # Sent again after a cut, an object is not counted again: its name is its digest.
                if name in expected.come:
                    return Verdict.TAKEN
                if size > expected.left:
                    return Verdict.REFUSED
                expected.left -= size
                expected.come.add(name)
                return Verdict.TAKEN
        return Verdict.OVER

    def in_the_way(self, names: Collection[str]) -> list[str]:
        """Returns the messages whose replies claim that one of these objects has other parts.

        Flower would not store the object under such a claim, and a site can guess some names: an
        adapter's pieces are the same in each attempt.
        """
        with self._lock:
            return [
                identifier
                for identifier, expected in self._expected.items()
                if not expected.parents.isdisjoint(names)
            ]
