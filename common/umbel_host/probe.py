"""Asks a process of ours whether it is well: `python -m umbel_host.probe unix:PATH`.

For a service manager, a container's health check, a script, which keep one line of what is printed:
exit code 0 says that it is well, 1 that it runs and is not well, any other that it does not answer.
What is asked is grpc.health.v1, which other probes speak too.
"""

import sys
from pathlib import Path

from umbel_common.errors import ConfigError, UmbelError
from umbel_host.terminal import printable
from umbel_host.transport.sockets import healthy

SCHEME = "unix:"
SECONDS = 5.0
"""To answer."""


def probe(address: str) -> None:
    """Returns if the process behind a socket is well.

    Args:
        address: `unix:` and the socket's path.

    Raises:
        ConfigError: it is no such address.
        UnreachableError: nothing answers there.
        UmbelError: what answers says that it is not well.
    """
    if not address.startswith(SCHEME) or address == SCHEME:
        raise ConfigError(
            "a probe needs the address of a socket",
            found=address or "nothing",
            accepted="unix:PATH, such as unix:/srv/umbel/operator/state/carrier.sock",
        )
    path = Path(address.removeprefix(SCHEME))
    if not healthy(path, SECONDS):
        raise UmbelError(
            "a process runs and is not well",
            file=path,
            remedy="its log says what it is waiting for",
        )


def main() -> int:
    """Prints one line; returns the exit code."""
    address = " ".join(sys.argv[1:])
    try:
        probe(address)
    except UmbelError as error:
        print(
            printable("; ".join(map(str.strip, error.diagnostics().splitlines()))), file=sys.stderr
        )
        return error.exit_code
    print(f"{printable(address)}: well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
