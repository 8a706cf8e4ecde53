"""Published vectors, through the functions that the protocol itself calls."""

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from umbel_common.errors import LocalProtocolError, RemoteProtocolError
from umbel_common.secagg.primitives import (
    CHUNK_BYTES,
    Keystream,
    agree,
    commit,
    derive,
    draw,
    hkdf,
    load,
    public_key,
    seal,
    share_binding,
    unseal,
)

site_names = st.from_regex(r"[a-z0-9]{1,4}", fullmatch=True)
bindings = st.tuples(site_names, st.lists(site_names, min_size=1, max_size=2).map(tuple))


def test_hkdf_gives_the_vectors_of_rfc_5869():
    """Appendix A, test cases 1 and 3 (SHA-256)."""
    first = hkdf(
        bytes([0x0B] * 22),
        bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"),
        size=42,
        salt=bytes.fromhex("000102030405060708090a0b0c"),
    )
    assert first.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert hkdf(bytes([0x0B] * 22), b"", size=42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


def test_x25519_gives_the_keys_of_rfc_7748():
    """Section 6.1."""
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert public_key(alice).hex() == (
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    )
    assert public_key(bob).hex() == (
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    )
    assert agree(load(alice), public_key(bob), "bob").hex() == shared
    assert agree(load(bob), public_key(alice), "alice").hex() == shared


@pytest.mark.parametrize(
    "point",
    [
        "00" * 32,
        "01" + "00" * 31,
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    ],
)
def test_a_point_of_small_order_is_refused_by_name(point):
    with pytest.raises(RemoteProtocolError) as caught:
        agree(load(os.urandom(32)), bytes.fromhex(point), "site-07")
    assert (caught.value.check, caught.value.field) == ("weak-key", "site-07")


def test_the_keystream_gives_the_blocks_published_for_a_zero_key_and_zero_counter():
    """McGrew and Viega's GCM test cases 13 and 14 have AES-256 of the counters 0, 1 and 2."""
    stream = bytearray(48)
    Keystream(bytes(32)).fill(memoryview(stream))
    assert stream.hex() == (
        "dc95c078a2408989ad48a21492842087"
        "530f8afbc74536b9a963b4f1c4cb738b"
        "cea7403d4d606b6e074ec5d3baf39d18"
    )


def test_the_keystream_goes_on_from_chunk_to_chunk():
    key = os.urandom(32)
    blocks = 2 * CHUNK_BYTES // 16
    counters = b"".join(counter.to_bytes(16, "big") for counter in range(blocks))
    expected = (
        Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(counters)
    )  # the definition of CTR mode
    keystream = Keystream(key)
    stream = np.empty(2 * CHUNK_BYTES, dtype=np.uint8)
    for part in np.split(stream, [16, CHUNK_BYTES + 16]):
        keystream.fill(part.data)
    assert stream.tobytes() == expected


@given(first=bindings, second=bindings)
def test_keys_agree_exactly_if_purpose_and_ordered_sites_do(first, second):
    keys = [derive(bytes(32), purpose, bytes(32), sites) for purpose, sites in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


def test_framing_tells_names_apart_that_join_to_the_same_text():
    assert derive(bytes(32), "p", bytes(32), ("ab", "c")) != derive(
        bytes(32), "p", bytes(32), ("a", "bc")
    )
    assert share_binding(bytes(32), "ab", "c") != share_binding(bytes(32), "a", "bc")


def test_keys_of_two_contexts_differ():
    assert derive(bytes(32), "p", bytes(32), ("a",)) != derive(
        bytes(32), "p", b"\1" + bytes(31), ("a",)
    )


def test_a_commitment_depends_on_seed_context_and_site():
    base = commit(bytes(32), bytes(32), "a")
    other = b"\1" + bytes(31)
    assert len({base, commit(other, bytes(32), "a"), commit(bytes(32), other, "a")}) == 3
    assert base != commit(bytes(32), bytes(32), "b")


def test_a_sealed_share_opens_only_with_its_key_and_binding():
    key, bound = os.urandom(32), share_binding(bytes(32), "a", "b")
    sealed = seal(key, b"share", bound, os.urandom)
    assert unseal(key, sealed, bound) == b"share"
    assert unseal(os.urandom(32), sealed, bound) is None
    assert unseal(key, sealed, share_binding(bytes(32), "b", "a")) is None
    assert unseal(key, sealed, share_binding(b"\1" + bytes(31), "a", "b")) is None
    assert unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), bound) is None


def test_two_sealings_of_one_share_differ():
    assert seal(bytes(32), b"share", b"", os.urandom) != seal(bytes(32), b"share", b"", os.urandom)


def test_a_source_of_randomness_that_runs_short_is_noticed():
    with pytest.raises(LocalProtocolError) as caught:
        draw(lambda size: bytes(size - 1), 32)
    assert caught.value.check == "entropy"
