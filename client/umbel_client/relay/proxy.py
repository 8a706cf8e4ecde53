"""The proxy between a site and the server, where the environment names one.

It is chosen here, once: so errors name the proxy that is used, and no password gets into them. An
HTTP tunnel (CONNECT) goes through the proxy, which learns the server's name and port and sees TLS
that it cannot open.
"""

import ssl
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.request import getproxies_environment, proxy_bypass

import httpx

from umbel_common.address import numeric, split
from umbel_common.errors import ConfigError

_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Way:
    """How a server is reached: directly, or through a proxy."""

    server: str
    """Host and port."""
    proxy: httpx.Proxy | None

    def __str__(self) -> str:
        """A text for people, without the proxy's user and password."""
        if self.proxy is None:
            return self.server
        return f"{self.server} through the proxy {self.proxy.url}"

    def client(self, context: ssl.SSLContext, seconds: float) -> httpx.Client:
        """A client that goes this way and no other.

        Args:
            context: for TLS with the server.
            seconds: limit of each step of a request.
        """
        return httpx.Client(
            verify=context,
            timeout=seconds,
            proxy=self.proxy,
            trust_env=False,
            # Redirections would let the server reach any address in the site's own network.
            follow_redirects=False,
        )


def way_to(server: str) -> Way:
    """The way that HTTPS_PROXY, else ALL_PROXY, and NO_PROXY name; lower-case names come first.

    Raises:
        ConfigError: a proxy is named in a way that cannot be used, or would be asked for an IPv6
            address.
    """
    proxies = getproxies_environment()
    # All of them are checked, because Flower's client reads all of them when it is made.
    made = {
        name: _proxy(name, proxies[name]) for name in ("http", "https", "all") if name in proxies
    }
    host, _ = split(server)
    # NO_PROXY may name an IPv6 address with brackets or without.
    if proxy_bypass(server, proxies) or proxy_bypass(host, proxies):
        return Way(server, None)
    proxy = made.get("https") or made.get("all")
    if proxy is not None and isinstance(numeric(host), IPv6Address):
        # httpcore asks the proxy for the address without its brackets, which no proxy understands.
        raise ConfigError(
            "a server is not reached by an IPv6 address through a proxy",
            field="relay.server",
            found=server,
            accepted="a name, or an IPv4 address; or a way without a proxy",
            remedy="ask the operator for a name of the server, or name the address in NO_PROXY",
        )
    return Way(server, proxy)


def _proxy(name: str, value: str) -> httpx.Proxy:
    url = value if "://" in value else f"http://{value}"
    proxy: httpx.Proxy | None
    try:
        proxy = httpx.Proxy(url)
    except (ValueError, httpx.InvalidURL):
        proxy = None
    if proxy is None or proxy.url.scheme not in _SCHEMES or not proxy.url.host:
        # The error does not quote the value: a password may be in it.
        raise ConfigError(
            "the environment names a proxy that cannot be used",
            field=f"{name.upper()}_PROXY",
            accepted="http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, where a character of the"
            " password that is neither letter nor digit is written as %XX",
        )
    return proxy
