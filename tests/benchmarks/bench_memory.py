"""What memory the coordinator needs: `python tests/benchmarks/bench_memory.py` prints JSON.

The peak of everything that Python and numpy allocate (tracemalloc) while a real `Job` runs a whole
round over `GridLink`: adapter, sealed messages, Flower's messages, running sum, journal, registry.
Sites, and the messages that wait between them and the server, live in another process, as with a
SuperLink: its memory is not the coordinator's and is not counted. Nor is what C libraries allocate
by themselves (OpenSSL, SQLite, and the protobuf buffers of the one message that a Grid sends).
"""

import json
import multiprocessing
import tempfile
import tracemalloc
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench_masking import entry
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.supercore.task_identity import TaskIdentity
from toy_federation import Federation, Quiet

from umbel_host.transport.flower import packed, unpacked
from umbel_server.jobs.job import Job
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry
from umbel_simulations.backends.grid_link import GridLink

FEW, MANY = 3, 30
RING_BITS = 32


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    few, many = peak(FEW), peak(MANY)
    return {
        "coordinator_memory_growth_3_to_30_sites": entry(many / few, "ratio of peaks", 1.2),
        "coordinator_memory_1m_3_sites": entry(few / 1e6, "MB", None),
        "coordinator_memory_1m_30_sites": entry(many / 1e6, "MB", None),
    }


def peak(sites: int) -> int:
    """Most bytes that were allocated at once."""
    federation = Federation(sites, RING_BITS)
    ours, theirs = multiprocessing.Pipe()
    # A fresh interpreter: a forked one would do without this process' threads.
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, sites))
    process.start()
    theirs.close()
    nodes = {name: node for node, name in enumerate(federation.identities)}
    with tempfile.TemporaryDirectory() as folder:
        tracemalloc.start()
        try:
            run(federation, GridLink(PipeGrid(ours), nodes), Path(folder))
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            ours.close()
            process.join()
    return most


def run(federation: Federation, link: GridLink, folder: Path) -> None:
    """One job of one round."""
    store = Journal(folder / "journal.sqlite")
    job = Job(
        federation.plan,
        federation.roster,
        federation.operator,
        journal=store,
        registry=Registry(folder / "registry"),
        link=link,
        observer=Quiet(),
        limits=Limits(attempts=1),
    )
    job.run()
    store.close()


class PipeGrid:
    """What `GridLink` needs of a Grid, with everything that is under way in the other process."""

    def __init__(self, connection: Connection) -> None:
        # A Flower message reads the identity of its process when it is made.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._connection = connection
        self._pushed = 0
        self._messages: dict[str, Metadata] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """See `Grid`."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        self._pushed += 1
        identifier = str(self._pushed)
        sealed = unpacked(message)
        assert sealed is not None  # GridLink made it
        message.metadata.__dict__["_message_id"] = identifier
        self._messages[identifier] = message.metadata
        self._connection.send(("push", identifier, message.metadata.dst_node_id))
        self._connection.send_bytes(sealed)
        return identifier

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """See `Grid`."""
        return [self._pull(identifier) for identifier in message_ids]

    def _pull(self, identifier: str) -> Message:
        self._connection.send(("pull", identifier, 0))
        content = packed(self._connection.recv_bytes())
        request = make_message(self._messages.pop(identifier), content=RecordDict())
        return Message(content, reply_to=request)


def serve(connection: Connection, sites: int) -> None:
    """The other process: answers for every site, and keeps each reply until it is pulled."""
    handlers = [site.handle for site in Federation(sites, RING_BITS).sites().values()]
    replies: dict[str, bytes] = {}
    while True:
        try:
            action, identifier, node = connection.recv()
        except EOFError:
            return
        if action == "push":
            replies[identifier] = handlers[node](connection.recv_bytes())
        else:
            connection.send_bytes(replies.pop(identifier))


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
