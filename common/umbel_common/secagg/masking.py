"""Masks: keys expanded to ring vectors, added in place (Bonawitz et al. 2017, section 4).

The law: one key makes one mask; a vector gets all its masks in one call, so that no half-masked
vector exists outside of it; of two sites, the one whose name sorts first adds their mask and the
other subtracts it. `add_masks` is step S3.5 of `participant` and step C5.6 of `coordinator`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from umbel_common.canonical import digest
from umbel_common.errors import LocalProtocolError
from umbel_common.secagg.encoding import RingVector
from umbel_common.secagg.primitives import CHUNK_BYTES, Keystream, agree, derive
from umbel_common.trust.identity import Signed


def prepared_mask_context(context: bytes, adverts: Iterable[Signed]) -> bytes:
    """What takes the place of the context in the masks of a prepared attempt, 32 bytes.

    Its keys are older than the delta. Each advert has the head of its site's ledger, which names
    the delta. So keys that a machine brings back with its memory make other masks for another one.

    Args:
        context: of the attempt, 32 bytes.
        adverts: those of U1, in any order.
    """
    parts = sorted(digest("mask advert", advert.statement) for advert in adverts)
    return digest("prepared masks", context, *parts)


def self_mask_key(seed: bytes, site: str, context: bytes) -> bytes:
    """The key of a site's own mask, derived from its 32-byte seed."""
    return derive(seed, "self mask", context, (site,))


def pairwise_key(
    ours: X25519PrivateKey, site: str, peer_key: bytes, peer: str, context: bytes
) -> bytes:
    """The key of the mask between `site`, whose X25519 key is given, and `peer`.

    Both sites derive the same key. The site whose name sorts first adds the mask, the other
    subtracts it.

    Raises:
        RemoteProtocolError: `weak-key`.
    """
    return derive(agree(ours, peer_key, peer), "pairwise mask", context, sorted((site, peer)))


def add_masks(
    vector: RingVector, *, added: Sequence[bytes] = (), subtracted: Sequence[bytes] = ()
) -> None:
    """Adds the masks of some keys to `vector`, and subtracts those of others, in place.

    The mask of a key is its AES-256-CTR keystream, read as little-endian elements of the ring.

    Args:
        vector: uint32[n] or uint16[n], little-endian, contiguous, writeable.
        added: 32-byte keys, each used once: one key makes one mask.
        subtracted: likewise.

    Raises:
        LocalProtocolError: `ring-vector`.
    """
    check_ring_vector(vector)
    plus = [Keystream(key) for key in added]
    minus = [Keystream(key) for key in subtracted]
    length = CHUNK_BYTES // vector.itemsize
    buffer = np.empty(length, dtype=vector.dtype)
    # All masks of one chunk come before the next chunk, so a chunk stays in the cache meanwhile.
    for start in range(0, vector.size, length):
        chunk = vector[start : start + length]
        mask = buffer[: chunk.size]
        stream = mask.data.cast("B")
        for keystream in plus:
            keystream.fill(stream)
            np.add(chunk, mask, out=chunk)
        for keystream in minus:
            keystream.fill(stream)
            np.subtract(chunk, mask, out=chunk)
    # The rest of the last mask must not stay in memory that is given to somebody else next.
    buffer.fill(0)


def check_ring_vector(vector: RingVector) -> None:
    """Refuses a vector that cannot be masked in place.

    Raises:
        LocalProtocolError: `ring-vector`.
    """
    usable = (
        vector.dtype in (np.dtype("<u4"), np.dtype("<u2"))
        and vector.ndim == 1
        and vector.flags.c_contiguous
        and vector.flags.writeable
    )
    if not usable:
        raise LocalProtocolError(
            "ring-vector",
            "a vector cannot be masked in place",
            found=f"{vector.dtype.str}, {vector.ndim} dimensions",
            accepted="<u4 or <u2, one dimension, contiguous, writeable",
        )
