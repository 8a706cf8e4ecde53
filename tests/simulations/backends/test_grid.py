"""In the grid inside one process only bytes pass between server and nodes."""

import threading
import time
from collections.abc import Iterable, Iterator

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from support.waiting import HANGING

from umbel_client.relay.messages import NOT_OURS, answer_message
from umbel_host.transport.flower import packed, unpacked
from umbel_host.transport.pieces import FLOWER_FIELD, FLOWER_MESSAGE_TYPE, FLOWER_RECORD
from umbel_server.messaging.link import Step
from umbel_simulations.backends.grid import InProcessGrid, Node
from umbel_simulations.backends.grid_link import GridLink

STEP = Step("mask", 1, 1)
BOTH = [("site-2", b"abc"), ("site-3", b"xyz")]


def echo(message: Message) -> Message:
    return answer_message(message, lambda sealed: sealed[::-1])


@pytest.fixture
def grids() -> Iterator[list[InProcessGrid]]:
    made: list[InProcessGrid] = []
    yield made
    for grid in made:
        grid.close()


def link(grids: list[InProcessGrid], nodes: dict[int, Node], **options: object) -> GridLink:
    grid = InProcessGrid(nodes, workers=2, **options)  # type: ignore[arg-type]  # by name
    grids.append(grid)
    return GridLink(grid, {f"site-{node}": node for node in nodes}, poll_seconds=0.01)


def test_each_site_gets_its_own_bytes_and_its_reply_comes_back(grids: list[InProcessGrid]) -> None:
    over = link(grids, {2: echo, 3: echo})
    replies = dict(over.exchange(STEP, BOTH, HANGING))
    assert replies == {"site-2": b"cba", "site-3": b"zyx"}


def test_replies_come_as_they_come_and_a_late_one_misses_the_deadline(
    grids: list[InProcessGrid],
) -> None:
    release = threading.Event()

    def late(message: Message) -> Message:
        release.wait(HANGING)
        return echo(message)

    over = link(grids, {2: late, 3: echo})
    began = time.monotonic()
    replies = dict(over.exchange(STEP, BOTH, 2.0))
    # Site 2 still waits, so that the deadline is what ended this.
    release.set()
    assert replies == {"site-3": b"zyx"}
    assert time.monotonic() - began > 1.9


def test_a_lost_message_is_an_error_reply_and_not_a_wait(grids: list[InProcessGrid]) -> None:
    over = link(
        grids, {2: echo, 3: echo}, should_lose=lambda node, group: (node, group) == (2, "1.1.mask")
    )
    began = time.monotonic()
    replies = dict(over.exchange(STEP, BOTH, HANGING))
    assert replies == {"site-3": b"zyx"}
    assert time.monotonic() - began < HANGING


def test_what_a_node_raises_reaches_the_server(grids: list[InProcessGrid]) -> None:
    def broken(message: Message) -> Message:
        raise ValueError("a bug at a site")

    over = link(grids, {2: broken})
    with pytest.raises(ValueError, match="a bug at a site"):
        list(over.exchange(STEP, BOTH[:1], HANGING))


class CountingGrid(InProcessGrid):
    """Records the number of messages in each call."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        super().__init__(nodes, workers=2)
        self.pushed: list[int] = []
        self.pulled: list[int] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.pushed.append(len(messages))
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        message_ids = list(message_ids)
        self.pulled.append(len(message_ids))
        return super().pull_messages(message_ids)


def test_messages_are_pushed_and_pulled_one_at_a_time_as_they_are_made(
    grids: list[InProcessGrid],
) -> None:
    grid = CountingGrid({2: echo, 3: echo})
    grids.append(grid)
    pushed_before: list[int] = []

    def requests() -> Iterator[tuple[str, bytes]]:
        for request in BOTH:
            pushed_before.append(len(grid.pushed))
            yield request

    over = GridLink(grid, {"site-2": 2, "site-3": 3}, poll_seconds=0.01)
    assert len(list(over.exchange(STEP, requests(), HANGING))) == 2
    assert pushed_before == [0, 1]
    assert grid.pushed == [1, 1]
    assert set(grid.pulled) == {1}


class FullGrid(InProcessGrid):
    """Accepts no message for node 2, and says so in one of Flower's ways."""

    def __init__(self, nodes: dict[int, Node], answer_message: list[str]) -> None:
        super().__init__(nodes, workers=2)
        self._answer = answer_message

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        return (
            self._answer if message.metadata.dst_node_id == 2 else super().push_messages([message])
        )


