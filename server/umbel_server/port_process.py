"""The process with the port: Flower's SuperLink behind the gate, and a Unix socket to the jobs.

`umbel-server run` starts it, or a service manager: `python -P -m umbel_server.port_process
server.toml`. It has the server's TLS key, and must never have the operator's key.
"""

import errno
import os
import socket
import sys
from ipaddress import IPv6Address
from pathlib import Path

from umbel_common.address import is_every, numeric, split
from umbel_host.entry import enter, exit_code

FLOWER_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Variables that Flower reads when it is imported."""
_BACKLOG = 1024


def main() -> int:
    """Runs until SIGTERM or SIGINT; returns the exit code."""
    os.environ.update(FLOWER_ENVIRONMENT)

    from umbel_host.processes.lifecycle import give_memory_back, hide_memory
    from umbel_host.processes.log import configure

    hide_memory()
    give_memory_back()
    configure()
    return exit_code(lambda: run(Path(sys.argv[1])))


def run(path: Path) -> None:
    """Serves until told to stop.

    Raises:
        UmbelError: the configuration, a key or certificate, the list of sites, the port, or the
            state folder cannot be used.
    """
    from umbel_host.processes.lifecycle import locked, require_own, require_state, stop_on_signals
    from umbel_server.operator.admitted_sites import load_sites
    from umbel_server.operator.config import load_config
    from umbel_server.port.listener import tls_context

    config = load_config(path)
    context = tls_context(
        Path(config.listen.certificate), Path(config.listen.key), Path(config.listen.client_ca)
    )
    # A list that cannot be read ends the process now; later, the list read before stays in force.
    load_sites(Path(config.sites))
    state = Path(config.state)
    require_state(state)
    require_own(state / "superlink.sqlite")
    os.environ["FLWR_DATABASE"] = str(state / "superlink.sqlite")
    # The system's temporary folder may be in memory, and temporary files are there to save memory.
    os.environ["SQLITE_TMPDIR"] = str(state)
    stopping = stop_on_signals()
    with locked(state / "port.lock", "the process with the port"):
        listener = bound(config.listen.address, path)
        # Flower opens its database when it is imported and created: only after the lock is held.
        from umbel_server.port.server import serve

        serve(config, listener, context, stopping)


def bound(address: str, file: Path) -> socket.socket:
    """Returns a socket that is bound to an address.

    Raises:
        ConfigError: the port is taken, or this machine does not have the address.
    """
    from umbel_common.errors import ConfigError

    host, port = split(address)
    try:
        return _opened(host, port)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            "the port cannot be opened",
            file=file,
            field="listen.address",
            found=f"{address}: {getattr(error, 'strerror', None) or error}",
            remedy=_remedy(error, host, port),
        ) from None


def _opened(host: str, port: int) -> socket.socket:
    """A socket for one address; for every address of both families where `host` is [::]."""
    if is_every(host) and isinstance(numeric(host), IPv6Address):
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        # Every address of this machine is an IPv4 address.
        return socket.create_server(("", port), backlog=_BACKLOG)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # A name of both families, such as localhost, is reached over IPv4 everywhere.
    family, _, _, _, place = min(found, key=lambda one: one[0] != socket.AF_INET)
    return socket.create_server(place, family=family, backlog=_BACKLOG)


def _remedy(error: Exception, host: str, port: int) -> str:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "give an address of this machine, or a name that it knows"
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            return "end the process that uses it, or give another port"
        case errno.EADDRNOTAVAIL:
            return (
                "listen at an address of this machine, 0.0.0.0 or [::]; what sites connect to goes"
                " into listen.public"
            )
        case errno.EACCES if port < 1024:
            return "give a port from 1024 on, or the right CAP_NET_BIND_SERVICE"
        case errno.EAFNOSUPPORT:
            return "this machine has no IPv6: listen at an IPv4 address, such as 0.0.0.0"
        case _:
            return f"see that this process may listen at {host}, port {port}"


if __name__ == "__main__":
    enter(main)
