"""Which way a relay takes to an IPv6 address, and to anything else."""

import pytest

from umbel_client.relay.proxy import way_to
from umbel_common.errors import ConfigError

PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    return monkeypatch


@pytest.mark.parametrize("server", ["umbel.example:9443", "192.0.2.1:9443"])
def test_a_name_or_an_ipv4_address_is_reached_through_the_proxy(server: str) -> None:
    assert "through the proxy" in str(way_to(server))


@pytest.mark.parametrize("server", ["[2001:db8::1]:9443", "[::1]:9443"])
@pytest.mark.parametrize("brackets", [True, False])
def test_an_ipv6_address_is_reached_directly_or_refused(
    environment: pytest.MonkeyPatch, server: str, brackets: bool
) -> None:
    with pytest.raises(ConfigError, match="IPv6 address through a proxy"):
        way_to(server)
    host = server.rpartition(":")[0]
    environment.setenv("NO_PROXY", host if brackets else host.strip("[]"))
    assert way_to(server).proxy is None
    environment.setenv("NO_PROXY", "other.example")
    environment.delenv("HTTPS_PROXY")
    assert way_to(server).proxy is None
