"""Addresses of servers: a host and a port as one text, in files, kits and commands."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated

import msgspec

FORM = "host:port; the host is a name or an address, IPv6 in [ ]"

Address = Annotated[
    str,
    msgspec.Meta(
        max_length=300,
        pattern=r"^(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}\Z",
        description=f"in quotes, {FORM}",
    ),
]
"""A host and a port. The host is a name, an IPv4 address, or an IPv6 address in brackets. No
character has a meaning in TOML, so an address can be written into a configuration as it is."""

_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?")
"""Names that resolvers read as an IPv4 address in one of its old notations."""
_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")
"""What stands between the dots of a name."""
_LONGEST_NAME = 253
_BROADCAST = IPv4Address("255.255.255.255")


def split(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port.

    Raises:
        ValueError: the text is not an address; it says why.
    """
    try:
        msgspec.convert(address, Address)
    except msgspec.ValidationError:
        raise ValueError(FORM) from None
    host, _, port = address.rpartition(":")
    if not 0 < int(port) < 65536:
        raise ValueError("a port is a number from 1 to 65535")
    bare = host.strip("[]")
    found, in_brackets = numeric(bare), host.startswith("[")
    if in_brackets != isinstance(found, IPv6Address) or (found is None and not _is_name(host)):
        raise ValueError(f"{host} is neither an IP address nor a name")
    return bare, int(port)


def _is_name(host: str) -> bool:
    """Whether a resolver could find a host of this name."""
    parts = all(_PART.fullmatch(part) for part in host.split("."))
    return parts and len(host) <= _LONGEST_NAME and not _NUMERIC.fullmatch(host)


def numeric(host: str) -> IPv4Address | IPv6Address | None:
    """The IP address that a host without brackets is; None: it is a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_every(host: str) -> bool:
    """Whether a host means every address of the machine that listens, as 0.0.0.0 and :: do."""
    found = numeric(host)
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped.is_unspecified
    return found is not None and found.is_unspecified


def require_reachable(address: str) -> None:
    """Refuses an address that no other machine can connect to.

    Raises:
        ValueError: the text is not an address, or one at which a server only listens.
    """
    host, _ = split(address)
    found = numeric(host)
    everybody = found is not None and (found.is_multicast or found == _BROADCAST)
    if is_every(host) or everybody:
        raise ValueError(f"nobody can connect to {host}: give the server's own name or address")
