"""The proxy between a site and the server, where the environment names one.

Decided here once, so that what is used is what errors speak of, and so that no password gets into
either. Through a proxy goes an HTTP tunnel (CONNECT): it learns the server's name and port, and
sees TLS that it cannot open.
"""

import ssl
from dataclasses import dataclass
from urllib.request import getproxies_environment, proxy_bypass

import httpx

from umbel_common.errors import ConfigError

_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Way:
    """How a server is reached: directly, or through a proxy."""

    server: str
    """Host and port."""
    proxy: httpx.Proxy | None

    def __str__(self) -> str:
        """For people; a proxy's user and password are not in it."""
        if self.proxy is None:
            return self.server
        return f"{self.server} through the proxy {self.proxy.url}"

    def client(self, context: ssl.SSLContext, seconds: float) -> httpx.Client:
        """A client that goes this way and no other.

        Args:
            context: for TLS with the server.
            seconds: for each step of a request.
        """
        return httpx.Client(
            verify=context,
            timeout=seconds,
            proxy=self.proxy,
            trust_env=False,
            # Or the server could send requests on to any address in the site's own network.
            follow_redirects=False,
        )


def way_to(server: str) -> Way:
    """As HTTPS_PROXY, else ALL_PROXY, and NO_PROXY say; lower-case names count first.

    Raises:
        ConfigError: a proxy is named in a way that cannot be used.
    """
    proxies = getproxies_environment()
    # Flower's client would read all of them as it is made.
    made = {
        name: _proxy(name, proxies[name]) for name in ("http", "https", "all") if name in proxies
    }
    if proxy_bypass(server, proxies):
        return Way(server, None)
    return Way(server, made.get("https") or made.get("all"))


def _proxy(name: str, value: str) -> httpx.Proxy:
    url = value if "://" in value else f"http://{value}"
    proxy: httpx.Proxy | None
    try:
        proxy = httpx.Proxy(url)
    except (ValueError, httpx.InvalidURL):
        proxy = None
    if proxy is None or proxy.url.scheme not in _SCHEMES or not proxy.url.host:
        # Without what was found: a password may be in it.
        raise ConfigError(
            "the environment names a proxy that cannot be used",
            field=f"{name.upper()}_PROXY",
            accepted="http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, where a character of the"
            " password that is neither letter nor digit is written as %XX",
        )
    return proxy
