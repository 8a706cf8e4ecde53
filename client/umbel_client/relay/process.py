"""The relay's process: it has the network, and nothing of the site's.

`umbel-client run` starts it, or a service manager does: `python -P -m umbel_client.relay
client.toml`. It carries sealed bytes from the server to the trainer's socket and back. It cannot
read them, or change them unnoticed. On a machine that it shares with the trainer, it must not be
able to read data, identity key or ledger.
"""

import logging
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from umbel_client.relay.flower import Connection, serve
from umbel_client.site.config import (
    load_config,
    relay_socket,
    require_relay,
    trainer_socket,
)
from umbel_client.site.ipc import TrainerStub
from umbel_client.site.separation import judge_separation, relay_not_apart
from umbel_common.errors import UnreachableError
from umbel_host.entry import exit_code
from umbel_host.processes.lifecycle import (
    give_memory_back,
    hide_memory,
    locked,
    stop_on_signals,
)
from umbel_host.processes.log import adopt, configure, limit
from umbel_host.transport.flower import regrouped
from umbel_host.transport.sockets import SocketServer

PROBE_MODE = 0o660
_AGAIN_SECONDS = 1.0
_logger = logging.getLogger("umbel.relay")
T = TypeVar("T")


def run(path: Path) -> None:
    """Carries messages until told to stop.

    Raises:
        UmbelError: the configuration, a certificate or a socket cannot be used; or this process
            could read what only the trainer may, and the site requires isolation.
    """
    config = load_config(path)
    relay = require_relay(config, path)
    judge_separation(config, path, relay_not_apart(config), _logger.name)
    stopping = stop_on_signals()
    with ExitStack() as stack:
        stub = TrainerStub(trainer_socket(relay))
        stack.callback(stub.close)
        # A trainer answers after hours, or is not there: nobody waits for it any more then.
        threading.Thread(target=_close, args=(stub, stopping), daemon=True).start()
        probes = SocketServer(relay_socket(relay), PROBE_MODE, workers=2)
        stack.enter_context(locked(relay_socket(relay).with_suffix(".lock"), "this site's relay"))
        probes.start()
        stack.callback(probes.stop, 1.0)
        serve(
            Connection(
                server=relay.server,
                server_ca=Path(relay.server_ca),
                certificate=Path(relay.certificate),
                key=Path(relay.key),
            ),
            lambda pieces: _patiently(lambda: list(regrouped(stub.stream(pieces))), stopping),
            stopping,
            probes.report_health,
            lambda: _patiently(stub.largest, stopping),
        )


def _close(stub: TrainerStub, stopping: threading.Event) -> None:
    stopping.wait()
    stub.close()


def _patiently(ask: Callable[[], T], stopping: threading.Event) -> T:
    """Returns the trainer's answer. A trainer that died is asked again when it is back: it answers
    from its journal, or refuses."""
    while True:
        try:
            return ask()
        except UnreachableError:
            if stopping.is_set():
                raise
            _logger.warning("the trainer ended before it answered: it is asked again")
            if stopping.wait(_AGAIN_SECONDS):
                raise


def main() -> int:
    """Runs until SIGTERM or SIGINT; returns the exit code."""
    hide_memory()
    give_memory_back()
    configure()
    adopt("flwr")
    # Most of what it has to tell is what a server does.
    limit(_logger.name)
    return exit_code(lambda: run(Path(sys.argv[1])))
