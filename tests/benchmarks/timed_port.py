"""The process with the port, which notes how long each request took: `python timed_port.py
server.toml FILE`. It writes FILE when it is told to stop.

Only the calls of Flower's application and of the mailbox are wrapped; nothing else is changed.
"""

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
"""Request -> for each, when it began (seconds since 1970) and how many seconds it took."""
_LOCK = threading.Lock()


def note(name: str, began: float, moment: float) -> None:
    """Adds a request that began at `began` of the monotonic clock, and at `moment` of the day's."""
    with _LOCK:
        TIMES[name].append((moment, time.monotonic() - began))


def main() -> int:
    """As `port_process.main`."""
    import os

    from umbel_server import port_process

    os.environ.update(port_process.FLOWER_ENVIRONMENT)

    from umbel_host.processes.log import configure

    configure()
    from umbel_server.port import server
    from umbel_server.port.mailbox import NodeMailbox

    class TimedGate(server.Gate):
        """Times what passes to Flower, from the complete body to the end of the answer."""

        def __init__(self, fleet: Any, **parts: Any) -> None:
            async def timed(scope: Any, receive: Any, send: Any) -> None:
                began, moment = time.monotonic(), time.time()
                await fleet(scope, receive, send)
                if scope["type"] == "http":
                    note(scope["path"].rpartition("/")[2], began, moment)

            super().__init__(timed, **parts)

    server.Gate = TimedGate  # type: ignore[misc]
    for name in ("post", "collect", "forget"):
        setattr(NodeMailbox, name, timed_method(name, getattr(NodeMailbox, name)))
    try:
        port_process.run(Path(sys.argv[1]))
    finally:
        Path(sys.argv[2]).write_text(json.dumps(TIMES))
    return 0


def timed_method(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, which is timed."""

    def timed(*given: Any) -> Any:
        began, moment = time.monotonic(), time.time()
        try:
            return method(*given)
        finally:
            note(f"mailbox {name}", began, moment)

    return timed


if __name__ == "__main__":
    sys.exit(main())
