"""Key files are written for their owner only, and read only if no other user can read them."""

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from umbel_common.errors import IdentityError
from umbel_common.trust.identity import Identity
from umbel_host.files.keys import read_identity, write_identity


def test_a_key_file_gives_back_its_identity_and_is_standard_pem(tmp_path: Path) -> None:
    path, identity = tmp_path / "identity.pem", Identity(bytes(range(32)))
    write_identity(path, identity)
    assert read_identity(path).public_key == identity.public_key
    key = load_pem_private_key(path.read_bytes(), password=None)
    assert key.public_key().public_bytes_raw() == identity.public_key  # type: ignore[union-attr]  # Ed25519


def test_a_new_key_file_is_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        write_identity(tmp_path / "identity.pem", Identity(bytes(32)))
    finally:
        os.umask(former)
    assert (tmp_path / "identity.pem").stat().st_mode & 0o777 == 0o600


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path, first = tmp_path / "identity.pem", Identity(bytes(32))
    write_identity(path, first)
    with pytest.raises(IdentityError, match="never overwritten"):
        write_identity(path, Identity(b"\x01" * 32))
    assert read_identity(path).public_key == first.public_key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_file_that_others_can_open_is_refused_with_the_remedy(
    tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "identity.pem"
    write_identity(path, Identity(bytes(32)))
    path.chmod(mode)
    with pytest.raises(IdentityError) as caught:
        read_identity(path)
    assert f"mode {mode:04o}" in caught.value.diagnostics()
    assert f"chmod 600 {path}" in caught.value.diagnostics()


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdentityError) as caught:
        read_identity(tmp_path / "none.pem")
    assert caught.value.file == tmp_path / "none.pem"


def broken_keys() -> dict[str, bytes]:
    locked = Identity(bytes(32))._key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    other = X25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    return {"empty": b"", "hex": b"00" * 32, "locked": locked, "X25519": other}


@pytest.mark.parametrize("kind", broken_keys())
def test_what_is_no_plain_ed25519_key_is_refused_without_showing_it(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "identity.pem"
    path.touch(mode=0o600)
    path.write_bytes(broken_keys()[kind])
    with pytest.raises(IdentityError, match="no usable key") as caught:
        read_identity(path)
    assert caught.value.found is None
