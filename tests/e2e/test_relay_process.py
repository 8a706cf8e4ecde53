"""The relay does not start on what it cannot use, and says in a few lines why."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from e2e.daemons import Clinics, Daemon, Site
from support.waiting import HANGING

from umbel_common.errors import ConfigError, IdentityError, StorageError, UmbelError
from umbel_server.operator.authority import Authority, certificate_pem, key_pem, new_key


@pytest.fixture
def clinics(tmp_path: Path, tiny_model: Path) -> Iterator[Clinics]:
    made = Clinics(tmp_path, tiny_model)
    yield made
    made.close()


def no_key(site: Site, _: Authority) -> None:
    (site.folder / "relay" / "key.pem").unlink()


def open_key(site: Site, _: Authority) -> None:
    (site.folder / "relay" / "key.pem").chmod(0o644)


def key_of_another(site: Site, _: Authority) -> None:
    (site.folder / "relay" / "key.pem").write_bytes(key_pem(new_key()))


def expired(site: Site, authority: Authority) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=91)
    made = authority.site(site.name, site.relay_key.public_key(), long_ago)
    (site.folder / "relay" / "certificate.pem").write_bytes(certificate_pem(made))


def no_folder_for_sockets(site: Site, _: Authority) -> None:
    (site.folder / "run").touch()


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (no_key, IdentityError, "key.pem"),
        (open_key, IdentityError, "mode 0644"),
        (key_of_another, ConfigError, "cannot be used"),
        (expired, ConfigError, "ask the operator for a new kit"),
        (no_folder_for_sockets, StorageError, "/run"),
    ],
)
def test_a_relay_that_cannot_work_ends_with_one_clear_error(
    clinics: Clinics, spoil: Callable[[Site, Authority], None], kind: type[UmbelError], said: str
) -> None:
    site = clinics.sites["north"]
    spoil(site, clinics.authority)
    site.relay.start()
    assert site.relay.wait() == kind.exit_code
    log = site.relay.log.read_text()
    assert log.count("error: ") == 1
    assert "Traceback" not in log
    assert said in log


def test_a_second_relay_at_one_trainer_refuses_to_start(clinics: Clinics) -> None:
    site = clinics.sites["north"]
    clinics.port_process.start()
    site.relay.start()
    deadline = time.monotonic() + HANGING
    while not (site.folder / "run" / "relay.sock").exists():
        assert time.monotonic() < deadline, site.relay.log.read_text()
        time.sleep(0.1)
    second = Daemon(site.folder, "umbel_client.relay", str(site.config))
    second.start()
    assert second.wait() == StorageError.exit_code
    assert "this site's relay is already running" in site.relay.log.read_text()
    assert site.relay.running
