"""Which texts are addresses, and which of them somebody can connect to."""

import pytest

from umbel_common.address import is_every, require_reachable, split

GOOD = {
    "umbel.example.org:9443": ("umbel.example.org", 9443),
    "umbel_server:1": ("umbel_server", 1),
    "h2:65535": ("h2", 65535),
    "3com.example:443": ("3com.example", 443),
    "10.0.0.7:443": ("10.0.0.7", 443),
    "[2001:db8::1]:9443": ("2001:db8::1", 9443),
    "[::1]:9443": ("::1", 9443),
    "[::ffff:10.0.0.7]:1": ("::ffff:10.0.0.7", 1),
}
ONLY_LISTENING = ["0.0.0.0:9443", "[::]:9443", "[0:0::0]:1", "[::ffff:0.0.0.0]:1"]
BAD = ["host", "host:0", "host:65536", "::1:9443", "[::1]", "[1::2::3]:1", "256.1.1.1:1", "0:1"]
BAD += ["10.1:1", "0x7f000001:1", "host.0x7f:1", "[host]:1", "https://host:1", "h\n:1", ""]
BAD += ["a..b:1", "a.:1", "a-:1", f"{'x' * 64}.org:1", f"{'x.' * 127}x:1", "[10.0.0.7]:443"]


@pytest.mark.parametrize(("address", "parts"), GOOD.items())
def test_an_address_has_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert split(address) == parts
    assert not is_every(parts[0])
    require_reachable(address)


@pytest.mark.parametrize("address", ONLY_LISTENING)
def test_a_server_listens_at_every_address_and_nobody_connects_to_it(address: str) -> None:
    assert is_every(split(address)[0])
    with pytest.raises(ValueError, match="give the server's own name or address"):
        require_reachable(address)


@pytest.mark.parametrize("address", ["224.0.0.1:1", "[ff02::1]:1", "255.255.255.255:1"])
def test_nobody_connects_to_many_machines_at_once(address: str) -> None:
    with pytest.raises(ValueError, match="nobody can connect"):
        require_reachable(address)


@pytest.mark.parametrize("address", BAD)
def test_anything_else_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"host:port|a port is|neither an IP address nor a name"):
        split(address)
