"""Where the port listens, and what is said where it cannot."""

import errno
import socket
from pathlib import Path

import pytest

from umbel_common.errors import ConfigError
from umbel_server.port_process import bound

FILE = Path("server.toml")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def reached(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1.0).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "loopbacks"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("0.0.0.0", {"127.0.0.1"}),
        ("[::1]", {"::1"}),
        ("[::]", {"127.0.0.1", "::1"}),
        ("localhost", {"127.0.0.1"}),
    ],
)
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_family_follows_from_the_address(host: str, loopbacks: set[str]) -> None:
    port = free_port()
    with bound(f"{host}:{port}", FILE):
        assert {one for one in ("127.0.0.1", "::1") if reached(one, port)} == loopbacks


def test_every_address_of_a_machine_without_ipv6_is_an_ipv4_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with bound(f"[::]:{(port := free_port())}", FILE):
        assert reached("127.0.0.1", port)


def refusal(address: str) -> ConfigError:
    with pytest.raises(ConfigError, match="the port cannot be opened") as caught:
        bound(address, FILE)
    assert caught.value.field == "listen.address"
    assert address in str(caught.value.found)
    return caught.value


def test_what_to_do_fits_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert "end the process that uses it" in str(refusal(f"127.0.0.1:{port}").remedy)
    assert "an address of this machine" in str(refusal(f"192.0.2.1:{port}").remedy)

    def fails(number: int) -> None:
        def create_server(*_: object, **__: object) -> socket.socket:
            raise OSError(number, "no")

        monkeypatch.setattr(socket, "create_server", create_server)

    fails(errno.EAFNOSUPPORT)
    assert "no IPv6" in str(refusal(f"[2001:db8::1]:{port}").remedy)
    fails(errno.EACCES)
    assert "CAP_NET_BIND_SERVICE" in str(refusal("127.0.0.1:443").remedy)


def test_a_name_that_this_machine_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "a name that it knows" in str(refusal("nowhere.example:9443").remedy)
