"""Asks a process of ours whether it is well: `python -P -m umbel_host.probe unix:PATH`.

A service manager, a container's health check or a script runs it and keeps one line of output. Exit
code 0 says that the process is well, 1 that it runs and is not well, any other that it does not
answer. The question is grpc.health.v1, which other probes can ask too.
"""

import sys
from pathlib import Path

from umbel_host.entry import enter

SCHEME = "unix:"
SECONDS = 5.0
"""Time that the process has to answer."""


def probe(address: str) -> None:
    """Returns if the process behind a socket is well.

    Args:
        address: `unix:` and the socket's path.

    Raises:
        ConfigError: it is not such an address.
        UnreachableError: nothing answers there.
        UmbelError: the process that answers is not well.
    """
    from umbel_common.errors import ConfigError, UmbelError
    from umbel_host.transport.sockets import is_healthy

    if not address.startswith(SCHEME) or address == SCHEME:
        raise ConfigError(
            "a probe needs the address of a socket",
            found=address or "nothing",
            accepted="unix:PATH, such as unix:/srv/umbel/operator/state/carrier.sock",
        )
    path = Path(address.removeprefix(SCHEME))
    if not is_healthy(path, SECONDS):
        raise UmbelError(
            "a process runs and is not well",
            file=path,
            remedy="its log says what it is waiting for",
        )


def main() -> int:
    """Prints one line, and returns the exit code."""
    from umbel_common.errors import UmbelError
    from umbel_host.terminal import say

    address = " ".join(sys.argv[1:])
    try:
        probe(address)
    except UmbelError as error:
        say("; ".join(map(str.strip, error.diagnostics().splitlines())), err=True)
        return error.exit_code
    say(f"{address}: well")
    return 0


if __name__ == "__main__":
    enter(main)
