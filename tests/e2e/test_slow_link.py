"""A hospital's slow line: large messages get through it, and a cut costs little."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.daemons import Clinics
from e2e.slow_link import SlowLink
from e2e.transport import EchoRelay, Transport
from support.waiting import HANGING

from umbel_host.transport.pieces import FLOWER_PIECE_BYTES

MEGABYTE = 1_000_000
SLACK = 1.03
"""What TLS, HTTP and Flower put around a message."""


@pytest.fixture(scope="module")
def transport(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Transport]:
    made = Transport(Clinics(tmp_path_factory.mktemp("slow"), tiny_model))
    made.start()
    yield made
    made.close()


@pytest.fixture
def line(transport: Transport) -> Iterator[SlowLink]:
    """North's relay connects through it."""
    former = transport.relays["north"]
    former.kill()
    made = SlowLink(transport.clinics.port, 15 * MEGABYTE)
    relay = EchoRelay(transport.clinics.sites["north"].folder / "relay", made.port)
    transport.relays["north"] = relay
    relay.start()
    # It is there.
    assert transport.exchange({"north": b"north"}, HANGING) == {"north": b"htron"}
    made.up = made.down = 0
    yield made
    relay.kill()
    made.close()
    transport.relays["north"] = former
    former.start()


@pytest.mark.soak
def test_a_large_adapter_goes_down_and_up_a_slow_line(transport: Transport, line: SlowLink) -> None:
    """100 MB each way at 15 MB/s: seven seconds a way at best."""
    size = 100 * MEGABYTE
    request = os.urandom(size)
    began = time.monotonic()
    replies = transport.exchange({"north": request}, HANGING)
    seconds = time.monotonic() - began
    print(f"\n100 MB down and up at 15 MB/s: {seconds:.0f} s")
    assert replies == {"north": request[::-1]}, transport.logs()
    assert seconds > 2 * size / (15 * MEGABYTE)
    assert line.down < SLACK * size
    assert line.up < SLACK * size


@pytest.mark.parametrize("megabytes", [20, pytest.param(100, marks=pytest.mark.soak)])
def test_an_upload_that_is_cut_goes_on_where_it_was(
    transport: Transport, line: SlowLink, megabytes: int
) -> None:
    """Sent again is the piece that was under way, and nothing that had arrived."""
    size = megabytes * MEGABYTE
    request = os.urandom(size)
    line.cut_after(size // 2)
    replies = transport.exchange({"north": request}, HANGING)
    assert replies == {"north": request[::-1]}, transport.logs()
    assert line.cuts == 1
    again = line.up - size
    print(f"\nsent again after the cut: {again / MEGABYTE:.1f} MB of {megabytes}")
    assert again < FLOWER_PIECE_BYTES + (SLACK - 1) * size
    assert line.down < SLACK * size


def test_a_download_that_is_cut_goes_on_where_it_was(transport: Transport, line: SlowLink) -> None:
    size = 20 * MEGABYTE
    request = os.urandom(size)

    def cut_when_half_is_there() -> None:
        deadline = time.monotonic() + HANGING
        while line.down < size // 2:
            assert time.monotonic() < deadline, transport.logs()
            time.sleep(0.005)
        line.cut()

    cutting = threading.Thread(target=cut_when_half_is_there)
    cutting.start()
    replies = transport.exchange({"north": request}, HANGING)
    cutting.join(HANGING)
    assert replies == {"north": request[::-1]}, transport.logs()
    assert line.cuts == 1
    again = line.down - size
    print(f"\nsent again after the cut: {again / MEGABYTE:.1f} MB of 20")
    assert again < FLOWER_PIECE_BYTES + (SLACK - 1) * size
