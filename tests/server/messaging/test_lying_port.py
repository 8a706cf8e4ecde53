"""The process with the port, in a stranger's hands: nothing it says ends the process with the key.

Each answer is given a second time to a link without the fix, which it ends.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain, repeat
from pathlib import Path

import grpc
import msgspec
import pytest

from umbel_host.transport.sockets import SocketServer
from umbel_server.messaging import carrier
from umbel_server.messaging.carrier import CARRIER, CarrierLink, Posted
from umbel_server.messaging.link import JobStopped, Step

POSTED = msgspec.json.encode(Posted("a-message"))
REPLIED = b'{"over": true, "replied": true}'
DEEP = b"[" * 100_000

ANSWERS: dict[str, tuple[bytes, list[bytes]]] = {
    "an empty answer": (b"", []),
    "no JSON": (b"\xff\xfe", []),
    "another shape": (b'{"identifier": 5}', []),
    "a tree without an end": (DEEP, []),
    "an empty stream": (POSTED, []),
    "a stream that is no JSON": (POSTED, [b"\xff"]),
    "a stream of another shape": (POSTED, [b'{"over": "yes"}']),
    "a stream with a deep tree": (POSTED, [DEEP]),
    "a reply that is too large": (POSTED, [REPLIED, b"much"]),
}


@pytest.fixture
def lying(tmp_path: Path) -> Iterator[Callable[..., CarrierLink]]:
    """Links to a process that gives these answers to `Post` and `Collect`."""
    servers: list[SocketServer] = []
    links: list[CarrierLink] = []

    def listen(
        posted: bytes, collected: Iterable[bytes], should_stop: Callable[[], bool] = lambda: False
    ) -> CarrierLink:
        def post(request: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
            return posted

        def collect(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
            yield from collected

        path = tmp_path / f"{len(servers)}.sock"
        server = SocketServer(path, 0o600, workers=2)
        server.add(
            CARRIER,
            {
                "Post": grpc.stream_unary_rpc_method_handler(post),
                "Collect": grpc.unary_stream_rpc_method_handler(collect),
            },
        )
        server.start()
        servers.append(server)
        links.append(CarrierLink(path, should_stop))
        return links[-1]

    yield listen
    for link in links:
        link.close()
    for server in servers:
        server.stop(0.0)


def too_large(*arguments: object, **options: object) -> bytes:
    raise ValueError("a message of more than 2147483648 bytes")


@pytest.mark.parametrize(("posted", "collected"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_that_is_none_is_a_lost_message(
    lying: Callable[..., CarrierLink],
    monkeypatch: pytest.MonkeyPatch,
    posted: bytes,
    collected: list[bytes],
) -> None:
    monkeypatch.setattr(carrier, "joined", too_large)
    link = lying(posted, collected)
    assert list(link.exchange(Step("offer"), [("east", b"sealed")], 0.15)) == []
    monkeypatch.setattr(CarrierLink, "_heard", lambda self, ask, lost: ask())
    with pytest.raises((ValueError, StopIteration, RuntimeError, RecursionError)):
        list(link.exchange(Step("offer"), [("east", b"sealed")], 5.0))


def test_a_large_message_that_is_lost_is_not_waited_for(
    lying: Callable[..., CarrierLink],
) -> None:
    large = bytes(carrier._KEPT_BYTES + 1)
    with closing(lying(POSTED, [b"{"])) as link:
        assert list(link.exchange(Step("train"), [("east", large)], 600.0)) == []


def test_a_job_stops_while_a_reply_without_an_end_is_read(
    lying: Callable[..., CarrierLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are empty, so that they never come to the limit of a reply."""
    endless = (part for part in chain([REPLIED], repeat(b"")))
    asked = iter([False] * 5)
    link = lying(POSTED, endless, lambda: next(asked, True))
    with pytest.raises(JobStopped):
        list(link.exchange(Step("offer"), [("east", b"sealed")], 600.0))
    assert next(asked, None) is None
    # Without the check, what is read ends with the time alone.
    monkeypatch.setattr(CarrierLink, "_until_stopped", lambda self, parts: parts)
    link = lying(POSTED, endless)
    assert list(link.exchange(Step("offer"), [("east", b"sealed")], 0.5)) == []
