"""The relay does not start on what it cannot use, and says in a few lines why."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from e2e.daemons import Clinics, Daemon, Site
from support.waiting import HANGING

from umbel_common.errors import ConfigError, IdentityError, StorageError, UmbelError
from umbel_server.messaging.carrier import CarrierLink
from umbel_server.messaging.link import JobStopped, Step
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


@pytest.mark.full
def test_a_relay_that_stops_does_not_wait_for_its_trainer(clinics: Clinics) -> None:
    """The trainer may train for hours, or not be there. The message is delivered again later."""
    site = clinics.sites["north"]
    clinics.port_process.start()
    site.relay.start()
    state, over = clinics.operator_folder / "state", threading.Event()
    with (
        closing(CarrierLink(state / "carrier.sock", over.is_set)) as link,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(list, link.exchange(Step("offer"), [("north", b"sealed")], HANGING))
        try:
            deadline = time.monotonic() + HANGING
            while not delivered(state / "superlink.sqlite"):
                assert time.monotonic() < deadline, site.relay.log.read_text()
                time.sleep(0.1)
            # It asks its trainer now.
            time.sleep(0.5)
            began = time.monotonic()
            assert site.relay.stop() == 0
            assert time.monotonic() - began < 10.0
        finally:
            over.set()
        assert isinstance(asked.exception(HANGING), JobStopped)


def delivered(database: Path) -> bool:
    """Whether a message is on its way to its site."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
            query = "SELECT count(*) FROM message_ins WHERE delivered_at != ''"
            return bool(opened.execute(query).fetchone()[0])
    except sqlite3.OperationalError:
        return False
