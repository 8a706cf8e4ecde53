"""The operator's certificates: what is in them, and what TLS 1.3 makes of them, right and wrong."""

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from umbel_server.operator.authority import (
    Authority,
    certificate_pem,
    key_pem,
    new_authority,
    new_key,
)
from umbel_server.port.listener import tls_context

NOW = datetime.now(UTC)
HOST = "umbel.example.org"


def authority(now: datetime = NOW) -> Authority:
    key = new_key()
    return Authority(new_authority("clinics", key, now), key)


def purposes(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def days(certificate: x509.Certificate) -> int:
    return (certificate.not_valid_after_utc - NOW + timedelta(hours=1)).days


def test_a_sites_certificate_names_it_and_is_for_clients_only() -> None:
    issuer = authority()
    certificate = issuer.site("north", new_key().public_key(), NOW)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["umbel:site:north"]
    (common,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert common.value == "north"
    assert purposes(certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert days(certificate) == 90
    certificate.verify_directly_issued_by(issuer.certificate)


def test_the_servers_certificate_names_its_hosts_and_is_for_servers_only() -> None:
    hosts = [HOST, "192.0.2.7", "2001:db8::1"]
    certificate = authority().server(new_key().public_key(), hosts, NOW)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == hosts
    assert names.get_values_for_type(x509.DNSName) == [HOST]
    assert purposes(certificate) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert days(certificate) == 365


def test_every_certificate_is_p384_with_sha384_and_good_a_little_before_it_was_made() -> None:
    issuer = authority()
    made = [
        issuer.certificate,
        issuer.site("north", new_key().public_key(), NOW),
        issuer.server(new_key().public_key(), [HOST], NOW),
    ]
    for certificate in made:
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP384R1)
        assert isinstance(certificate.signature_hash_algorithm, hashes.SHA384)
        assert timedelta() < NOW - certificate.not_valid_before_utc <= timedelta(hours=1, seconds=1)
    assert len({certificate.serial_number for certificate in made}) == 3


def test_only_the_authority_may_issue_and_only_directly() -> None:
    issuer = authority()
    own = issuer.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (own.critical, own.value.ca, own.value.path_length) == (True, True, 0)
    assert days(issuer.certificate) == 3650
    site = issuer.site("north", new_key().public_key(), NOW)
    assert not site.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not site.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_the_longest_name_of_a_site_fits() -> None:
    name = "n" * 64
    certificate = authority().site(name, new_key().public_key(), NOW)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"umbel:site:{name}"]


@dataclass
class Parties:
    """A server and a client with their files, as TLS contexts: the server's is the real one."""

    folder: Path

    def server(self, issuer: Authority, client_ca: Authority | None = None) -> ssl.SSLContext:
        key = new_key()
        self._write("server.pem", certificate_pem(issuer.server(key.public_key(), [HOST], NOW)))
        self._write("server-key.pem", key_pem(key))
        self._write("ca.pem", certificate_pem((client_ca or issuer).certificate))
        paths = (self.folder / name for name in ("server.pem", "server-key.pem", "ca.pem"))
        return tls_context(*paths)

    def client(self, server_ca: Authority, certificate: bytes, key: bytes) -> ssl.SSLContext:
        self._write("client.pem", certificate)
        self._write("client-key.pem", key)
        context = self.anonymous(server_ca)
        context.load_cert_chain(self.folder / "client.pem", self.folder / "client-key.pem")
        return context

    def site(
        self, issuer: Authority, server_ca: Authority | None = None, now: datetime = NOW
    ) -> ssl.SSLContext:
        key = new_key()
        certificate = certificate_pem(issuer.site("north", key.public_key(), now))
        return self.client(server_ca or issuer, certificate, key_pem(key))

    def anonymous(self, server_ca: Authority) -> ssl.SSLContext:
        pem = certificate_pem(server_ca.certificate).decode()
        return ssl.create_default_context(cadata=pem)

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.write_bytes(data)
        path.chmod(0o600)


@pytest.fixture
def parties(tmp_path: Path) -> Parties:
    return Parties(tmp_path)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = HOST) -> str | None:
    """A handshake in memory and a byte from the client; returns the version of TLS.

    Raises:
        ssl.SSLError: one of them does not accept the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=host)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (near, far):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    near.write(b"x")
    assert far.read(1) == b"x"
    return far.version()


def test_a_site_and_its_server_speak_tls_1_3(parties: Parties) -> None:
    issuer = authority()
    assert handshake(parties.server(issuer), parties.site(issuer)) == "TLSv1.3"


def test_nobody_is_let_in_without_a_certificate(parties: Parties) -> None:
    issuer = authority()
    server = parties.server(issuer)
    with pytest.raises(ssl.SSLError):
        handshake(server, parties.anonymous(issuer))
    server.verify_mode = ssl.CERT_NONE
    handshake(server, parties.anonymous(issuer))


def test_a_site_of_another_authority_is_not_let_in(parties: Parties) -> None:
    """Even one of the same name: whose signature is below it is what counts."""
    issuer, other = authority(), authority()
    server = parties.server(issuer)
    with pytest.raises(ssl.SSLError):
        handshake(server, parties.site(other, server_ca=issuer))
    handshake(parties.server(issuer, client_ca=other), parties.site(other, server_ca=issuer))


def test_a_server_of_another_authority_is_not_believed(parties: Parties) -> None:
    issuer, other = authority(), authority()
    with pytest.raises(ssl.SSLError):
        handshake(parties.server(other, client_ca=issuer), parties.site(issuer))


def test_a_server_under_another_name_is_not_believed(parties: Parties) -> None:
    issuer = authority()
    with pytest.raises(ssl.SSLError):
        handshake(parties.server(issuer), parties.site(issuer), "elsewhere.example.org")


@pytest.mark.parametrize("age", [timedelta(days=91), timedelta(days=-1)])
def test_a_certificate_that_is_over_or_not_begun_is_not_let_in(
    parties: Parties, age: timedelta
) -> None:
    issuer = authority(NOW - timedelta(days=200))
    server = parties.server(issuer)
    with pytest.raises(ssl.SSLError):
        handshake(server, parties.site(issuer, now=NOW - age))
    handshake(server, parties.site(issuer, now=NOW - timedelta(days=89)))


def test_a_site_can_make_no_certificate_for_another(parties: Parties) -> None:
    """What a site signs with its own relay key, its certificate under it, opens nothing."""
    issuer, key = authority(), new_key()
    own = issuer.site("north", key.public_key(), NOW)
    stolen = new_key()
    forged = Authority(own, key).site("south", stolen.public_key(), NOW)
    chain = certificate_pem(forged) + certificate_pem(own)
    server = parties.server(issuer)
    with pytest.raises(ssl.SSLError):
        handshake(server, parties.client(issuer, chain, key_pem(stolen)))


def test_a_client_of_tls_1_2_is_not_let_in(parties: Parties) -> None:
    issuer = authority()
    client = parties.site(issuer)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(parties.server(issuer), client)
