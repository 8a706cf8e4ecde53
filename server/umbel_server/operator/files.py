"""The operator's folder: created once, all of it or nothing; certificates are renewed in place."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509

from umbel_common.address import numeric, split
from umbel_common.errors import IdentityError, StorageError
from umbel_common.trust.identity import Identity, Roster
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_to_json, roster_to_json
from umbel_host.files.durable import create, replace
from umbel_host.files.keys import read_tls_key, write_identity
from umbel_server.operator.authority import (
    Authority,
    certificate_pem,
    key_pem,
    new_authority,
    new_key,
)
from umbel_server.operator.certificates import read
from umbel_server.operator.config import ServerConfig

SERVER_TOML = """\
# The operator's configuration: `umbel-server run` reads it. Relative paths start here.

# Journal, queue, releases and the SuperLink's database.
state = "state"
# The operator's key, which signs plans and rounds. Anyone who has it can act as the operator.
identity = "identity.pem"
# The roster, and the relays that may connect: `umbel-server sites` writes both.
roster = "roster.json"
sites = "sites.json"
# The socket where the process with the port and the one with the jobs meet; absent: in `state`.
# socket = "state/carrier.sock"

[listen]
# Where this server listens, with TLS 1.3 and for certificates of the authority in ca/ only:
# 0.0.0.0 is every IPv4 address of this machine, [::] is every address.
address = "{listen}"
certificate = "tls/certificate.pem"
key = "tls/key.pem"
client_ca = "ca/certificate.pem"
# The address that sites connect to.
public = "{public}"

[limits]
# Attempts at one round before the job fails; `umbel-server job resume` resumes it.
attempts = 3
# Seconds for the sites' answers to a plan, for a round's training, and for each stage after it.
offer_seconds = 60
train_seconds = 3600
stage_seconds = 60

# With this table, released adapters are scored on public records; docs/operator.md explains it.
# It needs the client's packages, in this environment or in the one whose Python is named here.
# [evaluation]
# holdout = "public.jsonl"
# model = "models/minilm"
# python = "/srv/umbel/client/bin/python"
# Number of rounds without a lower loss after which a job ends early, with the best adapter.
# stop_after = 3
"""


def set_up(folder: Path, federation: str, address: str) -> Identity:
    """Creates an operator's folder, which must not exist or must be empty.

    Args:
        address: host and port that sites connect to.

    Returns:
        the operator's new identity.

    Raises:
        StorageError: the folder is not empty, or cannot be written; nothing is left of it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise StorageError(
            "an operator needs an empty folder: nothing is overwritten",
            file=folder,
            remedy="give another --folder",
        )
    host, port = split(address)
    now, authority_key, server_key = datetime.now(UTC), new_key(), new_key()
    authority = Authority(new_authority(federation, authority_key, now), authority_key)
    server = authority.server(server_key.public_key(), [host], now)
    identity = Identity.generate(os.urandom)
    roster = Roster(federation=federation, operator=identity.public_key, members=())
    with _whole(folder):
        write_identity(folder / "identity.pem", identity)
        _write(
            folder,
            {
                "ca/key.pem": key_pem(authority_key),
                "ca/certificate.pem": certificate_pem(authority.certificate),
                "tls/key.pem": key_pem(server_key),
                "tls/certificate.pem": certificate_pem(server),
                "roster.json": roster_to_json(roster).encode(),
                "server.toml": SERVER_TOML.format(
                    listen=_listening(host, port), public=address
                ).encode(),
            },
        )
    return identity


def _listening(host: str, port: int) -> str:
    """Where a server listens for sites that connect to `host`, whose name may stand for an IPv6
    address."""
    return f"0.0.0.0:{port}" if isinstance(numeric(host), IPv4Address) else f"[::]:{port}"


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    existed = folder.exists()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir(mode=0o700, exist_ok=True)
        if isinstance(error, OSError):
            raise StorageError(
                "the operator's folder cannot be written", file=folder, found=error.strerror
            ) from None
        raise


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        create(path, data, mode=0o600 if path.name == "key.pem" else 0o644)


def load_authority(config: ServerConfig) -> Authority:
    """Reads the operator's authority, with its private key.

    Raises:
        IdentityError: its key or certificate is missing or cannot be used, other users can read the
            key, or the two do not belong together.
    """
    path = Path(config.listen.client_ca)
    key, certificate = read_tls_key(path.with_name("key.pem")), read(path)
    if certificate.public_key() != key.public_key():
        raise IdentityError(
            "the authority's key and certificate do not belong together",
            file=path.parent,
            remedy="restore key.pem and certificate.pem from a backup",
        )
    return Authority(certificate, key)


def renew_server(config: ServerConfig) -> x509.Certificate:
    """Issues a new certificate for the port, with the names and the key of the old one.

    Raises:
        IdentityError: the authority, the old certificate or its key cannot be used.
        StorageError: the new one cannot be written; the old one stays.
    """
    path = Path(config.listen.certificate)
    old, key = read(path), read_tls_key(Path(config.listen.key))
    try:
        names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise IdentityError(
            "the server's certificate names no host, so it cannot be renewed", file=path
        ) from None
    hosts = [str(name.value) for name in names]
    renewed = load_authority(config).server(key.public_key(), hosts, datetime.now(UTC))
    _replace_certificate(path, renewed)
    return renewed


def renew_authority(config: ServerConfig, federation: str) -> x509.Certificate:
    """Issues a new certificate for the authority itself, with the same key. The certificates that
    it issued stay valid, and so does its former certificate until it expires.

    Raises:
        IdentityError: the authority cannot be used.
        StorageError: the new one cannot be written; the old one stays.
    """
    renewed = load_authority(config).renewed(federation, datetime.now(UTC)).certificate
    _replace_certificate(Path(config.listen.client_ca), renewed)
    return renewed


def _replace_certificate(path: Path, certificate: x509.Certificate) -> None:
    try:
        replace(path, certificate_pem(certificate))
    except OSError as error:
        raise StorageError(
            "a certificate cannot be written", file=path, found=error.strerror
        ) from None


@contextmanager
def changing(config: ServerConfig) -> Iterator[None]:
    """Locks roster and sites, so that one command at a time changes them. The lock is on the
    roster's folder, and leaves no file.

    Raises:
        StorageError: the folder cannot be opened.
    """
    folder = Path(config.roster).parent
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StorageError(
            "the operator's folder cannot be opened", file=folder, found=error.strerror
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def save_roster(config: ServerConfig, document: RosterDocument) -> None:
    """Replaces the operator's roster.

    Raises:
        StorageError: it cannot be written; the former one stays.
    """
    path = Path(config.roster)
    try:
        replace(path, document_to_json(document).encode())
    except OSError as error:
        raise StorageError(
            "the operator's roster cannot be written", file=path, found=error.strerror
        ) from None
