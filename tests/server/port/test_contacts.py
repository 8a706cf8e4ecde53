"""When sites spoke last, and who is seen to use one site's keys twice."""

import pytest

from umbel_server.port.contacts import Contacts
from umbel_server.port.reply_filter import ACTIVATE, PULL, PUSH


def test_a_site_that_spoke_has_a_time_and_one_that_did_not_has_none() -> None:
    contacts = Contacts()
    contacts.heard("north", PUSH, 1.0, "192.0.2.1")
    assert {*contacts.read()} == {"north"}
    assert contacts.read()["north"].last > 1.7e9
    assert contacts.read()["north"].twice is None


def test_a_relay_that_connects_again_is_one_relay(caplog: pytest.LogCaptureFixture) -> None:
    contacts = Contacts()
    for opened in (1.0, 20.0, 300.0):
        contacts.heard("north", ACTIVATE, opened, "192.0.2.1")
        for _ in range(10):
            contacts.heard("north", PULL, opened + 0.5, "192.0.2.1")
        # What was on the line when the relay was killed.
        contacts.heard("north", PULL, opened - 1.0, "192.0.2.1")
    assert contacts.read()["north"].twice is None
    assert caplog.text == ""


@pytest.mark.parametrize("place", ["192.0.2.2", "192.0.2.1"])
def test_two_relays_with_one_key_are_told_once_a_minute(
    caplog: pytest.LogCaptureFixture, place: str
) -> None:
    contacts = Contacts()
    contacts.heard("north", ACTIVATE, 1.0, "192.0.2.1")
    contacts.heard("south", ACTIVATE, 2.0, "192.0.2.9")
    contacts.heard("north", ACTIVATE, 5.0, place)
    for _ in range(10):
        contacts.heard("north", PULL, 1.0, "192.0.2.1")
        contacts.heard("north", PULL, 5.0, place)
        contacts.heard("south", PULL, 2.0, "192.0.2.9")
    found = contacts.read()
    assert found["north"].twice is not None
    assert found["north"].places == tuple(sorted({place, "192.0.2.1"}))
    assert found["south"].twice is None
    (line,) = caplog.records
    assert "north is connected twice" in line.getMessage()
    assert place in line.getMessage()


def test_a_relay_that_is_alone_again_is_one_relay(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("umbel_server.port.contacts.time.monotonic", lambda: now[0])
    contacts = Contacts()
    for opened in (1.0, 5.0):
        contacts.heard("north", ACTIVATE, opened, "192.0.2.1")
    contacts.heard("north", PULL, 5.0, "192.0.2.1")
    # The copy is stopped, and the first client asks over the connections that it has.
    for _ in range(100):
        now[0] += 31.0
        contacts.heard("north", PULL, 1.0, "192.0.2.1")
    assert contacts.read()["north"].twice is None
    assert caplog.text == ""
