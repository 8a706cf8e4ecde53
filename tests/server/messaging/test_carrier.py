"""Between jobs and port: a reply takes no more memory than its step needs, and leaves nothing."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from server.conftest import Silent
from support.waiting import HANGING

from umbel_common.protocol.wire import OfferReply, UnmaskRequest, seal_reply, size_limit
from umbel_common.trust.identity import Identity, Member, Roster
from umbel_host.transport.sockets import SocketServer
from umbel_server.jobs.exchange import Exchange
from umbel_server.messaging import carrier
from umbel_server.messaging.carrier import CARRIER, CarrierLink, methods
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits

PIECE = 1 << 20
PLAN_LIMIT = 40 * PIECE
CHECKED = pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])


class Box:
    """A port whose sites answer with so many bytes, or not at all."""

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.limits: list[int] = []
        self.forgotten: list[str] = []

    def post(
        self, site: str, label: str, sealed: Iterator[bytes], seconds: float, largest_reply: int
    ) -> str | None:
        self.limits.append(largest_reply)
        assert b"".join(sealed)
        return f"to {site}"

    def collect(self, identifier: str) -> tuple[bool, Iterator[bytes] | None]:
        if self.size is None:
            return False, None
        return True, (bytes(PIECE) for _ in range(self.size // PIECE))

    def forget(self, identifier: str) -> None:
        self.forgotten.append(identifier)


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "carrier.sock"


def ask(socket: Path, box: Box, stage: str, patch: pytest.MonkeyPatch) -> tuple[list[int], Any]:
    """The sizes of the replies that came into memory, and what the operator's people read."""
    server = SocketServer(socket, 0o660)
    server.add(CARRIER, methods(box))
    server.start()
    operator, site = Identity.generate(os.urandom), Identity.generate(os.urandom)
    member = Member(name="east", public_key=site.public_key)
    roster = Roster(federation="f", operator=operator.public_key, members=(member,))
    sizes: list[int] = []
    observer = Silent()
    with closing(CarrierLink(socket)) as link:
        exchange = link.exchange

        def measured(step: Step, requests: Any, seconds: float) -> Any:
            for name, reply in exchange(step, requests, seconds):
                sizes.append(len(reply))
                yield name, reply

        patch.setattr(link, "exchange", measured)
        limits = Limits(stage_seconds=HANGING if box.size is not None else 0.3)
        asking = Exchange(
            link, operator, roster, observer=observer, limits=limits, largest_reply=PLAN_LIMIT
        )
        request = UnmaskRequest(context=bytes(32), signatures=())
        assert list(asking.ask(Step(stage, 1, 1), {"east": request})) == []
    server.stop(0)
    return sizes, observer.strays


@CHECKED
@pytest.mark.parametrize("stage", ["unmask", "mask"])
def test_of_a_reply_that_is_too_large_only_a_beginning_comes_into_memory(
    socket: Path, monkeypatch: pytest.MonkeyPatch, stage: str, checked: bool
) -> None:
    if not checked:
        monkeypatch.setattr(carrier, "joined", lambda parts, limit: b"".join(parts))
    box = Box(60 * PIECE)
    sizes, strays = ask(socket, box, stage, monkeypatch)
    limit = PLAN_LIMIT if stage == "mask" else size_limit(None)
    assert box.limits == [limit]
    assert sizes == [limit + 1 if checked else 60 * PIECE]
    assert strays == [("east", "oversized-message")]
    assert box.forgotten == ["to east"]


def test_what_was_not_answered_is_deleted_at_the_port(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(None)
    sizes, _ = ask(socket, box, "unmask", monkeypatch)
    assert sizes == []
    assert box.forgotten == ["to east"]


def test_a_step_says_how_large_a_reply_may_be_and_stays_the_same_step() -> None:
    assert Step("mask", 1, 1, PLAN_LIMIT) == Step("mask", 1, 1)
    assert Step("offer").largest_reply == size_limit(None)
    identity = Identity.generate(os.urandom)
    offer = seal_reply(identity, "east", OfferReply(plan=bytes(32)), bytes(32))
    assert len(offer) < Step("offer").largest_reply
