"""What a library writes into our log on behalf of a stranger."""

import logging
import subprocess
import sys

import pytest

from umbel_host.processes import log


@pytest.mark.parametrize("limited", [False, True])
def test_a_stranger_does_not_fill_the_log_through_a_library(
    limited: bool, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"library-{limited}"
    if limited:
        log.adopt(name)
    for _ in range(1000):
        logging.getLogger(name).error("Unsupported Content-Type: %r", "x" * 10_000)
    written = sum(len(record.getMessage()) for record in caplog.records)
    assert (written < 20_000) is limited
    assert ("left out" in caplog.text) is limited


def test_a_library_may_write_again_a_minute_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("umbel_host.processes.log.time.monotonic", lambda: now[0])
    log.adopt("library-again")
    for minute in range(3):
        now[0] = minute * 60.0
        for _ in range(50):
            logging.getLogger("library-again").error("something")
    assert len(caplog.records) == 3 * 20


DAEMON = """
import logging
import subprocess
import sys
from umbel_host.processes import log
log.configure()
for number in range(1000):
    logging.getLogger("grpc._server").error("Exception %d", number)
    logging.getLogger("asyncio").warning("socket.send() %d", number)
    logging.getLogger("umbel.port").info("ours %d", number)
"""


def test_no_library_fills_the_log_and_ours_is_whole() -> None:
    """Also those that nobody adopted: gRPC and asyncio have an event for each error that a site
    can cause."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", DAEMON], capture_output=True, text=True, check=True
    )
    lines = done.stderr.splitlines()
    for library in ("grpc._server", "asyncio"):
        written = [line for line in lines if library in line]
        assert len(written) == 20
        assert "left out" in written[-1]
    assert len([line for line in lines if "ours" in line]) == 1000
