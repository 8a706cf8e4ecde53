"""How often a process asks for what may come in a second, or in hours."""

from umbel_host.transport.polling import pause


def test_questions_add_a_twentieth_to_a_wait_and_come_once_a_second_in_the_end() -> None:
    # A round's messages come close together.
    assert pause(0.0, shortest=0.1, longest=1.0) == pause(2.0, shortest=0.1, longest=1.0) == 0.1
    waited, questions = 0.0, 0
    while waited < 3600:
        seconds = pause(waited, shortest=0.1, longest=1.0)
        assert 0.1 <= seconds <= max(0.1, 0.05 * waited)
        waited += seconds
        questions += 1
    # The former rule, ten times a second for a minute, took 4,140.
    assert questions < 3700
    assert pause(3600.0, shortest=0.1, longest=1.0) == 1.0
