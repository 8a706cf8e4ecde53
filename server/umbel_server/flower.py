"""Flower on the server's side: sealed bytes as Flower messages over a `Grid`.

The only module here, with `superlink`, that imports flwr. One record with one field carries the
bytes; Flower's own metadata is never believed: who answered is settled by the seal.
"""

import time
from collections.abc import Iterator, Mapping

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from umbel_common.wire import FLOWER_FIELD, FLOWER_MESSAGE_TYPE, FLOWER_RECORD
from umbel_server.job import Step


class GridLink:
    """`job.Link` over Flower's Message API."""

    def __init__(self, grid: Grid, nodes: Mapping[str, int], poll_seconds: float = 0.2) -> None:
        """`nodes`: Flower node ID of each site."""
        self._grid = grid
        self._nodes = dict(nodes)
        self._poll_seconds = poll_seconds

    def exchange(
        self, step: Step, requests: Mapping[str, bytes], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """Pushes one message a site and polls for replies: `Grid.send_and_receive` would wait for
        all of them, and polls every three seconds."""
        deadline = time.monotonic() + seconds
        sites = list(requests)
        messages = [
            Message(
                RecordDict({FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: requests[site]})}),
                dst_node_id=self._nodes[site],
                message_type=FLOWER_MESSAGE_TYPE,
                ttl=seconds,
                group_id=str(step),
            )
            for site in sites
        ]
        # Replies are told apart by the message that they answer: an error reply's own source is
        # the SuperLink. An empty ID means that a node did not take its message.
        identifiers = list(self._grid.push_messages(messages))
        pending = dict(zip(identifiers, sites, strict=True))
        pending.pop("", None)
        while pending and time.monotonic() < deadline:
            replies = list(self._grid.pull_messages(list(pending)))
            for reply in replies:
                site = pending.pop(reply.metadata.reply_to_message_id)
                sealed = sealed_bytes(reply)
                if sealed is not None:
                    yield site, sealed
            if pending and not replies:
                time.sleep(self._poll_seconds)


def sealed_bytes(message: Message) -> bytes | None:
    """The sealed bytes in a Flower message; None for an error or anything else."""
    if not message.has_content():
        return None
    record = message.content.get(FLOWER_RECORD)
    if not isinstance(record, ConfigRecord):
        return None
    sealed = record.get(FLOWER_FIELD)
    return sealed if isinstance(sealed, bytes) else None
