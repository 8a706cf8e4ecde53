"""The trainer's sockets, real ones: what travels, who may connect, what a probe is told."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.waiting import HANGING

import umbel_client.site.ipc
from umbel_client.site.ipc import (
    CONTROL,
    TRAINER,
    ControlStub,
    SiteEvent,
    TrainerStatus,
    TrainerStub,
    handle_method,
    largest_method,
    status_method,
    watch_method,
)
from umbel_common.errors import StorageError, UnreachableError
from umbel_common.protocol.wire import size_limit
from umbel_host.transport.sockets import SocketServer, is_healthy

STATUS = TrainerStatus(
    site="north",
    federation="clinics",
    isolated=True,
    paused=False,
    waiting=("job",),
    epsilon=1.5,
    last=SiteEvent(1.0, "step", "round 1: step 1 of 5"),
)


LARGEST = 20_000_000


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "run" / "trainer.sock"


@pytest.fixture
def server(socket: Path) -> Iterator[SocketServer]:
    """Answers each message with the message backwards."""
    opened = SocketServer(socket, 0o660)
    opened.add(
        TRAINER,
        {
            "Handle": handle_method(lambda sealed: sealed[::-1], lambda: LARGEST),
            "Largest": largest_method(lambda: LARGEST),
        },
    )
    opened.start()
    opened.report_health(True)
    yield opened
    opened.stop(0)


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 20_000_000])
def test_a_message_of_any_size_comes_back_whole(
    server: SocketServer, socket: Path, size: int
) -> None:
    message = os.urandom(min(size, 1000)) * (size // 1000 + 1)
    stub = TrainerStub(socket)
    assert stub.handle(message[:size]) == message[:size][::-1]
    stub.close()


CHECKED = pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])


@CHECKED
def test_a_message_without_an_end_does_not_fill_the_memory(
    socket: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Of what is larger than the trainer can need, only a beginning is taken: it refuses that."""
    if not checked:
        monkeypatch.setattr(umbel_client.site.ipc, "joined", lambda parts, limit: b"".join(parts))
    taken: list[int] = []

    def handle(sealed: bytes) -> bytes:
        taken.append(len(sealed))
        return b"refused"

    server = SocketServer(socket, 0o660)
    server.add(TRAINER, {"Handle": handle_method(handle)})
    server.start()
    stub = TrainerStub(socket)
    # Before the trainer knows any plan, an offer is the largest request.
    sent = iter(range(64))
    answer = b"".join(stub.stream(bytes(1 << 20) for _ in sent))
    stub.close()
    server.stop(0)
    assert answer == b"refused"
    assert taken == ([size_limit(None) + 1] if checked else [64 << 20])


@CHECKED
def test_messages_are_taken_one_at_a_time(
    socket: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """A relay that sends eight at once cannot make the trainer hold eight."""
    if not checked:
        monkeypatch.setattr(umbel_client.site.ipc, "threading", SimpleNamespace(Lock=nullcontext))
    held, most, release = set[int](), list[int](), threading.Event()

    def handle(sealed: bytes) -> bytes:
        held.add(threading.get_ident())
        most.append(len(held))
        release.wait(0.5 if checked else HANGING)
        held.discard(threading.get_ident())
        return sealed

    server = SocketServer(socket, 0o660)
    server.add(TRAINER, {"Handle": handle_method(handle)})
    server.start()
    stub = TrainerStub(socket)
    asking = [threading.Thread(target=stub.handle, args=(b"x",)) for _ in range(3)]
    for thread in asking:
        thread.start()
    deadline = time.monotonic() + HANGING
    while max(most, default=0) < (1 if checked else 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    release.set()
    for thread in asking:
        thread.join(HANGING)
    stub.close()
    server.stop(0)
    assert max(most) == (1 if checked else 3)


def test_a_relay_is_told_how_large_a_request_may_be(server: SocketServer, socket: Path) -> None:
    stub = TrainerStub(socket)
    assert stub.largest() == LARGEST
    stub.close()


def test_nobody_else_on_the_machine_can_connect(server: SocketServer, socket: Path) -> None:
    assert socket.stat().st_mode & 0o777 == 0o660
    assert socket.parent.stat().st_mode & 0o007 == 0


def test_a_probe_is_told_how_the_process_is(server: SocketServer, socket: Path) -> None:
    assert is_healthy(socket, HANGING)
    server.report_health(False)
    assert not is_healthy(socket, HANGING)


def test_a_process_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"nobody\.sock"):
        is_healthy(tmp_path / "nobody.sock", 0.5)
    control = ControlStub(tmp_path / "nobody.sock")
    with pytest.raises(UnreachableError, match="check that it is running"):
        control.status(0.5)
    control.close()


def test_a_relay_waits_for_a_trainer_that_starts_later(socket: Path) -> None:
    stub = TrainerStub(socket)
    answers: list[bytes] = []
    waiting = threading.Thread(target=lambda: answers.append(stub.handle(b"ab")))
    waiting.start()
    time.sleep(0.3)
    assert not answers
    late = SocketServer(socket, 0o660)
    late.add(TRAINER, {"Handle": handle_method(lambda sealed: sealed[::-1])})
    late.start()
    waiting.join(HANGING)
    late.stop(0)
    stub.close()
    assert answers == [b"ba"]


def test_a_trainer_that_ends_in_the_middle_is_an_error_and_no_empty_answer(socket: Path) -> None:
    started, release = threading.Event(), threading.Event()

    def slow(sealed: bytes) -> bytes:
        started.set()
        release.wait(HANGING)
        return sealed

    server = SocketServer(socket, 0o660)
    server.add(TRAINER, {"Handle": handle_method(slow)})
    server.start()
    stub = TrainerStub(socket)
    failures: list[UnreachableError] = []

    def ask() -> None:
        try:
            stub.handle(b"ab")
        except UnreachableError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert started.wait(HANGING)
    server.stop(0)
    asking.join(HANGING)
    release.set()
    stub.close()
    assert len(failures) == 1


def test_the_socket_of_a_killed_process_is_taken_over(
    server: SocketServer, socket: Path, tmp_path: Path
) -> None:
    later = SocketServer(socket, 0o600)
    later.add(TRAINER, {"Handle": handle_method(lambda sealed: b"later")})
    later.start()
    stub = TrainerStub(socket)
    assert stub.handle(b"x") == b"later"
    stub.close()
    later.stop(0)


def test_a_file_in_the_way_is_not_deleted(socket: Path) -> None:
    socket.parent.mkdir()
    socket.write_text("precious")
    with pytest.raises(StorageError, match="taken by another file"):
        SocketServer(socket, 0o600).start()
    assert socket.read_text() == "precious"


def test_a_path_that_no_socket_can_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too long"):
        SocketServer(tmp_path / ("x" * 120), 0o600).start()


def test_the_sites_people_see_status_and_events(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    over = threading.Event()

    def events(listening: object) -> Iterator[SiteEvent]:
        yield SiteEvent(1.0, "charged", "one")
        yield SiteEvent(2.0, "refused", "two")
        over.wait(HANGING)

    server = SocketServer(path, 0o600)
    server.add(CONTROL, {"Status": status_method(lambda: STATUS), "Watch": watch_method(events)})
    server.start()
    stub = ControlStub(path)
    assert stub.status() == STATUS
    watched = stub.watch()
    assert [next(watched).text, next(watched).text] == ["one", "two"]
    over.set()
    stub.close()
    server.stop(0)
