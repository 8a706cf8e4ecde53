"""One byte string for each value, so that a digest or a signature has one meaning.

The law: a value has one encoding, and only that encoding is ever hashed or signed. The order, the
names and the types of a signed type's fields are a part of it. So a signed type never gets, loses,
renames or reorders a field: what was signed before would not verify any more. No option, no second
format and no lenient decoding is added here.

Values are frozen `msgspec.Struct`s, encoded as MessagePack maps in the order in which their fields
are declared. Decoding is strict: it refuses an unknown field, a missing field and a wrong type. For
what is hashed or signed, it also refuses any encoding other than the one that `encode` gives, so
that two byte strings never decode to one signed value.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

import msgspec

from umbel_common.errors import RemoteProtocolError, require

Entropy = Callable[[int], bytes]
"""A function from a number to that many bytes of cryptographic randomness, such as `os.urandom`."""

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""A SHA-256 digest."""

Name = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?\Z",
        description="a text in quotes of at most 64 small letters, digits and hyphens, such as"
        " north-clinic; no hyphen first or last",
    ),
]
"""A name of a federation, job or site: lower-case letters, digits, inner hyphens; at most 64."""

T = TypeVar("T")


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every value that is hashed, signed or sent."""


V = TypeVar("V", bound=Value)


def encode(value: Value) -> bytes:
    """The canonical encoding of `value`."""
    return msgspec.msgpack.encode(value)


def decode(data: bytes | memoryview, kind: type[T]) -> T:
    """Decodes a message; refuses unknown fields, missing fields and wrong types.

    Raises:
        RemoteProtocolError: `malformed-message`.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind, strict=True)
    except (msgspec.MsgspecError, RecursionError, OverflowError, UnicodeDecodeError) as error:
        name = getattr(kind, "__name__", "message")
        raise RemoteProtocolError(
            "malformed-message", f"a {name} does not decode: {error}"
        ) from None


def decode_canonical(data: bytes, kind: type[V] | tuple[type[V], ...]) -> V:
    """Decodes a value that is hashed or signed; also refuses every encoding but that of `encode`.

    Args:
        kind: the type, or the versions of one; each names its version, so at most one decodes.

    Raises:
        RemoteProtocolError: `malformed-message`.
    """
    first, *later = kind if isinstance(kind, tuple) else (kind,)
    for version in later:
        try:
            return _decode_one(data, version)
        except RemoteProtocolError:
            continue
    return _decode_one(data, first)


def _decode_one(data: bytes, kind: type[V]) -> V:
    value = decode(data, kind)
    require(
        encode(value) == data,
        "malformed-message",
        f"a {kind.__name__} is not canonically encoded",
    )
    return value


def digest(label: str, *parts: bytes | memoryview) -> bytes:
    """SHA-256 of `parts`, one after the other, under a label for their purpose.

    The label is framed by its length, so no digest for one purpose fits another.
    """
    return digest_of(label, parts)


def digest_of(label: str, parts: Iterable[bytes | memoryview]) -> bytes:
    """Like `digest`, for parts that need not be in memory together."""
    name = label.encode("ascii")
    state = hashlib.sha256(b"umbel/1" + bytes([len(name)]) + name)
    for part in parts:
        state.update(part)
    return state.digest()
