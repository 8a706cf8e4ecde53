"""The operator's small certificate authority: it vouches for TLS connections, and nothing else.

A site is identified by its own identity key (ADR 10); a certificate only lets its relay reach the
port. The keys are ECDSA P-384. A relay uses the same key to sign its requests to Flower.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
SITE_DAYS = 90
SITE_URI = "umbel:site:"
"""Beginning of the name by which a certificate names a site."""
_BACKDATED = timedelta(hours=1)
"""How long before its issue a certificate is already valid, because clocks differ."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """Generates a private key from the operating system's randomness."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PKCS#8 PEM, unencrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def new_authority(
    federation: str, key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.Certificate:
    """Returns a self-signed certificate, for an authority that cannot sign another authority.

    A later certificate for the same federation and key can replace the former one: both verify the
    same certificates.
    """
    name = _name(f"Umbel authority of {federation}")
    return (
        _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


class Authority:
    """Issues certificates; holds the authority's private key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    def renewed(self, federation: str, now: datetime) -> "Authority":
        """Returns the same authority with a certificate for another `AUTHORITY_DAYS`."""
        return Authority(new_authority(federation, self._key, now), self._key)

    def server(
        self, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], now: datetime
    ) -> x509.Certificate:
        """Issues a certificate for the port, under these host names and IP addresses."""
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        return self._issue(hosts[0], key, now, SERVER_DAYS, names, ExtendedKeyUsageOID.SERVER_AUTH)

    def site(self, name: str, key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
        """Issues a certificate for a site's relay."""
        uri = x509.UniformResourceIdentifier(f"{SITE_URI}{name}")
        names = x509.SubjectAlternativeName([uri])
        return self._issue(name, key, now, SITE_DAYS, names, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        now: datetime,
        days: int,
        names: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
    ) -> x509.Certificate:
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            _builder(_name(name), self.certificate.subject, key, now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .add_extension(names, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own),
                critical=False,
            )
            .sign(self._key, hashes.SHA384())
        )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    # The field takes 64 characters; the alternative names contain the full name of a site.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
