"""How often a relay asks for messages."""

from umbel_client.relay.flower import _pause


def test_polls_add_a_twentieth_to_a_wait_and_an_idle_site_asks_once_a_second() -> None:
    # A round's messages come close together.
    assert _pause(0.0) == _pause(2.0) == 0.1
    waited, polls = 0.0, 0
    while waited < 3600:
        assert 0.1 <= _pause(waited) <= max(0.1, 0.05 * waited)
        waited += _pause(waited)
        polls += 1
    # The former rule, ten times a second for a minute, took 4,140 polls.
    assert polls < 3700
    assert _pause(3600.0) == 1.0
