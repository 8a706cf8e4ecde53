"""The grid inside one process: bytes between server and nodes, and nothing else."""

import threading
import time
from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from umbel_client.flower import NOT_OURS, answer
from umbel_common.wire import FLOWER_FIELD, FLOWER_MESSAGE_TYPE, FLOWER_RECORD
from umbel_server.flower import GridLink, sealed_bytes
from umbel_server.job import Step
from umbel_simulations.inprocess import InProcessGrid, Node

STEP = Step("mask", 1, 1)


def echo(message: Message) -> Message:
    return answer(message, lambda sealed: sealed[::-1])


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
    replies = dict(over.exchange(STEP, {"site-2": b"abc", "site-3": b"xyz"}, 5.0))
    assert replies == {"site-2": b"cba", "site-3": b"zyx"}


def test_replies_come_as_they_come_and_a_late_one_misses_the_deadline(
    grids: list[InProcessGrid],
) -> None:
    release = threading.Event()

    def late(message: Message) -> Message:
        release.wait(10)
        return echo(message)

    over = link(grids, {2: late, 3: echo})
    began = time.monotonic()
    replies = dict(over.exchange(STEP, {"site-2": b"abc", "site-3": b"xyz"}, 0.5))
    assert replies == {"site-3": b"zyx"}
    assert 0.4 < time.monotonic() - began < 5
    release.set()


def test_a_lost_message_is_an_error_reply_and_not_a_wait(grids: list[InProcessGrid]) -> None:
    over = link(
        grids, {2: echo, 3: echo}, lost=lambda node, group: (node, group) == (2, "1.1.mask")
    )
    began = time.monotonic()
    replies = dict(over.exchange(STEP, {"site-2": b"abc", "site-3": b"xyz"}, 60.0))
    assert replies == {"site-3": b"zyx"}
    assert time.monotonic() - began < 10


def test_what_a_node_raises_reaches_the_server(grids: list[InProcessGrid]) -> None:
    def broken(message: Message) -> Message:
        raise ValueError("a bug at a site")

    over = link(grids, {2: broken})
    with pytest.raises(ValueError, match="a bug at a site"):
        list(over.exchange(STEP, {"site-2": b"abc"}, 5.0))


def test_a_node_sees_a_copy_and_not_the_servers_object(grids: list[InProcessGrid]) -> None:
    seen: list[Message] = []

    def keep(message: Message) -> Message:
        seen.append(message)
        return echo(message)

    grid = InProcessGrid({2: keep}, workers=1)
    grids.append(grid)
    content = RecordDict({FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: b"abc"})})
    sent = Message(content, dst_node_id=2, message_type=FLOWER_MESSAGE_TYPE)
    list(grid.push_messages([sent]))
    grid.close()
    assert seen[0] is not sent
    assert seen[0].content is not content
    assert sealed_bytes(seen[0]) == b"abc"


def test_flowers_own_round_trip_works_too_and_keeps_its_timeout(
    grids: list[InProcessGrid],
) -> None:
    release = threading.Event()

    def late(message: Message) -> Message:
        release.wait(10)
        return echo(message)

    grid = InProcessGrid({2: echo, 3: late}, workers=2)
    grids.append(grid)
    content = RecordDict({FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: b"abc"})})
    messages = [Message(content, node, FLOWER_MESSAGE_TYPE) for node in (2, 3)]
    replies = list(grid.send_and_receive(messages, timeout=0.3))
    release.set()
    assert [sealed_bytes(reply) for reply in replies] == [b"cba"]


@pytest.mark.parametrize(
    ("message_type", "content"),
    [
        ("train", {FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: b"abc"})}),
        (FLOWER_MESSAGE_TYPE, {}),
        (FLOWER_MESSAGE_TYPE, {"other": ConfigRecord({FLOWER_FIELD: b"abc"})}),
        (FLOWER_MESSAGE_TYPE, {FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: "text"})}),
        (FLOWER_MESSAGE_TYPE, {FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: b"abc", "lr": 0.1})}),
    ],
    ids=["another type", "empty", "another record", "no bytes", "settings beside the bytes"],
)
def test_a_message_that_is_not_ours_is_answered_by_an_error_and_touches_nothing(
    grids: list[InProcessGrid], message_type: str, content: dict[str, ConfigRecord]
) -> None:
    def never(sealed: bytes) -> bytes:
        raise AssertionError("the trainer was reached")

    grid = InProcessGrid({2: lambda message: answer(message, never)}, workers=1)
    grids.append(grid)
    message = Message(RecordDict(content), dst_node_id=2, message_type=message_type)
    (identifier,) = grid.push_messages([message])
    replies: list[Message] = []
    deadline = time.monotonic() + 10
    while not replies and time.monotonic() < deadline:
        replies = list(grid.pull_messages([identifier]))
        time.sleep(0.01)
    assert replies[0].error.code == NOT_OURS
