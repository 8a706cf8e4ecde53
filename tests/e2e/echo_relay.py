"""A site's relay whose trainer is an echo: `python echo_relay.py SERVER FOLDER CLOCK_AHEAD`.

A message that begins `wait SECONDS ` is answered so much later, as if somebody trained. Every
message that reaches the echo is a line in `asked.log`. The relay's clock is wrong by so many
seconds.
"""

import logging
import signal
import sys
import threading
import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

from support.relays import whole

import umbel_client.relay.flower
import umbel_client.relay.server_clock
from umbel_client.relay.flower import Connection, serve


class Clock(datetime):
    """Of a machine that nobody sets."""

    ahead = timedelta()

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # no Clock
        return datetime.now(tz) + cls.ahead


def main(server: str, folder: Path, ahead: float) -> None:
    """Until SIGTERM."""
    Clock.ahead = timedelta(seconds=ahead)
    # As the relay sees the time.
    for module in (umbel_client.relay.flower, umbel_client.relay.server_clock):
        vars(module)["datetime"] = Clock
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # The HTTP client has a line for each poll.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())

    def handle(sealed: bytes) -> bytes:
        with (folder / "asked.log").open("ab") as log:
            log.write(sealed[:40].hex().encode() + b"\n")
        if sealed.startswith(b"wait "):
            time.sleep(float(sealed.split(b" ", 2)[1]))
        return sealed[::-1]

    connection = Connection(
        server=server,
        server_ca=folder / "server-ca.pem",
        certificate=folder / "certificate.pem",
        key=folder / "key.pem",
    )
    serve(connection, whole(handle), stopping, lambda _: None)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
