"""An operator and three sites come together by their commands; and what a liar gets from it."""

import json
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from support import warm_python

from umbel_common.canonical import encode
from umbel_common.trust.enrolment import (
    SignedRequest,
    kit_from_json,
    kit_to_json,
    request_from_json,
    request_to_json,
    sign_kit,
    sign_request,
)
from umbel_common.trust.identity import Identity, fingerprint
from umbel_common.trust.roster_file import document_from_json
from umbel_host.files.keys import read_identity
from umbel_server.operator.admitted_sites import load_sites
from umbel_server.operator.authority import new_key

SITES = ("east", "north", "south")


def run(folder: Path, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    module = {"umbel-server": "umbel_server.cli", "umbel-client": "umbel_client.cli"}[command]
    return warm_python.run(
        "-m", module, *arguments, cwd=folder, env={**os.environ, "COLUMNS": "120"}
    )


def good(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


class Ceremony:
    """The folders of the parties, and the commands that people give in them."""

    def __init__(self, folder: Path, former: "Ceremony | None" = None) -> None:
        """Args:
        former: what its parties made is theirs here too, instead of being made again.
        """
        self.folder = folder
        self.operator = folder / "operator"
        self.former = former
        if former is not None:
            shutil.copytree(former.operator, self.operator)
            self.said = former.said
            return
        arguments = ("--federation", "clinics", "--address", "127.0.0.1:9443")
        self.said = good(run(folder, "umbel-server", "init", *arguments))

    def request(self, site: str) -> Path:
        folder = self.folder / site
        if self.former is not None:
            shutil.copytree(self.former.folder / site, folder)
        else:
            folder.mkdir()
            good(run(folder, "umbel-client", "init", "--site", site, "--federation", "clinics"))
        return folder / f"{site}.request.json"

    def identity(self, site: str) -> Identity:
        return read_identity(self.folder / site / "identity.pem")

    def add(self, site: str, request: Path, **options: str) -> "subprocess.CompletedProcess[str]":
        key = fingerprint(request_from_json(request.read_text(), request).request.identity)
        return run(
            self.operator,
            "umbel-server",
            "sites",
            "add",
            str(request),
            "--out",
            str(self.folder / f"{site}.kit.json"),
            "--fingerprint",
            options.get("expected", key),
        )

    def join(self, site: str, kit: Path | None = None) -> "subprocess.CompletedProcess[str]":
        kit = kit or self.folder / f"{site}.kit.json"
        return run(self.folder / site, "umbel-client", "join", str(kit))

    def state(self) -> dict[str, bytes]:
        """Every file of the operator, to see that nothing changed."""
        paths = (path for path in self.operator.rglob("*") if path.is_file())
        return {str(path.relative_to(self.operator)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Ceremony:
    """An operator, and two sites that have asked to take part."""
    made = Ceremony(tmp_path_factory.mktemp("begun"))
    for site in ("east", "north"):
        made.request(site)
    return made


@pytest.fixture
def ceremony(begun: Ceremony, tmp_path: Path) -> Ceremony:
    """A copy of the operator, which a test may change; `request` copies a site that asks."""
    return Ceremony(tmp_path, begun)


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Ceremony:
    """Three sites that joined and approved the roster with all three."""
    made = Ceremony(tmp_path_factory.mktemp("ceremony"))
    for site in SITES:
        good(made.add(site, made.request(site)))
        good(made.join(site))
    good(run(made.operator, "umbel-server", "roster", "export", "--out", "../roster.json"))
    text = (made.folder / "roster.json").read_text()
    digest = document_from_json(text, "roster.json").roster.digest().hex()
    for site in SITES:
        arguments = ("roster", "approve", "../roster.json", "--digest", digest)
        good(run(made.folder / site, "umbel-client", *arguments))
    return made


def test_everybody_pins_one_roster_and_no_private_key_travelled(assembled: Ceremony) -> None:
    pinned = {(assembled.folder / site / "roster.json").read_text() for site in SITES}
    assert len(pinned) == 1
    document = document_from_json(pinned.pop(), "roster.json")
    assert [member.name for member in document.roster.members] == list(SITES)
    for path in (*assembled.folder.glob("*.json"), *assembled.folder.glob("*/*.json")):
        assert "PRIVATE KEY" not in path.read_text()
        for site in SITES:
            assert assembled.identity(site).seed().hex() not in path.read_text()


def test_private_keys_are_closed_to_others(assembled: Ceremony) -> None:
    keys = [
        *assembled.operator.rglob("key.pem"),
        assembled.operator / "identity.pem",
        *(assembled.folder / site / name for site in SITES for name in ("identity.pem",)),
        *assembled.folder.glob("*/relay/key.pem"),
    ]
    assert len(keys) == 9
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}


def test_the_operator_sees_who_takes_part_and_for_how_long(assembled: Ceremony) -> None:
    listed = good(run(assembled.operator, "umbel-server", "sites", "list"))
    for site in SITES:
        assert fingerprint(assembled.identity(site).public_key) in listed
    assert listed.count("89 days") == 3
    operator = read_identity(assembled.operator / "identity.pem")
    assert fingerprint(operator.public_key) in assembled.said


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A TLS handshake in memory, and one byte each way.

    Raises:
        ssl.SSLError: one side does not accept the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1"),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    ends[0].write(b"x")
    assert ends[1].read(1) == b"x"


def contexts(ceremony: Ceremony, site: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    operator, relay = ceremony.operator, ceremony.folder / site / "relay"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(operator / "tls/certificate.pem", operator / "tls/key.pem")
    server.load_verify_locations(operator / "ca/certificate.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(relay / "server-ca.pem"))
    client.load_cert_chain(relay / "certificate.pem", relay / "key.pem")
    return server, client


def test_the_certificates_open_a_connection_and_only_in_their_own_direction(
    assembled: Ceremony,
) -> None:
    server, client = contexts(assembled, "north")
    handshake(server, client)
    relay, operator = assembled.folder / "north" / "relay", assembled.operator
    # A site's certificate makes no server, and the server's opens no connection.
    server.load_cert_chain(relay / "certificate.pem", relay / "key.pem")
    with pytest.raises(ssl.SSLError):
        handshake(server, client)
    server, client = contexts(assembled, "north")
    client.load_cert_chain(operator / "tls/certificate.pem", operator / "tls/key.pem")
    with pytest.raises(ssl.SSLError):
        handshake(server, client)


def test_a_certificate_is_renewed_without_a_new_identity(assembled: Ceremony) -> None:
    site = assembled.folder / "north"
    before = (site / "relay/certificate.pem").read_bytes()
    arguments = (str(site / "north.request.json"), "--out", "../renewed.json")
    good(run(assembled.operator, "umbel-server", "sites", "renew", *arguments))
    good(assembled.join("north", assembled.folder / "renewed.json"))
    after = (site / "relay/certificate.pem").read_bytes()
    serials = {x509.load_pem_x509_certificate(pem).serial_number for pem in (before, after)}
    assert len(serials) == 2
    handshake(*contexts(assembled, "north"))
    good(run(assembled.operator, "umbel-server", "renew"))
    handshake(*contexts(assembled, "north"))


def test_a_revoked_site_is_turned_away_by_operator_and_sites(assembled: Ceremony) -> None:
    arguments = ("sites", "revoke", "south", "--out", "../revocation.json")
    good(run(assembled.operator, "umbel-server", *arguments))
    assert load_sites(assembled.operator / "sites.json")["south"].revoked
    assert "REVOKED" in good(run(assembled.operator, "umbel-server", "sites", "list"))
    good(run(assembled.folder / "east", "umbel-client", "roster", "revoke", "../revocation.json"))
    assert "REVOKED" in good(run(assembled.folder / "east", "umbel-client", "roster", "show"))
    request = str(assembled.folder / "south" / "south.request.json")
    again = run(
        assembled.operator, "umbel-server", "sites", "renew", request, "--out", "../again.json"
    )
    assert again.returncode == 20
    assert "revoked for good" in again.stderr


def changed(request: Path, **changes: str) -> Path:
    document = json.loads(request.read_text()) | changes
    path = request.with_name("changed.json")
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("field", ["site", "identity", "relay_key"])
def test_a_request_that_was_changed_on_its_way_is_refused(ceremony: Ceremony, field: str) -> None:
    request, other = ceremony.request("north"), ceremony.request("east")
    forged = changed(request, **{field: json.loads(other.read_text())[field]})
    before = ceremony.state()
    done = ceremony.add("north", forged)
    assert done.returncode == 21
    assert "not signed by the keys" in done.stderr
    assert ceremony.state() == before


def test_nobody_asks_with_a_relay_key_that_is_anothers(ceremony: Ceremony) -> None:
    ceremony.request("north")
    request = request_from_json((ceremony.folder / "north/north.request.json").read_text(), "")
    thief = Identity.generate(os.urandom)
    own = sign_request("clinics", "thief", thief, new_key()).request
    claimed = msgspec.structs.replace(own, relay_key=request.request.relay_key)
    signature = thief.sign("SiteRequest", encode(claimed))
    path = ceremony.folder / "thief.json"
    path.write_text(request_to_json(SignedRequest(claimed, signature)))
    done = ceremony.add("thief", path)
    assert done.returncode == 21
    assert "proof" in done.stderr


def test_a_name_is_given_once_and_an_identity_too(ceremony: Ceremony, tmp_path: Path) -> None:
    request = ceremony.request("north")
    good(ceremony.add("north", request))
    before = ceremony.state()
    other = tmp_path / "elsewhere" / "x"
    other.mkdir(parents=True)
    good(run(other, "umbel-client", "init", "--site", "north", "--federation", "clinics"))
    done = ceremony.add("again", other / "north.request.json")
    assert (done.returncode, "already in the roster" in done.stderr) == (20, True)
    twin = sign_request("clinics", "twin", ceremony.identity("north"), new_key())
    path = tmp_path / "twin.json"
    path.write_text(request_to_json(twin))
    done = ceremony.add("twin", path)
    assert (done.returncode, "another party's" in done.stderr) == (20, True)
    assert ceremony.state() == before


def test_only_the_fingerprint_that_was_read_out_is_added(ceremony: Ceremony) -> None:
    request = ceremony.request("north")
    before = ceremony.state()
    done = ceremony.add("north", request, expected="aaaa-bbbb")
    assert (done.returncode, "nothing was changed" in done.stderr) == (20, True)
    silent = run(
        ceremony.operator, "umbel-server", "sites", "add", str(request), "--out", "../k.json"
    )
    assert (silent.returncode, "a person at a terminal" in silent.stderr) == (20, True)
    assert ceremony.state() == before


@pytest.mark.parametrize("name", ["../evil", "North", "a b", "", "operator"])
def test_a_name_that_is_none_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, "umbel-client", "init", "--site", name, "--federation", "clinics")
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_kit_of_somebody_else_is_refused(ceremony: Ceremony) -> None:
    request = ceremony.request("north")
    good(ceremony.add("north", request))
    kit = ceremony.folder / "north.kit.json"
    thief = Identity.generate(os.urandom)
    forged = ceremony.folder / "forged.json"
    forged.write_text(kit_to_json(sign_kit(kit_from_json(kit.read_text(), kit).kit, thief)))
    done = ceremony.join("north", forged)
    assert done.returncode == 21
    ceremony.request("east")
    done = ceremony.join("east", kit)
    assert (done.returncode, "for another site" in done.stderr) == (20, True)
    assert not (ceremony.folder / "east/relay/certificate.pem").exists()


def test_a_kit_for_another_relay_key_is_refused(ceremony: Ceremony) -> None:
    request = ceremony.request("north")
    good(ceremony.add("north", request))
    key = ceremony.folder / "north/relay/key.pem"
    key.write_bytes((ceremony.operator / "tls/key.pem").read_bytes())
    done = ceremony.join("north")
    assert (done.returncode, "another relay key" in done.stderr) == (20, True)


def test_a_kit_of_an_operator_who_is_not_the_pinned_one_is_refused(
    assembled: Ceremony, tmp_path: Path
) -> None:
    other = Ceremony(tmp_path)
    request = assembled.folder / "east" / "east.request.json"
    good(other.add("east", request))
    done = assembled.join("east", tmp_path / "east.kit.json")
    assert done.returncode == 21


def test_nothing_is_written_over_and_nothing_half_written(ceremony: Ceremony) -> None:
    before = ceremony.state()
    arguments = ("--federation", "clinics", "--address", "127.0.0.1:9443")
    done = run(ceremony.folder, "umbel-server", "init", *arguments)
    assert (done.returncode, "nothing is overwritten" in done.stderr) == (50, True)
    assert ceremony.state() == before
    ceremony.request("north")
    again = run(
        ceremony.folder / "north", "umbel-client", "init", "--site", "north", "--federation", "x"
    )
    assert again.returncode == 50


def test_a_disk_that_is_full_leaves_no_operator_behind(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600));"
        "sys.argv = ['umbel-server', 'init', '--federation', 'c', '--address', 'h:1'];"
        "from umbel_server.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 50, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_file_is_named(ceremony: Ceremony) -> None:
    request = ceremony.request("north")
    for text in ("", "[]", "{}", request.read_text().replace('"site"', '"sight"')):
        path = ceremony.folder / "bad.json"
        path.write_text(text)
        done = run(
            ceremony.operator, "umbel-server", "sites", "add", str(path), "--out", "../k.json"
        )
        assert (done.returncode, "bad.json" in done.stderr) == (20, True)
