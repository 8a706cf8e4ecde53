"""The process with the jobs: it has the operator's key, journal and registry, and no network.

`umbel-server run` starts it, or a service manager: `python -P -m umbel_server.rounds_process
server.toml`.
"""

import logging
import os
import sys
from pathlib import Path

from umbel_host.entry import enter, exit_code
from umbel_host.processes.lifecycle import hide_memory
from umbel_host.processes.log import configure
from umbel_host.processes.seccomp import only_unix_sockets

_logger = logging.getLogger("umbel.rounds")


def main() -> int:
    """Runs until SIGTERM or SIGINT; returns the exit code."""
    hide_memory()
    configure()
    # This process has the operator's key. It needs no network, and nor do evaluations.
    # If the kernel has no such filter, the service's unit, container or pod closes the network.
    if refused := only_unix_sockets():
        _logger.warning("this process keeps its network: %s", os.strerror(refused))

    from umbel_server.jobs.service import run

    return exit_code(lambda: run(Path(sys.argv[1])))


if __name__ == "__main__":
    enter(main)
