"""A Flower `Grid` inside one process.

Every message is serialised to the bytes of Flower's protobuf and back, in both directions, so
nothing but bytes passes between server and sites.
"""

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE = 1
POLL_SECONDS = 0.01
NODE_UNAVAILABLE = 3
"""Flower's code for a node that no longer answers."""

Node = Callable[[Message], Message]
ShouldLose = Callable[[int, str], bool]
"""Whether a message (the node's ID, the group ID) is lost; this simulates dropouts."""


class InProcessGrid(Grid):
    """Nodes are functions that run in worker threads.

    A lost message is answered by an error, as a SuperLink does for a node that is gone. What a node
    raises is raised again from the next pull: in a simulation it is a bug or an interruption.
    """

    def __init__(
        self,
        nodes: Mapping[int, Node],
        *,
        workers: int,
        should_lose: ShouldLose = lambda node, group: False,
    ) -> None:
        """Args:
        nodes: the function that answers for each node ID.
        workers: number of nodes that work at the same time.
        should_lose: tells which messages are lost.
        """
        # A Flower message reads the identity of its process when it is made.
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = RUN_ID
        TaskIdentity.node_id = SERVER_NODE
        self._nodes = dict(nodes)
        self._should_lose = should_lose
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="site")
        self._replies: dict[str, bytes] = {}
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Waits for the nodes that are at work. What has not begun never begins."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Does nothing: one process has one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `Grid`."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Serialises each message and queues it for its node."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that arrived since the last pull."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            wires = [self._replies.pop(key) for key in message_ids if key in self._replies]
        return [_from_wire(wire) for wire in wires]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pushes, then pulls until all replies have arrived or `timeout` seconds have passed."""
        pending = set(self.push_messages(messages))
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending and time.monotonic() < deadline:
            arrived = list(self.pull_messages(pending))
            pending -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
            if not arrived:
                time.sleep(POLL_SECONDS)
        return replies

    def _push(self, message: Message) -> str:
        message_id = uuid.uuid4().hex
        proto = message_to_proto(message)
        proto.metadata.message_id = message_id
        lost = self._should_lose(message.metadata.dst_node_id, message.metadata.group_id)
        self._pool.submit(self._handle, proto.SerializeToString(), lost)
        return message_id

    def _handle(self, wire: bytes, lost: bool) -> None:
        try:
            request = _from_wire(wire)
            reply = (
                Message(Error(NODE_UNAVAILABLE), reply_to=request)
                if lost
                else self._nodes[request.metadata.dst_node_id](request)
            )
            answer = message_to_proto(reply).SerializeToString()
            with self._lock:
                self._replies[request.metadata.message_id] = answer
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error


def _from_wire(wire: bytes) -> Message:
    proto = ProtoMessage()
    proto.ParseFromString(wire)
    return message_from_proto(proto)
