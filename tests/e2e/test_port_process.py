"""The process with the port does not start on what it cannot use, and says in a few lines why."""

import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from e2e.daemons import Clinics
from support.waiting import HANGING

from umbel_common.errors import ConfigError, IdentityError, StorageError, UmbelError
from umbel_server.operator.admitted_sites import load_sites, save_sites
from umbel_server.operator.authority import certificate_pem, key_pem, new_key


@pytest.fixture
def clinics(tmp_path: Path, tiny_model: Path) -> Iterator[Clinics]:
    made = Clinics(tmp_path, tiny_model)
    yield made
    made.close()


def certificate(clinics: Clinics) -> Path:
    return clinics.operator_folder / "tls" / "certificate.pem"


def missing(clinics: Clinics) -> None:
    certificate(clinics).unlink()


def unreadable(clinics: Clinics) -> None:
    certificate(clinics).write_text("no certificate")


def of_another_key(clinics: Clinics) -> None:
    (clinics.operator_folder / "tls" / "key.pem").write_bytes(key_pem(new_key()))


def expired(clinics: Clinics) -> None:
    made_long_ago(clinics, 366)


def made_long_ago(clinics: Clinics, days: int) -> None:
    """Gives the server a certificate of so many days ago, which is good for a year."""
    key, then = new_key(), datetime.now(UTC) - timedelta(days=days)
    made = clinics.authority.server(key.public_key(), ["127.0.0.1"], then)
    certificate(clinics).write_bytes(certificate_pem(made))
    (clinics.operator_folder / "tls" / "key.pem").write_bytes(key_pem(key))


def no_authority(clinics: Clinics) -> None:
    (clinics.operator_folder / "ca" / "certificate.pem").write_text("")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (missing, "cannot be used"),
        (unreadable, "cannot be used"),
        (of_another_key, "cannot be used"),
        (no_authority, "cannot be used"),
        (expired, "the server's certificate has expired"),
    ],
)
def test_a_certificate_that_is_no_good(
    clinics: Clinics, spoil: Callable[[Clinics], None], said: str
) -> None:
    spoil(clinics)
    expect_refusal(clinics, said, str(certificate(clinics)))


def test_whatever_starts_the_process_it_says_which_certificates_end_soon(clinics: Clinics) -> None:
    made_long_ago(clinics, 340)
    path = clinics.operator_folder / "sites.json"
    known, then = load_sites(path), datetime.now(UTC) - timedelta(days=70)
    site = clinics.sites["east"]
    aged = clinics.authority.site(site.name, site.relay_key.public_key(), then)
    entry = msgspec.structs.replace(known["east"], certificate=certificate_pem(aged).decode())
    save_sites(path, {**known, "east": entry})
    clinics.port_process.start()
    deadline = time.monotonic() + HANGING
    while "certificate of east" not in (log := clinics.port_process.log.read_text()):
        assert time.monotonic() < deadline, log
        time.sleep(0.1)
    assert "WARNING umbel.port: the server's certificate ends on" in log
    assert "umbel-server renew)" in log
    assert "certificate of north" not in log
    assert clinics.port_process.stop() == 0


def test_a_port_that_is_taken(clinics: Clinics) -> None:
    with socket.create_server(("127.0.0.1", clinics.port)):
        expect_refusal(clinics, "the port cannot be opened", f"127.0.0.1:{clinics.port}")


def test_a_key_that_others_may_read(clinics: Clinics) -> None:
    key = clinics.operator_folder / "tls" / "key.pem"
    key.chmod(0o640)
    expect_refusal(clinics, "open to other users", str(key), kind=IdentityError)


def test_a_list_of_sites_that_is_none(clinics: Clinics) -> None:
    (clinics.operator_folder / "sites.json").write_text("[]")
    expect_refusal(clinics, "a list of sites is malformed", kind=IdentityError)


def test_a_state_folder_that_is_none(clinics: Clinics) -> None:
    config = clinics.operator_folder / "server.toml"
    config.write_text('state = "sites.json/state"\n' + config.read_text())
    expect_refusal(clinics, "the state folder cannot be used", kind=StorageError)


def expect_refusal(clinics: Clinics, *said: str, kind: type[UmbelError] = ConfigError) -> None:
    clinics.port_process.start()
    assert clinics.port_process.wait() == kind.exit_code
    log = clinics.port_process.log.read_text()
    assert "Traceback" not in log
    assert len(log.splitlines()) < 10, log
    for text in said:
        assert text in log
