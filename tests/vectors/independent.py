"""The protocol's arithmetic a second time, from its description alone: no line of the product runs.

It uses plain integers, hashlib, hmac, and single operations of the cryptography library, and is
slow and short.
"""

import hashlib
import hmac
import math
import struct
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from vectors.messagepack import pack

PRIME = 2**256 - 189


def labelled(label: str, data: bytes) -> bytes:
    """SHA-256 under a label."""
    return hashlib.sha256(b"umbel/1" + framed(label) + data).digest()


def framed(name: str) -> bytes:
    """One byte of length, then the name."""
    return bytes([len(name)]) + name.encode()


def derived(secret: bytes, purpose: str, context: bytes, *sites: str) -> bytes:
    """HKDF-SHA256 (RFC 5869) by HMAC, with a salt of zeros and one block of output."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    info = b"umbel/1" + framed(purpose) + context + b"".join(map(framed, sites))
    return hmac.digest(extracted, info + b"\x01", "sha256")


def keystream(key: bytes, size: int) -> bytes:
    """AES-256-CTR from a counter of zero: the encryption of 0, 1, 2 and so on."""
    counters = b"".join(count.to_bytes(16, "big") for count in range(-(-size // 16)))
    return Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(counters)[:size]


def elements(data: bytes, bits: int) -> list[int]:
    """Little-endian elements of the ring."""
    size = bits // 8
    return [
        int.from_bytes(data[start : start + size], "little") for start in range(0, len(data), size)
    ]


def masked(vector: list[int], bits: int, added: list[bytes], subtracted: list[bytes]) -> bytes:
    """`vector` plus and minus the masks of some keys, little-endian."""
    total = list(vector)
    for sign, keys in ((1, added), (-1, subtracted)):
        for key in keys:
            mask = elements(keystream(key, len(total) * bits // 8), bits)
            total = [value + sign * part for value, part in zip(total, mask, strict=True)]
    return b"".join((value % 2**bits).to_bytes(bits // 8, "little") for value in total)


def shares(coefficients: list[bytes], points: list[int]) -> list[bytes]:
    """Values of the polynomial, its constant first, at some points."""
    numbers = [int.from_bytes(coefficient, "big") for coefficient in coefficients]
    return [
        (sum(c * point**power for power, c in enumerate(numbers)) % PRIME).to_bytes(32, "big")
        for point in points
    ]


def interpolated(points: list[int], values: list[bytes]) -> bytes:
    """Lagrange's formula at zero, with inverses by Fermat."""
    total = 0
    for x, value in zip(points, values, strict=True):
        others = [other for other in points if other != x]
        top = math.prod(others)
        bottom = math.prod(other - x for other in others)
        total += int.from_bytes(value, "big") * top * pow(bottom, PRIME - 2, PRIME)
    return (total % PRIME).to_bytes(32, "big")


def public(secret: bytes) -> bytes:
    """The X25519 public key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def shared(secret: bytes, peer_key: bytes) -> bytes:
    """The X25519 shared secret."""
    peer = X25519PublicKey.from_public_bytes(peer_key)
    return X25519PrivateKey.from_private_bytes(secret).exchange(peer)


def signed(seed: bytes, label: str, data: bytes) -> bytes:
    """The Ed25519 signature of the labelled digest."""
    return Ed25519PrivateKey.from_private_bytes(seed).sign(labelled(label, data))


def statement(seed: bytes, label: str, fields: Any) -> dict[str, bytes]:
    """A signed statement with these fields."""
    data = pack(fields)
    return {"statement": data, "signature": signed(seed, label, data)}


def quantised(delta: bytes, weight: int, encoding: Any, key: bytes) -> list[int]:
    """Clip, divide by the step, add a uniform number, floor, times the weight."""
    levels = math.ceil(encoding["clip_range"] / encoding["step"])
    top = math.nextafter(levels + 1, 0)
    words = struct.unpack(f"<{len(delta) // 4}i", keystream(key, len(delta)))
    result = [weight]
    for (value,), word in zip(struct.iter_unpack("<f", delta), words, strict=True):
        clipped = max(-encoding["clip_range"], min(encoding["clip_range"], value))
        uniform = word * 2.0**-32 + 0.5
        result.append(weight * math.floor(min(clipped / encoding["step"] + uniform, top)))
    return [value % 2 ** encoding["ring_bits"] for value in result]
