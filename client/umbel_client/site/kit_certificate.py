"""Checks a kit's certificate for this site's relay, before anything of the kit is kept."""

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from umbel_common.errors import IdentityError
from umbel_common.trust.enrolment import SiteKit


@dataclass(frozen=True)
class Certificates:
    """The certificates that the relay connects with, PEM, and nothing else of the kit's texts."""

    relay: bytes
    server_ca: bytes


def check_certificate(
    kit: SiteKit, key: ec.EllipticCurvePublicKey, now: datetime, file: object
) -> Certificates:
    """The certificates of a kit.

    Args:
        key: public key of this site's relay.
        now: the time, with its time zone.
        file: where the kit came from, for errors.

    Raises:
        IdentityError: a certificate is malformed; the relay's is for another key or another site,
            not from the kit's authority, not for clients, or not good at this time.
    """
    relay = _parse(kit.certificate, "certificate", file)
    authority = _parse(kit.server_ca, "server_ca", file)
    if relay.public_key() != key:
        raise IdentityError(
            "a kit's certificate is for another relay key than this site's",
            file=file,
            field="certificate",
            remedy="send the operator the request that was made with this key",
        )
    try:
        relay.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise _unfit("is not from the kit's own authority", file) from None
    extensions = _extensions(relay, file)
    if f"umbel:site:{kit.site}" not in extensions.uris:
        found = ", ".join(extensions.uris) or "none"
        raise _unfit("is for another site", file, found, f"umbel:site:{kit.site}")
    if ExtendedKeyUsageOID.CLIENT_AUTH not in extensions.purposes:
        raise _unfit("is not for clients", file)
    first, last = relay.not_valid_before_utc, relay.not_valid_after_utc
    if not first <= now <= last:
        raise _unfit(
            "is not good at this time",
            file,
            f"{now:%Y-%m-%d %H:%M} UTC",
            f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC",
            "see that this machine's clock is right; else ask the operator for a new kit",
        )
    return Certificates(relay.public_bytes(Encoding.PEM), authority.public_bytes(Encoding.PEM))


@dataclass(frozen=True)
class _Extensions:
    uris: list[str]
    purposes: list[x509.ObjectIdentifier]


def _extensions(certificate: x509.Certificate, file: object) -> _Extensions:
    try:
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise _unfit("names no site or no purpose", file) from None
    return _Extensions(names.get_values_for_type(x509.UniformResourceIdentifier), list(purposes))


def _parse(pem: str, field: str, file: object) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        raise IdentityError(
            "a kit's certificate is malformed",
            file=file,
            field=field,
            accepted="an X.509 certificate, PEM",
            remedy="ask the operator for the kit again",
        ) from None


def _unfit(
    why: str,
    file: object,
    found: str | None = None,
    accepted: str | None = None,
    remedy: str = "ask the operator for a new kit",
) -> IdentityError:
    return IdentityError(
        f"a kit's certificate {why}",
        file=file,
        field="certificate",
        found=found,
        accepted=accepted,
        remedy=remedy,
    )
