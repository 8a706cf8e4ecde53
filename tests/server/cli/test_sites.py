"""`umbel-server init`, `sites`, `roster`, `renew`: what the operator's files are after each."""

import json
import os
import shutil
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from support.enrolling import Enrolling, give_command, read_kit
from support.waiting import HANGING
from typer.testing import CliRunner

import umbel_server.cli.command
import umbel_server.cli.sites
import umbel_server.operator.files
from umbel_common.errors import ConfigError, IdentityError, StorageError
from umbel_common.trust.enrolment import check_request, request_to_json, sign_request
from umbel_common.trust.identity import Identity, Member, fingerprint
from umbel_common.trust.roster_file import document_from_json
from umbel_host.processes.supervisor import Command
from umbel_server.operator import admission
from umbel_server.operator.admitted_sites import load_sites, save_sites
from umbel_server.operator.authority import AUTHORITY_DAYS, certificate_pem, new_key
from umbel_server.operator.certificates import to_renew
from umbel_server.operator.config import ServerConfig, load_config
from umbel_server.operator.files import changing, load_authority


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of an operator and three sites, of which two were added."""
    made = Enrolling(tmp_path_factory.mktemp("enrolled"))
    for site in ("east", "north", "south"):
        made.ask(site)
    made.add("east")
    made.add("north")
    return made.folder


@pytest.fixture
def clinics(tmp_path: Path, enrolled: Path) -> Enrolling:
    """An operator, and requests of three sites of which two were added."""
    shutil.copytree(enrolled, tmp_path, dirs_exist_ok=True)
    return Enrolling(tmp_path, new=False)


def settings(clinics: Enrolling) -> ServerConfig:
    return load_config(clinics.operator / "server.toml")


def unchanged(clinics: Enrolling, kind: type[Exception], words: str, *command: str) -> None:
    """A command that is refused and changes nothing of the operator's."""
    before = clinics.files()
    with pytest.raises(kind, match=words):
        clinics.server(*command)
    assert clinics.files() == before


def test_init_makes_a_configuration_that_loads_and_an_empty_roster(tmp_path: Path) -> None:
    made = Enrolling(tmp_path)
    config = settings(made)
    assert config.listen.address == "0.0.0.0:9443"
    assert config.listen.public == "127.0.0.1:9443"
    assert made.roster().roster.members == ()
    load_authority(config)


