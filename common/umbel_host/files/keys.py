"""Files with private keys, of a party or of TLS: for the owner only, never written over."""

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from umbel_common.errors import IdentityError
from umbel_common.trust.identity import Identity
from umbel_host.files.durable import create
from umbel_host.processes.lifecycle import reason


def write_identity(path: Path, identity: Identity) -> None:
    """Writes a new key file (PKCS#8 PEM, unencrypted, mode 0600), and never over another.

    Raises:
        IdentityError: the file exists, or cannot be written.
    """
    key = Ed25519PrivateKey.from_private_bytes(identity.seed())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        create(path, pem, mode=0o600)
    except FileExistsError:
        raise IdentityError(
            "a key file exists already and is never overwritten",
            file=path,
            remedy="use it, or move it away if another identity is wanted",
        ) from None
    except OSError as error:
        raise IdentityError(
            "a key file cannot be written", file=path, found=error.strerror
        ) from None


def read_identity(path: Path) -> Identity:
    """Reads a key file that only its owner can read.

    Raises:
        IdentityError: the file is missing, open to others, or without an Ed25519 key in unencrypted
            PKCS#8 PEM.
    """
    key = _private_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(
            "a key file holds no usable key",
            file=path,
            accepted="an Ed25519 private key, PKCS#8 PEM, without passphrase",
        )
    return Identity(key.private_bytes_raw())


def read_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads the key of a relay, a server or an authority, which only its owner can read.

    Raises:
        IdentityError: the file is missing, open to others, or without a P-384 key in unencrypted
            PEM.
    """
    key = _private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError(
            "a key file holds no usable key",
            file=path,
            accepted="an ECDSA P-384 private key, PEM, without passphrase",
        )
    return key


def _private_key(path: Path) -> object:
    """The key of any kind in a file of mode 0600; None if the file has no key."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read()
    except OSError as error:
        raise IdentityError(
            "a key file cannot be read",
            file=path,
            found=reason(error),
            remedy="run this as the key's owner"
            if isinstance(error, PermissionError)
            else "give the path of this party's own key file",
        ) from None
    if mode & 0o077:
        raise IdentityError(
            "a key file is open to other users of this machine",
            file=path,
            found=f"mode {mode:04o}",
            accepted="mode 0600",
            remedy=f"chmod 600 {path}; if others may have read it, make a new key",
        )
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
