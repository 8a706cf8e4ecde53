"""Whether a process of ours is well, for service managers: `python -m umbel_host.probe
unix:/run/umbel/trainer.sock`.

Asks grpc.health.v1 behind a Unix socket, prints one line, and ends with 0 when the answer is
SERVING, else with `UnreachableError.exit_code`.
"""

import sys
from pathlib import Path

from umbel_common.errors import UnreachableError
from umbel_host.console import printable
from umbel_host.sockets import healthy

PREFIX = "unix:"
WRONG_USAGE = 2
NOT_SERVING = UnreachableError.exit_code
_SECONDS = 5.0
"""Less than service managers wait for a probe."""


def answer(address: str) -> tuple[int, str]:
    """The exit code for the process behind an address, and the line that says how it stands."""
    path = address.removeprefix(PREFIX)
    if path == address or not path:
        return WRONG_USAGE, f"{address}: accepted: {PREFIX}/path/of/a/socket"
    try:
        well = healthy(Path(path), _SECONDS)
    except UnreachableError as error:
        return error.exit_code, f"{address}: does not answer: {error.found}"
    return (0, f"{address}: serving") if well else (NOT_SERVING, f"{address}: not serving")


def main() -> int:
    """Prints the answer for the address on the command line; returns the exit code."""
    if len(sys.argv) != 2:
        code, line = WRONG_USAGE, f"usage: python -m umbel_host.probe {PREFIX}/path/of/a/socket"
    else:
        code, line = answer(sys.argv[1])
    print(printable(line.replace("\n", " ")), file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
