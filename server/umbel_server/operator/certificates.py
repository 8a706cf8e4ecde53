"""How long certificates are still valid, and which have to be renewed soon."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from umbel_common.errors import IdentityError
from umbel_server.operator.admitted_sites import load_sites
from umbel_server.operator.config import ServerConfig

SOON = timedelta(days=30)
AUTHORITY_SOON = timedelta(days=180)
"""Earlier, because a site gets the authority's new certificate with its kit, every three months."""


def parse(pem: bytes, file: object) -> x509.Certificate:
    """Decodes a certificate from PEM.

    Args:
        file: where it came from, for errors.

    Raises:
        IdentityError: it is malformed.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise IdentityError(
            "a certificate is malformed", file=file, accepted="an X.509 certificate, PEM"
        ) from None


def read(path: Path) -> x509.Certificate:
    """Reads a certificate from its file.

    Raises:
        IdentityError: it is missing, unreadable or malformed.
    """
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise IdentityError(
            "a certificate cannot be read", file=path, found=error.strerror
        ) from None
    return parse(pem, path)


def good_until(certificate: x509.Certificate, now: datetime) -> str:
    """The last day of a certificate (UTC) and the days until then, for people."""
    end = certificate.not_valid_after_utc
    if end < now:
        return f"{end:%Y-%m-%d}, EXPIRED: renew it"
    return f"{end:%Y-%m-%d}, {(end - now).days} days" + (
        " LEFT: renew it" if _soon(end, now) else ""
    )


def to_renew(config: ServerConfig, now: datetime) -> Iterator[str]:
    """Yields one sentence, with what to do, for each certificate that is valid for less than `SOON`
    (the authority's: `AUTHORITY_SOON`).

    Raises:
        IdentityError: a certificate or the list of sites cannot be read.
    """
    own = read(Path(config.listen.certificate))
    if _soon(own.not_valid_after_utc, now):
        yield f"the server's certificate ends on {good_until(own, now)} (umbel-server renew)"
    authority = read(Path(config.listen.client_ca))
    if authority.not_valid_after_utc - now < AUTHORITY_SOON:
        until = good_until(authority, now)
        yield f"the authority's certificate ends on {until} (umbel-server renew --authority)"
    path = Path(config.sites)
    for site in load_sites(path).values():
        certificate = parse(site.certificate.encode(), path)
        if not site.revoked and _soon(certificate.not_valid_after_utc, now):
            until = good_until(certificate, now)
            yield f"the certificate of {site.name} ends on {until} (umbel-server sites renew)"


def _soon(end: datetime, now: datetime) -> bool:
    return end - now < SOON
