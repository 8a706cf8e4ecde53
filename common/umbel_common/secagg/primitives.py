"""The primitives of secure aggregation, each from pyca/cryptography, without options.

The law: no primitive is written here, none is chosen at run time, and none is added beside these.
Every derived key is bound to a purpose, to the context of one attempt and to the sites it is for.
No key is used for two things.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439) and the keystream of
AES-256-CTR (SP 800-38A).
"""

from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from umbel_common.canonical import Entropy, digest
from umbel_common.errors import LocalProtocolError, RemoteProtocolError

KEY_BYTES = 32
NONCE_BYTES = 12
CHUNK_BYTES = 2**17
"""Size of a piece of keystream: it stays in the L2 cache with the vector that it masks."""

_ZEROS = memoryview(bytes(CHUNK_BYTES))


def draw(entropy: Entropy, size: int) -> bytes:
    """`size` bytes of `entropy`.

    Raises:
        LocalProtocolError: `entropy`, if another number of bytes came.
    """
    data = entropy(size)
    if len(data) != size:
        raise LocalProtocolError(
            "entropy",
            "the source of randomness returned the wrong number of bytes",
            found=len(data),
            accepted=size,
        )
    return data


def load(secret: bytes) -> X25519PrivateKey:
    """32 secret bytes as an X25519 key (RFC 7748, section 5).

    Loading costs as much as agreeing, so a key that agrees with many is loaded once.
    """
    return X25519PrivateKey.from_private_bytes(secret)


ANY_KEY = load(bytes(KEY_BYTES))
"""Any key finds a point of small order: X25519 makes a multiple of 8 of it, so both give zero."""


def public_key(secret: bytes) -> bytes:
    """The 32-byte X25519 public key of 32 secret bytes."""
    return load(secret).public_key().public_bytes_raw()


def agree(ours: X25519PrivateKey, peer_key: bytes, peer: str) -> bytes:
    """The 32-byte X25519 shared secret with the site `peer`.

    Raises:
        RemoteProtocolError: `weak-key` if `peer` sent a point of small order, with which the result
            is all zero (RFC 7748, section 6.1); OpenSSL reports it.
    """
    try:
        return ours.exchange(X25519PublicKey.from_public_bytes(peer_key))
    except ValueError:
        raise RemoteProtocolError(
            "weak-key", "a site advertised a key of small order", field=peer
        ) from None


def hkdf(secret: bytes, info: bytes, *, size: int = KEY_BYTES, salt: bytes | None = None) -> bytes:
    """HKDF-SHA256: `size` bytes derived from `secret`."""
    return HKDF(algorithm=SHA256(), length=size, salt=salt, info=info).derive(secret)


def derive(secret: bytes, purpose: str, context: bytes, sites: Sequence[str]) -> bytes:
    """A 32-byte key for one purpose in one attempt, between `sites` in the order given.

    Each part of HKDF's info is framed by its length (the context always has 32 bytes), so no two
    triples (purpose, context, sites) give one key.
    """
    return hkdf(secret, b"umbel/1" + _frame(purpose) + context + b"".join(map(_frame, sites)))


def commit(seed: bytes, context: bytes, site: str) -> bytes:
    """A 32-byte commitment to a uniform 32-byte self-mask seed.

    SHA-256 binds (collision resistance) and hides (the seed has 256 bits of entropy).
    """
    return digest("seed commitment", context, seed, _frame(site))


def seal(key: bytes, data: bytes, bound: bytes, entropy: Entropy) -> bytes:
    """A 12-byte random nonce, then ChaCha20-Poly1305 of `data` with `bound` as associated data."""
    nonce = draw(entropy, NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, data, bound)


def unseal(key: bytes, sealed: bytes, bound: bytes) -> bytes | None:
    """The inverse of `seal`; None if `sealed` was not made with this key and this `bound`."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound)
    except InvalidTag:
        return None


def share_binding(context: bytes, sender: str, recipient: str) -> bytes:
    """The associated data of an encrypted share."""
    return context + _frame(sender) + _frame(recipient)


class Keystream:
    """The keystream of AES-256-CTR under a key that is used for nothing else."""

    def __init__(self, key: bytes) -> None:
        # The initial counter may be zero because the key is used once: it is, or is derived from,
        # fresh randomness of one attempt and is expanded once, so no (key, counter) repeats.
        zero_counter = bytes(16)
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(zero_counter)).encryptor()

    def fill(self, buffer: memoryview) -> None:
        """Overwrites `buffer`, at most `CHUNK_BYTES` long, with the next bytes of the keystream."""
        self._encryptor.update_into(_ZEROS[: len(buffer)], buffer)


def _frame(name: str) -> bytes:
    data = name.encode("ascii")
    return bytes([len(data)]) + data