def test_init_may_use_a_folder_that_is_there_and_empty(tmp_path: Path) -> None:
    (tmp_path / "operator").mkdir()
    Enrolling(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("ours")
    words = ("init", "--federation", "c", "--address", "h:1", "--folder", "full")
    with pytest.raises(StorageError, match="nothing is overwritten"):
        give_command(umbel_server.cli.command.app, tmp_path, *words)
    assert os.listdir(tmp_path / "full") == ["notes"]


@pytest.mark.parametrize(
    "address",
    [
        *("host", "host:0", "host:65536", ":1", 'h"x:1', "h\n:1", "::1:9443", "a/b:1"),
        # Nobody can connect to these.
        *(
            "0.0.0.0:9443",
            "[::]:9443",
            "[::ffff:0.0.0.0]:9443",
            "0:9443",
            "0.0:9443",
            "[ff02::1]:1",
        ),
        *("256.1.1.1:1", "10.1:1", "0x7f000001:1", "[1::2::3]:1", "[:]:1", "[1.2.3.4]x:1"),
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["init", "--federation", "clinics", "--address", address]
    done = CliRunner().invoke(umbel_server.cli.command.app, words)
    assert done.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_ipv6_address_goes_from_init_to_a_sites_configuration(tmp_path: Path) -> None:
    words = ("init", "--federation", "clinics", "--address", "[2001:db8::1]:9443")
    give_command(umbel_server.cli.command.app, tmp_path, *words)
    config = load_config(tmp_path / "operator" / "server.toml")
    assert config.listen.public == "[2001:db8::1]:9443"
    assert config.listen.address == "[::]:9443"
    certificate = x509.load_pem_x509_certificate(Path(config.listen.certificate).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name) for name in names.get_values_for_type(x509.IPAddress)] == ["2001:db8::1"]


def test_adding_a_site_changes_no_other(clinics: Enrolling) -> None:
    before = load_sites(clinics.operator / "sites.json")
    clinics.add("south")
    after = load_sites(clinics.operator / "sites.json")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"south"}
    assert [member.name for member in clinics.roster().roster.members] == ["east", "north", "south"]


def test_the_weight_is_the_operators_to_give(clinics: Enrolling) -> None:
    request, own = str(clinics.folder / "south/south.request.json"), clinics.request("south")
    words = ("--weight", "3", "--fingerprint", fingerprint(own.request.identity))
    clinics.server("sites", "add", request, "--out", "../kit.json", *words)
    assert clinics.roster().roster.member("south").weight == 3


def test_a_public_size_is_what_the_operator_was_told(clinics: Enrolling) -> None:
    before = clinics.roster().roster
    assert "public size" not in clinics.server("sites", "list")
    request, own = str(clinics.folder / "south/south.request.json"), clinics.request("south")
    words = ("--public-size", "5000", "--fingerprint", fingerprint(own.request.identity))
    clinics.server("sites", "add", request, "--out", "../kit.json", *words)
    assert clinics.roster().roster.member("south").public_size == 5000
    # The kit has the same roster, and so has what is exported.
    kit = document_from_json(read_kit(clinics.folder / "kit.json").kit.roster, "kit")
    assert kit.roster == clinics.roster().roster
    told = clinics.server("sites", "size", "east", "--public-size", "1200")
    assert clinics.roster().roster.digest().hex() in told
    sizes = {member.name: member.public_size for member in clinics.roster().roster.members}
    assert sizes == {"east": 1200, "north": None, "south": 5000}
    shown = clinics.server("sites", "list")
    assert "public size" in shown
    assert "5,000" in shown
    listed = json.loads(clinics.server("sites", "list", "--json"))
    assert {one["site"]: one["public_size"] for one in listed} == sizes
    assert before.members == tuple(
        Member(one.name, one.public_key) for one in clinics.roster().roster.members[:2]
    )


def test_a_public_size_of_nobody_or_the_same_changes_nothing(clinics: Enrolling) -> None:
    words = ("sites", "size", "nobody", "--public-size", "5")
    unchanged(clinics, IdentityError, "a site is not in the roster", *words)
    clinics.server("sites", "size", "east", "--public-size", "5")
    words = ("sites", "size", "east", "--public-size", "5")
    unchanged(clinics, IdentityError, "has this public size already", *words)


def test_a_kit_that_cannot_be_written_adds_nobody(clinics: Enrolling) -> None:
    own = fingerprint(clinics.request("south").request.identity)
    words = ("sites", "add", "../south/south.request.json", "--fingerprint", own, "--out")
    unchanged(clinics, StorageError, "folder of a new file", *words, "../nowhere/kit.json")
    unchanged(clinics, StorageError, "ever overwritten", *words, "../north.kit.json")
    # Before people compare fingerprints: nobody is asked here.
    unasked = ("sites", "add", "../south/south.request.json", "--out")
    unchanged(clinics, StorageError, "ever overwritten", *unasked, "../north.kit.json")


@pytest.mark.parametrize("fails", ["save_sites", "save_roster"])
def test_an_addition_that_fails_leaves_no_kit_and_can_be_given_again(
    clinics: Enrolling, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(umbel_server.cli.sites, fails, full)
        with pytest.raises(StorageError, match="full"):
            clinics.add("south")
    assert not (clinics.folder / "south.kit.json").exists()
    assert clinics.roster().roster.find("south") is None
    clinics.add("south")
    assert clinics.roster().roster.find("south") is not None


def test_what_another_command_added_while_people_compared_is_kept(
    clinics: Enrolling, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = umbel_server.cli.sites._check_fingerprint

    def slowly(*arguments: object) -> None:
        monkeypatch.setattr(umbel_server.cli.sites, "_check_fingerprint", compare)
        clinics.add("south")

    clinics.ask("west")
    monkeypatch.setattr(umbel_server.cli.sites, "_check_fingerprint", slowly)
    clinics.add("west")
    names = {member.name for member in clinics.roster().roster.members}
    assert names == set(load_sites(clinics.operator / "sites.json"))
    assert names == {"east", "north", "south", "west"}


def test_two_commands_change_the_files_one_after_the_other(clinics: Enrolling) -> None:
    entered = threading.Event()

    def other() -> None:
        with changing(settings(clinics)):
            entered.set()

    with changing(settings(clinics)):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(HANGING)
    assert entered.is_set()


def test_a_relay_key_is_one_sites_only(clinics: Enrolling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port tells sites apart by their relay keys."""
    key, requests = new_key(), []
    for site in ("twin-a", "twin-b"):
        signed = sign_request("clinics", site, Identity(os.urandom(32)), key)
        requests.append(clinics.folder / f"{site}.json")
        requests[-1].write_text(request_to_json(signed))
    clinics.add("twin-a", requests[0])
    before = clinics.files()
    with pytest.raises(IdentityError, match="relay key is another site's"):
        clinics.add("twin-b", requests[1])
    assert clinics.files() == before
    monkeypatch.setattr(admission, "_check_relay_key", lambda *_: None)
    clinics.add("twin-b", requests[1])


def test_the_operators_own_identity_is_no_sites(clinics: Enrolling) -> None:
    path = clinics.folder / "mirror.json"
    path.write_text(request_to_json(sign_request("clinics", "mirror", clinics.key(), new_key())))
    with pytest.raises(IdentityError, match="another party's"):
        clinics.add("mirror", path)


def test_a_request_for_another_federation_is_refused(clinics: Enrolling) -> None:
    path = clinics.folder / "other.json"
    identity = Identity(os.urandom(32))
    path.write_text(request_to_json(sign_request("others", "west", identity, new_key())))
    with pytest.raises(IdentityError, match="another federation"):
        clinics.add("west", path)


def aged(clinics: Enrolling, site: str, days: int) -> None:
    """The site's certificate as it would be if it had been issued so many days ago."""
    path = clinics.operator / "sites.json"
    known = load_sites(path)
    key = clinics.request(site)
    authority = load_authority(settings(clinics))
    public = check_request(key, "file")
    certificate = authority.site(site, public, datetime.now(UTC) - timedelta(days=days))
    pem = certificate_pem(certificate).decode()
    save_sites(path, {**known, site: msgspec.structs.replace(known[site], certificate=pem)})


def test_the_list_shows_key_serial_and_end_of_each_site(clinics: Enrolling) -> None:
    shown = clinics.server("sites", "list")
    for site, entry in load_sites(clinics.operator / "sites.json").items():
        certificate = x509.load_pem_x509_certificate(entry.certificate.encode())
        assert fingerprint(clinics.request(site).request.identity) in shown
        assert f"{certificate.serial_number:040x}" in shown
        assert f"{certificate.not_valid_after_utc:%Y-%m-%d}, 89 days" in shown
    assert "RENEW SOON" not in shown


def test_the_list_names_what_has_to_be_renewed(clinics: Enrolling) -> None:
    aged(clinics, "east", 59)
    assert "RENEW SOON" not in clinics.server("sites", "list")
    aged(clinics, "east", 61)
    shown = clinics.server("sites", "list")
    assert "28 days LEFT: renew it" in shown
    assert "RENEW SOON: the certificate of east" in shown
    aged(clinics, "east", 91)
    assert "EXPIRED: renew it" in clinics.server("sites", "list")
    clinics.server("sites", "renew", "../east/east.request.json", "--out", "../new.json")
    assert "RENEW SOON" not in clinics.server("sites", "list")


def test_a_revoked_sites_certificate_is_nobodys_worry(clinics: Enrolling) -> None:
    aged(clinics, "east", 80)
    clinics.server("sites", "revoke", "east", "--out", "../revocation.json")
    assert list(to_renew(settings(clinics), datetime.now(UTC))) == []


def test_the_servers_own_certificate_is_renewed_under_the_same_names(clinics: Enrolling) -> None:
    path = Path(settings(clinics).listen.certificate)
    later = datetime.now(UTC) + timedelta(days=340)
    assert any("the server's certificate" in line for line in to_renew(settings(clinics), later))
    before = x509.load_pem_x509_certificate(path.read_bytes())
    clinics.server("renew")
    after = x509.load_pem_x509_certificate(path.read_bytes())
    kind = x509.SubjectAlternativeName
    assert after.extensions.get_extension_for_class(
        kind
    ) == before.extensions.get_extension_for_class(kind)
    assert after.public_key() == before.public_key()
    assert after.serial_number != before.serial_number


def test_run_starts_both_processes(clinics: Enrolling, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def note(commands: Sequence[Command]) -> int:
        started.extend(command.name for command in commands)
        return 0

    monkeypatch.setattr(umbel_server.cli.command, "supervise", note)
    monkeypatch.setattr(umbel_server.cli.command, "configure", lambda: None)
    clinics.server("run")
    assert started == ["port", "rounds"]


def test_a_revoked_site_leaves_the_roster_when_the_next_is_added(clinics: Enrolling) -> None:
    """Until then nobody has to approve anything; after it, everybody still can."""
    for site in ("east", "north"):
        clinics.client(site, "join", f"../{site}.kit.json")
        clinics.approve(site)
    pinned = clinics.roster().roster.digest()
    clinics.server("sites", "revoke", "east", "--out", "../revocation.json")
    assert clinics.roster().roster.digest() == pinned
    clinics.client("north", "roster", "revoke", "../revocation.json")
    clinics.add("south")
    roster = clinics.roster()
    assert [member.name for member in roster.roster.members] == ["north", "south"]
    assert [member.name for member in roster.departed] == ["east"]
    clinics.approve("north")


def test_a_revoked_identity_does_not_come_back_after_it_left(clinics: Enrolling) -> None:
    clinics.server("sites", "revoke", "east", "--out", "../revocation.json")
    clinics.add("south")
    assert clinics.roster().roster.find("east") is None
    with pytest.raises(IdentityError, match="is revoked"):
        clinics.add("east", out="again.json")


def test_a_site_whose_identity_was_lost_comes_back_under_its_name(clinics: Enrolling) -> None:
    folder = clinics.folder / "east"
    stolen = clinics.request("east").request
    with pytest.raises(IdentityError, match="already in the roster"):
        clinics.add("east", out="again.json")
    clinics.server("sites", "revoke", "east", "--out", "../revocation.json")
    with pytest.raises(IdentityError, match="is revoked"):
        clinics.add("east", out="again.json")
    for name in ("identity.pem", "relay/key.pem", "east.request.json"):
        (folder / name).unlink()
    clinics.ask("east")
    clinics.add("east", out="again.json")
    entry = load_sites(clinics.operator / "sites.json")["east"]
    assert not entry.revoked
    member = clinics.roster().roster.member("east")
    assert member.public_key == clinics.request("east").request.identity != stolen.identity
    assert clinics.roster().departed == ()


def test_a_revocation_is_made_once_and_only_of_who_is_there(clinics: Enrolling) -> None:
    revoke = ("sites", "revoke")
    unchanged(clinics, IdentityError, "no site of this name", *revoke, "west", "--out", "../r.json")
    clinics.server(*revoke, "east", "--out", "../r.json")
    unchanged(clinics, IdentityError, "revoked already", *revoke, "east", "--out", "../r2.json")


def test_a_revocation_that_was_cut_short_is_finished_by_the_same_command(
    clinics: Enrolling, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    words = ("sites", "revoke", "east", "--out")
    with monkeypatch.context() as patched:
        patched.setattr(umbel_server.cli.sites, "save_roster", killed)
        with pytest.raises(AssertionError):
            clinics.server(*words, "../one.json")
    # The port was told first.
    assert load_sites(clinics.operator / "sites.json")["east"].revoked
    assert clinics.roster().revocations == ()
    clinics.server(*words, "../two.json")
    assert len(clinics.roster().revocations) == 1


def test_a_renewal_is_for_the_same_identity_only(
    clinics: Enrolling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever knows a site's name cannot take its place at the port."""
    thief = clinics.folder / "thief.json"
    forged = sign_request("clinics", "east", Identity(os.urandom(32)), new_key())
    thief.write_text(request_to_json(forged))
    words = ("sites", "renew", str(thief), "--out", "../renewed.json")
    unchanged(clinics, IdentityError, "of this name and identity", *words)
    former = load_sites(clinics.operator / "sites.json")["east"]
    monkeypatch.setattr(umbel_server.cli.sites, "check_renewal", lambda *_: None)
    clinics.server(*words)
    assert load_sites(clinics.operator / "sites.json")["east"].relay_key != former.relay_key


def test_a_renewed_kit_brings_the_roster_of_today(clinics: Enrolling) -> None:
    clinics.add("south")
    clinics.server("sites", "renew", "../east/east.request.json", "--out", "../new.json")
    assert '"south"' in read_kit(clinics.folder / "new.json").kit.roster


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_an_authoritys_key_that_others_can_read_is_not_used(clinics: Enrolling, mode: int) -> None:
    (clinics.operator / "ca" / "key.pem").chmod(mode)
    with pytest.raises(IdentityError, match="open to other users"):
        clinics.add("south")


def test_an_authoritys_key_and_certificate_belong_together(clinics: Enrolling) -> None:
    tls, ca = clinics.operator / "tls" / "key.pem", clinics.operator / "ca" / "key.pem"
    ca.write_bytes(tls.read_bytes())
    with pytest.raises(IdentityError, match="do not belong together"):
        clinics.add("south")


@pytest.mark.parametrize("name", ["ca/key.pem", "ca/certificate.pem", "identity.pem"])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_damaged_folder_is_named_and_adds_nobody(
    clinics: Enrolling, name: str, damage: str
) -> None:
    path = clinics.operator / name
    path.unlink() if damage == "missing" else path.write_bytes(b"")
    with pytest.raises(IdentityError) as caught:
        clinics.add("south")
    assert Path(name).name in str(caught.value.file)
    assert not (clinics.folder / "south.kit.json").exists()
    assert clinics.roster().roster.find("south") is None


def test_a_list_of_sites_that_is_malformed_is_named(clinics: Enrolling) -> None:
    (clinics.operator / "sites.json").write_text('{"sites": [{"name": "x"}]}')
    with pytest.raises(IdentityError, match="list of sites is malformed"):
        clinics.server("sites", "list")


def test_an_operators_folder_is_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(umbel_server.operator.files, "create", full)
    with pytest.raises(StorageError, match="cannot be written"):
        Enrolling(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_authoritys_own_certificate_is_renewed_and_vouches_for_the_same(
    clinics: Enrolling,
) -> None:
    config, now = settings(clinics), datetime.now(UTC)
    path = Path(config.listen.client_ca)
    aged = load_authority(config).renewed("clinics", now - timedelta(days=AUTHORITY_DAYS - 179))
    former = aged.certificate
    path.write_bytes(certificate_pem(former))
    assert any("renew --authority" in line for line in to_renew(config, now))
    assert "authority  20" in clinics.server("renew", "--authority")
    renewed = x509.load_pem_x509_certificate(path.read_bytes())
    assert renewed.not_valid_after_utc > former.not_valid_after_utc + timedelta(days=3000)
    assert list(to_renew(config, now)) == []
    # Old and new vouch for each other's: nobody has to change everything at once.
    clinics.server("renew")
    new = x509.load_pem_x509_certificate(Path(config.listen.certificate).read_bytes())
    old = load_sites(clinics.operator / "sites.json")["east"].certificate
    for certificate in (new, x509.load_pem_x509_certificate(old.encode())):
        certificate.verify_directly_issued_by(former)
        certificate.verify_directly_issued_by(renewed)
    clinics.server("sites", "renew", "../east/east.request.json", "--out", "../new.json")
    kit = read_kit(clinics.folder / "new.json").kit
    assert x509.load_pem_x509_certificate(kit.server_ca.encode()) == renewed


def test_another_authority_takes_the_place_of_one_whose_key_is_known_to_others(
    clinics: Enrolling,
) -> None:
    """As docs/operator.md says."""
    clinics.client("east", "join", "../east.kit.json")
    clinics.server(
        "init", "--federation", "clinics", "--address", "127.0.0.1:9443", "--folder", "../other"
    )
    for name in ("ca", "tls"):
        (clinics.operator / name).rename(clinics.folder / f"former-{name}")
        (clinics.folder / "other" / name).rename(clinics.operator / name)
    clinics.server("sites", "renew", "../east/east.request.json", "--out", "../new.json")
    clinics.client("east", "join", "../new.json")
    authority = load_authority(settings(clinics)).certificate
    for path in (
        clinics.folder / "east" / "relay" / "certificate.pem",
        Path(settings(clinics).listen.certificate),
    ):
        x509.load_pem_x509_certificate(path.read_bytes()).verify_directly_issued_by(authority)
    former = x509.load_pem_x509_certificate(
        (clinics.folder / "former-ca" / "certificate.pem").read_bytes()
    )
    assert former.public_key() != authority.public_key()


def test_several_requests_make_one_roster_and_a_kit_for_each(tmp_path: Path) -> None:
    made = Enrolling(tmp_path)
    names = ("east", "north", "south")
    prints = []
    for site in names:
        made.ask(site)
        prints += ["--fingerprint", fingerprint(made.request(site).request.identity)]
    requests = [f"../{site}/{site}.request.json" for site in names]
    made.server("sites", "add", *requests, "--out", "kits", *prints)
    assert [member.name for member in made.roster().roster.members] == list(names)
    for site in names:
        kit = made.operator / "kits" / f"{site}.kit.json"
        made.client(site, "join", str(kit))
        proposed = made.folder / site / f"{site}.kit.roster.json"
        assert document_from_json(proposed.read_text(), proposed) == made.roster()
    listed = json.loads(made.server("sites", "list", "--json"))
    assert [(one["site"], one["in_roster"], one["revoked"]) for one in listed] == [
        (site, True, False) for site in names
    ]
    assert all(one["certificate_ends"].endswith("Z") for one in listed)


@pytest.mark.parametrize("fault", ["one twice", "one that is in", "one fingerprint short"])
def test_of_several_requests_all_are_added_or_none(clinics: Enrolling, fault: str) -> None:
    own = fingerprint(clinics.request("south").request.identity)
    words = {
        "one twice": ("../south/south.request.json", "../south/south.request.json"),
        "one that is in": ("../south/south.request.json", "../north/north.request.json"),
        "one fingerprint short": ("../south/south.request.json", "../west/west.request.json"),
    }[fault]
    if "west" in words[1]:
        clinics.ask("west")
    said = {
        "one twice": "two requests are of one site",
        "one that is in": "already in the roster",
        "one fingerprint short": "not from the site",
    }[fault]
    command = ("sites", "add", *words, "--out", "kits", "--fingerprint", own)
    unchanged(clinics, IdentityError, said, *command)
    assert not (clinics.operator / "kits").exists()


def test_no_relay_is_admitted_where_one_of_the_kits_cannot_be_written(clinics: Enrolling) -> None:
    prints = []
    for site in ("west", "south"):
        if site == "west":
            clinics.ask(site)
        prints += ["--fingerprint", fingerprint(clinics.request(site).request.identity)]
    (clinics.operator / "kits").mkdir()
    (clinics.operator / "kits" / "south.kit.json").touch()
    requests = [f"../{site}/{site}.request.json" for site in ("west", "south")]
    command = ("sites", "add", *requests, "--out", "kits", *prints)
    unchanged(clinics, StorageError, "ever overwritten", *command)


@pytest.mark.parametrize("listen", ["0.0.0.0:9443", "[::]:9443"])
def test_no_kit_names_an_address_that_nobody_can_connect_to(
    clinics: Enrolling, listen: str
) -> None:
    path = clinics.operator / "server.toml"
    text = path.read_text().replace('public = "127.0.0.1:9443"\n', "")
    path.write_text(text.replace('address = "0.0.0.0:9443"', f'address = "{listen}"'))
    own = fingerprint(clinics.request("south").request.identity)
    words = ("sites", "add", "../south/south.request.json", "--fingerprint", own)
    unchanged(clinics, ConfigError, "which address sites connect to", *words)
    wrong = {"public": ("[listen]", '[listen]\npublic = "0.0.0.0:1"')}
    wrong["address"] = ('address = "0.0.0.0:9443"', 'address = "256.1.1.1:1"')
    for field, (was, becomes) in wrong.items():
        path.write_text(text.replace(was, becomes, 1))
        with pytest.raises(ConfigError, match=rf"listen\.{field}"):
            clinics.server("sites", "list")


def test_an_operator_without_an_adapter_lists_none_for_programs(clinics: Enrolling) -> None:
    (clinics.operator / "state").mkdir(exist_ok=True)
    assert json.loads(clinics.server("adapters", "list", "--json")) == []
