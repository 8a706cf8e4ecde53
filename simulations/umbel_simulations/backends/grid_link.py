"""A server's link over a Flower `Grid` in the same process: sealed bytes as Flower messages."""

import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from umbel_host.transport.flower import packed, unpacked
from umbel_host.transport.pieces import FLOWER_MESSAGE_TYPE
from umbel_server.messaging.link import Step


class GridLink:
    """`umbel_server.messaging.link.Link` over Flower's Message API."""

    def __init__(self, grid: Grid, nodes: Mapping[str, int], poll_seconds: float = 0.2) -> None:
        """Args:
        nodes: Flower node ID of each site.
        poll_seconds: pause between two polls in which nothing arrived.
        """
        self._grid = grid
        self._nodes = dict(nodes)
        self._poll_seconds = poll_seconds

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """Pushes one message for each site and polls for the replies.

        `Grid.send_and_receive` would wait for all replies, and polls only every three seconds.
        Messages are pushed, and replies pulled, one at a time, because a Grid keeps a second copy
        of everything in one call.
        """
        deadline = time.monotonic() + seconds
        # The message that a reply answers tells whose reply it is: the source of an error reply is
        # the SuperLink.
        pending: dict[str, str] = {}
        for site, sealed in requests:
            identifier = self._push(step, site, sealed, seconds)
            if identifier:
                pending[identifier] = site
            del sealed
        while pending and time.monotonic() < deadline:
            waiting = len(pending)
            for identifier, site in list(pending.items()):
                arrived, reply = self._pull(identifier)
                if arrived:
                    del pending[identifier]
                if reply is not None:
                    yield site, reply
                del reply
            if len(pending) == waiting:
                time.sleep(self._poll_seconds)

    def _push(self, step: Step, site: str, sealed: bytes, seconds: float) -> str | None:
        """The ID of the message; None if a node or the SuperLink does not accept it."""
        message = Message(
            packed(sealed),
            dst_node_id=self._nodes[site],
            message_type=FLOWER_MESSAGE_TYPE,
            ttl=seconds,
            group_id=str(step),
        )
        # A list, since a Grid iterates over it twice. The result is empty if the message is too
        # large.
        return next(iter(self._grid.push_messages([message])), None)

    def _pull(self, identifier: str) -> tuple[bool, bytes | None]:
        """Whether the message was answered, and the sealed bytes of the answer."""
        for message in self._grid.pull_messages([identifier]):
            if message.metadata.reply_to_message_id == identifier:
                return True, unpacked(message)
        return False, None
