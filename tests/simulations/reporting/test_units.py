"""Figures for people."""

import pytest

from umbel_simulations.reporting.units import clock, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (78_412, "78.4 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_250_000_000, "1.25 GB"),
        (5_000_000_000_000, "5 TB"),
    ],
)
def test_bytes_are_given_in_three_digits(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3661, "1:01:01")]
)
def test_hours_are_shown_once_there_are_any(seconds: float, text: str) -> None:
    assert clock(seconds) == text
