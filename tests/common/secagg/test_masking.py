"""Masks cancel, in both rings, at every length around a chunk's end."""

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from umbel_common.errors import LocalProtocolError
from umbel_common.secagg.masking import add_masks, pairwise_key, self_mask_key
from umbel_common.secagg.primitives import CHUNK_BYTES, load, public_key


def one_shot_mask(key: bytes, dtype: str, length: int):
    """The mask in a single call of the cipher."""
    zeros = bytes(np.dtype(dtype).itemsize * length)
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(zeros)
    return np.frombuffer(stream, dtype=dtype)


@pytest.mark.parametrize("dtype", ["<u4", "<u2"])
@pytest.mark.parametrize("chunks", [0.25, 1, 1.5, 2])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_masks_are_added_and_subtracted_modulo_the_ring(dtype, chunks, extra):
    length = int(chunks * CHUNK_BYTES / np.dtype(dtype).itemsize) + extra
    keys = [os.urandom(32) for _ in range(3)]
    vector = np.frombuffer(os.urandom(8 * length), dtype=dtype)[:length].copy()
    masks = [one_shot_mask(key, dtype, length) for key in keys]
    expected = vector + masks[0] + masks[1] - masks[2]
    add_masks(vector, added=keys[:2], subtracted=keys[2:])
    assert (vector == expected).all()


def test_no_mask_leaves_the_vector_as_it_is():
    vector = np.arange(5, dtype="<u4")
    add_masks(vector)
    assert vector.tolist() == [0, 1, 2, 3, 4]


def test_an_empty_vector_takes_masks():
    add_masks(np.empty(0, dtype="<u4"), added=[bytes(32)])


def test_the_mask_of_a_16_bit_ring_uses_every_byte_of_the_keystream():
    wide, narrow = np.zeros(4, dtype="<u4"), np.zeros(8, dtype="<u2")
    add_masks(wide, added=[bytes(32)])
    add_masks(narrow, added=[bytes(32)])
    assert wide.tobytes() == narrow.tobytes()


def test_both_sites_of_a_pair_derive_one_key_and_no_one_else_does():
    a, b, c = (os.urandom(32) for _ in range(3))
    key = pairwise_key(load(a), "a", public_key(b), "b", bytes(32))
    assert key == pairwise_key(load(b), "b", public_key(a), "a", bytes(32))
    assert key != pairwise_key(load(c), "a", public_key(b), "b", bytes(32))
    assert key != pairwise_key(load(a), "a", public_key(b), "b", b"\1" + bytes(31))


def test_a_self_mask_key_is_not_the_seed_itself():
    assert self_mask_key(bytes(32), "a", bytes(32)) != bytes(32)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, dtype=np.float32),
        np.zeros(4, dtype=np.uint64),
        np.zeros(4, dtype=">u4"),
        np.zeros((2, 2), dtype="<u4"),
        np.zeros(8, dtype="<u4")[::2],
        np.frombuffer(bytes(16), dtype="<u4"),
    ],
    ids=["floats", "64 bits", "big-endian", "a matrix", "strided", "read-only"],
)
def test_what_cannot_be_masked_in_place_is_refused(vector):
    with pytest.raises(LocalProtocolError) as caught:
        add_masks(vector, added=[bytes(32)])
    assert caught.value.check == "ring-vector"
