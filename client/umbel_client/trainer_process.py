"""The trainer's process: it gives its network away before it loads anything that could use one.

`umbel-client run` starts it, or a service manager does: `python -P -m umbel_client.trainer_process
client.toml`.
"""

import sys
from pathlib import Path

from umbel_client.trainer.isolation import drop_network
from umbel_host.entry import enter, exit_code
from umbel_host.processes.lifecycle import hide_memory


def main() -> int:
    """Runs until SIGTERM or SIGINT; returns the exit code."""
    # Before the imports below: NumPy, PyTorch and gRPC start threads (see `isolation`).
    refused = drop_network()
    hide_memory()

    from umbel_client.trainer.service import run
    from umbel_host.processes.log import configure

    configure()
    return exit_code(lambda: run(Path(sys.argv[1]), refused))


if __name__ == "__main__":
    enter(main)
