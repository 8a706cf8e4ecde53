"""`umbel-client init` and `join`: what a site makes, and what a kit may and may not do to it."""

import re
import resource
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.enrolling import Enrolling, give_command, read_kit

import umbel_client.cli.command
from umbel_client.site import joining
from umbel_client.site.config import load_config
from umbel_client.site.kit_certificate import Certificates, check_certificate
from umbel_client.site.pinned_roster import revoke_here
from umbel_common.errors import (
    ConfigError,
    IdentityError,
    ModelError,
    SignatureError,
    StorageError,
)
from umbel_common.trust.enrolment import SiteKit
from umbel_common.trust.identity import Identity
from umbel_host.files.keys import read_identity
from umbel_host.files.model_digest import folder_digest
from umbel_server.operator.authority import Authority, certificate_pem, new_authority, new_key

NOW = datetime.now(UTC)


@pytest.fixture
def clinics(tmp_path: Path) -> Enrolling:
    """An operator who admitted north, which has not joined yet."""
    made = Enrolling(tmp_path)
    made.ask("north")
    made.add("north")
    return made


def kit(clinics: Enrolling) -> SiteKit:
    return read_kit(clinics.folder / "north.kit.json").kit


def test_init_makes_keys_for_their_owner_a_request_and_a_configuration(clinics: Enrolling) -> None:
    folder = clinics.folder / "north"
    for name in ("identity.pem", "relay/key.pem"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    asked = clinics.request("north").request
    assert asked.identity == read_identity(folder / "identity.pem").public_key
    config = load_config(folder / "client.toml")
    assert (config.site, config.policy.models) == ("north", ())


def test_init_goes_on_with_an_identity_and_a_configuration_that_are_there(
    tmp_path: Path,
) -> None:
    give_command(umbel_client.cli.command.app, tmp_path, "keygen")
    key = read_identity(tmp_path / "identity.pem").public_key
    (tmp_path / "client.toml").write_text("# ours\n")
    words = ("init", "--site", "north", "--federation", "clinics")
    give_command(umbel_client.cli.command.app, tmp_path, *words)
    assert read_identity(tmp_path / "identity.pem").public_key == key
    assert (tmp_path / "client.toml").read_text() == "# ours\n"


def test_init_writes_what_it_is_given_into_a_configuration_that_loads(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder, labels = tmp_path / 'a "site"', ("flu", 'so "called"\nmax_epsilon = 9 #')
    notes = folder / "data" / "nötes.csv"
    notes.parent.mkdir(parents=True)
    notes.touch()
    words = ["init", "--site", "north", "--federation", "clinics", "--folder", str(folder)]
    words += ["--data", str(notes), "--public-size", "70", "--model", str(tiny_model)]
    for label in labels:
        words += ["--label", label]
    give_command(umbel_client.cli.command.app, tmp_path, *words)
    config = load_config(folder / "client.toml")
    assert (config.data.path, config.data.public_size) == (str(notes), 70)
    assert config.model.path == str(tiny_model)
    assert config.policy.models == (folder_digest(tiny_model).hex(),)
    assert (config.policy.labels, config.policy.max_epsilon) == (labels, 3.0)
    assert 'path = "data/nötes.csv"' in (folder / "client.toml").read_text()


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (("--data", "nowhere.csv"), ConfigError, "records is missing"),
        (("--model", "."), ModelError, "lacks a file"),
        (("--public-size", "9", "--config-there"), StorageError, "there already"),
        (("--label", "flu", "--label", "Flu"), AssertionError, "look alike"),
        (("--label", "flu"), AssertionError, "two labels or more"),
        (("--label", "flu", "--label", " "), AssertionError, "a label is empty"),
        (("--label", "flu", "--label", "\udcff"), ConfigError, "cannot hold"),
        (("--data", "/tmp/\udcff/.."), ConfigError, "records is missing"),
        (("--public-size", "0"), AssertionError, "not in the range"),
        (("--local", "--label", "flu"), AssertionError, "takes no other option"),
    ],
)
def test_init_makes_nothing_of_what_it_cannot_use(
    tmp_path: Path, words: tuple[str, ...], kind: type[Exception], said: str
) -> None:
    there = "--config-there" in words
    if there:
        (tmp_path / "client.toml").write_text("# ours\n")
    given = [word for word in words if word != "--config-there"]
    with pytest.raises(kind, match=said):
        give_command(
            umbel_client.cli.command.app,
            tmp_path,
            "init",
            "--site",
            "a",
            "--federation",
            "b",
            *given,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["client.toml"] * there


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """How large a file may grow from now on: a disk that is full."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [100, 200, 1000])
def test_init_on_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, limit: Callable[[int], None], size: int
) -> None:
    """The sizes stop it at the identity, at the relay's key, and at the configuration."""
    limit(size)
    words = ("init", "--site", "north", "--federation", "clinics", "--folder", "a/b")
    with pytest.raises((StorageError, IdentityError), match="cannot be written"):
        give_command(umbel_client.cli.command.app, tmp_path, *words)
    assert list(tmp_path.iterdir()) == []


def test_init_on_a_full_disk_keeps_what_was_there(
    tmp_path: Path, limit: Callable[[int], None]
) -> None:
    """It stops at the request, the last of the files."""
    give_command(umbel_client.cli.command.app, tmp_path, "keygen")
    (tmp_path / "client.toml").write_text("# ours\n")
    limit(600)
    with pytest.raises(StorageError):
        give_command(
            umbel_client.cli.command.app, tmp_path, "init", "--site", "a", "--federation", "b"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client.toml", "identity.pem"]


def test_join_writes_certificates_address_and_a_proposal_that_is_not_pinned(
    clinics: Enrolling,
) -> None:
    said = clinics.client("north", "join", "../north.kit.json")
    folder, given = clinics.folder / "north", kit(clinics)
    assert (folder / "relay/certificate.pem").read_text() == given.certificate
    assert (folder / "relay/server-ca.pem").read_text() == given.server_ca
    assert (folder / "north.kit.roster.json").read_text() == given.roster
    assert not (folder / "roster.json").exists()
    config = load_config(folder / "client.toml")
    assert config.relay is not None
    assert config.relay.server == "127.0.0.1:9443"
    assert "roster approve north.kit.roster.json" in said


def test_join_changes_one_value_of_the_configuration_and_keeps_it_closed(
    clinics: Enrolling,
) -> None:
    path = clinics.folder / "north" / "client.toml"
    before = path.read_text()
    path.chmod(0o600)
    clinics.client("north", "join", "../north.kit.json")
    assert path.read_text() == before.replace("server.invalid:9443", "127.0.0.1:9443")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_configuration_that_cannot_be_changed_stops_the_kit_before_anything_is_written(
    clinics: Enrolling,
) -> None:
    path = clinics.folder / "north" / "client.toml"
    path.write_text(path.read_text().replace("server = ", "server  =  "))
    before = clinics.files("north")
    with pytest.raises(ConfigError, match="address cannot be put"):
        clinics.client("north", "join", "../north.kit.json")
    assert clinics.files("north") == before


def refused(clinics: Enrolling, path: Path, kind: type[Exception], words: str) -> None:
    """A kit that is refused, and nothing of it kept."""
    before = clinics.files("north")
    with pytest.raises(kind, match=words):
        clinics.client("north", "join", str(path))
    assert clinics.files("north") == before


def pinning(clinics: Enrolling) -> None:
    """North joins and approves."""
    clinics.client("north", "join", "../north.kit.json")
    clinics.approve("north")


def test_an_operator_who_is_not_the_pinned_one_gives_no_kit(
    clinics: Enrolling, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinning(clinics)
    thief = Identity(b"t" * 32)
    forged = clinics.forged(msgspec.structs.replace(kit(clinics), server="evil:1"), thief)
    refused(clinics, forged, SignatureError, "not signed by the operator")
    monkeypatch.setattr(joining, "check_kit", lambda *_: None)
    clinics.client("north", "join", str(forged))
    assert 'server = "evil:1"' in (clinics.folder / "north/client.toml").read_text()


def test_an_operators_key_that_this_site_revoked_gives_no_kit(clinics: Enrolling) -> None:
    pinning(clinics)
    revoke_here(clinics.folder / "north" / "roster.json", clinics.key().public_key)
    refused(clinics, clinics.folder / "north.kit.json", IdentityError, "that is revoked")


@pytest.mark.parametrize(
    "change", [{"site": "south"}, {"federation": "others"}], ids=["site", "federation"]
)
@pytest.mark.parametrize("pinned", [False, True])
def test_a_kit_for_another_site_or_federation_is_refused(
    clinics: Enrolling, change: dict[str, str], pinned: bool
) -> None:
    if pinned:
        pinning(clinics)
    forged = clinics.forged(msgspec.structs.replace(kit(clinics), **change))
    refused(clinics, forged, IdentityError, "for another site")


def test_a_kit_whose_roster_is_of_another_federation_is_refused(clinics: Enrolling) -> None:
    roster = kit(clinics).roster.replace('"clinics"', '"others"')
    forged = clinics.forged(msgspec.structs.replace(kit(clinics), roster=roster))
    refused(clinics, forged, IdentityError, "roster is of another federation")


INJECTED = 'evil:1"\nsocket2 = "x'


def test_no_address_writes_a_second_line_into_the_configuration(
    clinics: Enrolling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator may send any kit; the rest of client.toml is this site's own law."""
    forged = clinics.forged(msgspec.structs.replace(kit(clinics), server=INJECTED))
    refused(clinics, forged, IdentityError, "a kit is malformed")
    lenient = read_kit(clinics.folder / "north.kit.json")
    lenient = msgspec.structs.replace(
        lenient, kit=msgspec.structs.replace(lenient.kit, server=INJECTED)
    )
    monkeypatch.setattr(joining, "kit_from_json", lambda *_: lenient)
    monkeypatch.setattr(joining, "check_kit", lambda *_: None)
    refused(clinics, forged, IdentityError, "could not connect to the address in a kit")
    monkeypatch.setattr(joining, "require_reachable", lambda _: None)
    clinics.client("north", "join", str(forged))
    assert '\nsocket2 = "x"\n' in (clinics.folder / "north/client.toml").read_text()


@pytest.mark.parametrize("pinned_as", ["forged.roster.json", "./forged.roster.json"])
def test_no_name_of_a_kit_leads_to_the_pinned_roster(
    clinics: Enrolling, monkeypatch: pytest.MonkeyPatch, pinned_as: str
) -> None:
    """Else a kit would be an approval."""
    path = clinics.folder / "north" / "client.toml"
    path.write_text(path.read_text().replace('"roster.json"', f'"{pinned_as}"'))
    forged = clinics.forged(kit(clinics))
    refused(clinics, forged, StorageError, "written over a file of this site")
    monkeypatch.setattr(
        joining, "_proposal", lambda *_: clinics.folder / "north" / "forged.roster.json"
    )
    clinics.client("north", "join", str(forged))
    assert (clinics.folder / "north" / "forged.roster.json").exists()


def test_a_renewed_kit_replaces_the_certificate_and_its_own_proposal(clinics: Enrolling) -> None:
    pinning(clinics)
    folder = clinics.folder / "north"
    former, pinned = (folder / "relay/certificate.pem").read_bytes(), folder / "roster.json"
    before = pinned.read_bytes()
    (clinics.folder / "north.kit.json").unlink()
    words = (str(folder / "north.request.json"), "--out", str(clinics.folder / "north.kit.json"))
    clinics.server("sites", "renew", *words)
    clinics.client("north", "join", "../north.kit.json")
    assert (folder / "relay/certificate.pem").read_bytes() != former
    assert pinned.read_bytes() == before


def test_a_new_relay_key_is_asked_for_with_the_same_identity(clinics: Enrolling) -> None:
    pinning(clinics)
    folder = clinics.folder / "north"
    for name in ("relay/key.pem", "north.request.json"):
        (folder / name).rename(folder / f"{name}.old")
    before = read_identity(folder / "identity.pem").public_key
    request = clinics.ask("north")
    assert clinics.request("north").request.identity == before
    clinics.server("sites", "renew", str(request), "--out", "../renewed.json")
    clinics.client("north", "join", "../renewed.json")
    # The kit of the former key is worth nothing now.
    refused(clinics, clinics.folder / "north.kit.json", IdentityError, "another relay key")


def test_a_relay_key_that_others_can_read_is_refused(clinics: Enrolling) -> None:
    (clinics.folder / "north/relay/key.pem").chmod(0o640)
    refused(clinics, clinics.folder / "north.kit.json", IdentityError, "open to other users")


def test_a_missing_relay_key_or_kit_is_named(clinics: Enrolling) -> None:
    refused(clinics, clinics.folder / "nowhere.json", IdentityError, "a file is missing")
    (clinics.folder / "north/relay/key.pem").unlink()
    refused(clinics, clinics.folder / "north.kit.json", IdentityError, "cannot be read")


def test_a_kit_that_cannot_be_read_is_named(clinics: Enrolling) -> None:
    refused(clinics, clinics.folder / "operator", IdentityError, "cannot be read")


class Issued:
    """Certificates as an operator, or somebody else, can make them."""

    def __init__(self) -> None:
        self._key, self.relay = new_key(), new_key()
        self.authority = Authority(
            new_authority("clinics", self._key, NOW - timedelta(days=400)), self._key
        )

    def kit(self, certificate: x509.Certificate, ca: x509.Certificate | None = None) -> SiteKit:
        return SiteKit(
            federation="clinics",
            site="north",
            server="host:1",
            server_ca=certificate_pem(ca or self.authority.certificate).decode(),
            certificate=certificate_pem(certificate).decode(),
            roster="{}",
        )

    def check(self, given: SiteKit) -> Certificates:
        return check_certificate(given, self.relay.public_key(), NOW, "kit.json")


@pytest.fixture
def issued() -> Issued:
    return Issued()


def test_a_certificate_for_this_relay_and_this_site_is_taken(issued: Issued) -> None:
    certificate = issued.authority.site("north", issued.relay.public_key(), NOW)
    taken = issued.check(issued.kit(certificate))
    assert taken.relay == certificate_pem(certificate)
    assert taken.server_ca == certificate_pem(issued.authority.certificate)


def wrong_certificates() -> dict[str, tuple[Callable[[Issued], SiteKit], str]]:
    def site(name: str = "north", age: int = 0) -> Callable[[Issued], SiteKit]:
        def make(issued: Issued) -> SiteKit:
            key = issued.relay.public_key()
            return issued.kit(issued.authority.site(name, key, NOW - timedelta(days=age)))

        return make

    def server(issued: Issued) -> SiteKit:
        hosts = ["north"]
        return issued.kit(issued.authority.server(issued.relay.public_key(), hosts, NOW))

    def for_servers(issued: Issued) -> SiteKit:
        name = x509.UniformResourceIdentifier("umbel:site:north")
        names, purpose = x509.SubjectAlternativeName([name]), ExtendedKeyUsageOID.SERVER_AUTH
        key = issued.relay.public_key()
        return issued.kit(issued.authority._issue("north", key, NOW, 90, names, purpose))

    def other_key(issued: Issued) -> SiteKit:
        return issued.kit(issued.authority.site("north", new_key().public_key(), NOW))

    def other_authority(issued: Issued) -> SiteKit:
        certificate = issued.authority.site("north", issued.relay.public_key(), NOW)
        return issued.kit(certificate, Issued().authority.certificate)

    def malformed(issued: Issued) -> SiteKit:
        return msgspec.structs.replace(site()(issued), certificate="-----BEGIN CERTIFICATE-----")

    def no_authority(issued: Issued) -> SiteKit:
        return msgspec.structs.replace(site()(issued), server_ca="")

    return {
        "another site": (site("south"), "is for another site"),
        "expired": (site(age=91), "not good at this time"),
        "not begun": (site(age=-1), "not good at this time"),
        "a server's": (server, "is for another site"),
        "for servers": (for_servers, "not for clients"),
        "another key": (other_key, "another relay key"),
        "another authority": (other_authority, "own authority"),
        "malformed": (malformed, "malformed"),
        "no authority": (no_authority, "malformed"),
    }


@pytest.mark.parametrize("kind", wrong_certificates())
def test_a_certificate_that_is_no_good_for_this_relay_is_refused_with_the_reason(
    issued: Issued, kind: str
) -> None:
    make, words = wrong_certificates()[kind]
    with pytest.raises(IdentityError, match=words) as caught:
        issued.check(make(issued))
    assert caught.value.file == "kit.json"
    assert caught.value.remedy


def test_words_around_a_certificate_are_not_kept(issued: Issued) -> None:
    """A kit could carry a private key, or a second authority, behind the certificate."""
    certificate = issued.authority.site("north", issued.relay.public_key(), NOW)
    second = certificate_pem(Issued().authority.certificate).decode()
    given = issued.kit(certificate)
    given = msgspec.structs.replace(given, server_ca=given.server_ca + second)
    assert len(re.findall(b"BEGIN", issued.check(given).server_ca)) == 1