@pytest.mark.parametrize("answer_message", [[], [""]], ids=["message too large", "node unknown"])
def test_a_message_that_flower_does_not_take_is_not_waited_for(
    grids: list[InProcessGrid], answer_message: list[str]
) -> None:
    grid = FullGrid({2: echo, 3: echo}, answer_message)
    grids.append(grid)
    over = GridLink(grid, {"site-2": 2, "site-3": 3}, poll_seconds=0.01)
    began = time.monotonic()
    assert list(over.exchange(STEP, BOTH, HANGING)) == [("site-3", b"zyx")]
    assert time.monotonic() - began < HANGING


def test_a_node_sees_a_copy_and_not_the_servers_object(grids: list[InProcessGrid]) -> None:
    seen: list[Message] = []

    def keep(message: Message) -> Message:
        seen.append(message)
        return echo(message)

    grid = InProcessGrid({2: keep}, workers=1)
    grids.append(grid)
    content = packed(b"abc")
    sent = Message(content, dst_node_id=2, message_type=FLOWER_MESSAGE_TYPE)
    list(grid.push_messages([sent]))
    grid.close()
    assert seen[0] is not sent
    assert seen[0].content is not content
    assert unpacked(seen[0]) == b"abc"


def test_flowers_own_round_trip_works_too_and_keeps_its_timeout(
    grids: list[InProcessGrid],
) -> None:
    release = threading.Event()

    def late(message: Message) -> Message:
        release.wait(HANGING)
        return echo(message)

    grid = InProcessGrid({2: echo, 3: late}, workers=2)
    grids.append(grid)
    content = packed(b"abc")
    messages = [Message(content, node, FLOWER_MESSAGE_TYPE) for node in (2, 3)]
    replies = list(grid.send_and_receive(messages, timeout=2.0))
    release.set()
    assert [unpacked(reply) for reply in replies] == [b"cba"]


@pytest.mark.parametrize(
    ("message_type", "content"),
    [
        ("train", {FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: b"abc"})}),
        (FLOWER_MESSAGE_TYPE, {}),
        (FLOWER_MESSAGE_TYPE, {"other": ConfigRecord({FLOWER_FIELD: b"abc"})}),
        (FLOWER_MESSAGE_TYPE, {FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: "text"})}),
        (
            FLOWER_MESSAGE_TYPE,
            {FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: b"abc", "lr": 0.1})},
        ),
    ],
    ids=["another type", "empty", "another record", "no bytes", "settings beside the bytes"],
)
def test_a_message_that_is_not_ours_is_answered_by_an_error_and_touches_nothing(
    grids: list[InProcessGrid], message_type: str, content: dict[str, ConfigRecord]
) -> None:
    def never(sealed: bytes) -> bytes:
        raise AssertionError("the trainer was reached")

    grid = InProcessGrid({2: lambda message: answer_message(message, never)}, workers=1)
    grids.append(grid)
    message = Message(RecordDict(content), dst_node_id=2, message_type=message_type)
    (identifier,) = grid.push_messages([message])
    replies: list[Message] = []
    deadline = time.monotonic() + HANGING
    while not replies and time.monotonic() < deadline:
        replies = list(grid.pull_messages([identifier]))
        time.sleep(0.01)
    assert replies[0].error.code == NOT_OURS
