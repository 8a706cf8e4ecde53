"""A writer of MessagePack by hand, for all that the protocol uses and for what it must refuse.

It shares nothing with the product's encoder. So it checks that encoder, and it makes bytes that the
encoder never would.
"""

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pairs:
    """A map by its entries, in any order, and with any key any number of times."""

    entries: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Raw:
    """Bytes that are put into the encoding as they are."""

    data: bytes


def pack(value: Any) -> bytes:
    """The shortest encoding of `value`; a dict keeps its order."""
    match value:
        case Raw():
            return value.data
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int():
            return _integer(value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return _head(len(data), (0xA0, 31), (0xD9, 0xDA, 0xDB)) + data
        case bytes():
            return _head(len(value), None, (0xC4, 0xC5, 0xC6)) + value
        case list() | tuple():
            return _head(len(value), (0x90, 15), (None, 0xDC, 0xDD)) + b"".join(map(pack, value))
        case dict():
            return pack(Pairs(tuple(value.items())))
        case Pairs():
            body = b"".join(pack(name) + pack(inner) for name, inner in value.entries)
            return _head(len(value.entries), (0x80, 15), (None, 0xDE, 0xDF)) + body
        case _:
            raise TypeError(type(value).__name__)


def _integer(value: int) -> bytes:
    if value < 0:
        raise TypeError("the protocol has no negative integers")
    if value < 0x80:
        return bytes([value])
    for first, code, size in ((0xCC, "B", 8), (0xCD, "H", 16), (0xCE, "I", 32)):
        if value < 2**size:
            return bytes([first]) + struct.pack(f">{code}", value)
    return b"\xcf" + struct.pack(">Q", value)


def _head(
    length: int, short: tuple[int, int] | None, markers: tuple[int | None, int, int]
) -> bytes:
    """The shortest head for `length`, in the marker itself or in 1, 2 or 4 bytes after it."""
    if short is not None and length <= short[1]:
        return bytes([short[0] | length])
    for marker, code, bits in zip(markers, "BHI", (8, 16, 32), strict=True):
        if marker is not None and length < 2**bits:
            return bytes([marker]) + struct.pack(f">{code}", length)
    raise ValueError("longer than MessagePack can say")
