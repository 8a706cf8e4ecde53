"""Epsilon against Google's accountant, and a calibration that errs on the safe side only."""

import math
import subprocess
import sys
import warnings
from typing import Any

import mpmath
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis import prv

from umbel_client.privacy import accounting
from umbel_client.privacy.accounting import (
    SMALLEST_NOISE_MULTIPLIER,
    DpEvent,
    calibrate,
    epsilon,
    require_delta,
    total_epsilon,
)
from umbel_common.errors import CalibrationError, PolicyRefusal

QUICKSTART = DpEvent(0.73, 0.1, 30)
LONG = DpEvent(1.0, 0.01, 1000)
DOUBTED = DpEvent(0.9606244161315665, 0.375, 8)
"""SciPy warns of its integral."""


def opacus_epsilon(events: list[DpEvent], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(one.noise_multiplier, one.sample_rate, one.steps) for one in events]
    return float(accountant.get_epsilon(delta, eps_error=0.02))


def google_epsilon(events: list[DpEvent], delta: float) -> float:
    accountant = PLDAccountant()
    for event in events:
        step = PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier))
        accountant.compose(step, event.steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([QUICKSTART], 1e-5),
        ([LONG], 1e-5),
        ([DOUBTED], 1e-5),
        ([DpEvent(4.0, 0.05, 200)], 1e-6),
        ([DpEvent(0.8, 0.01, 5)], 1e-9),
        ([DpEvent(5.0, 1.0, 30)], 1e-5),
        ([DpEvent(1.0, 0.1, 30), DpEvent(2.0, 0.05, 50), DpEvent(0.7, 0.2, 10)], 1e-5),
    ],
    ids=str,
)
def test_epsilon_is_an_upper_bound_within_one_percent_of_googles(
    events: list[DpEvent], delta: float
) -> None:
    expected = google_epsilon(events, delta)
    assert epsilon(events, delta) == pytest.approx(expected, rel=0.01)
    # Google's own figure is pessimistic by its grid of 1e-4 for each step.
    assert epsilon(events, delta) >= expected * 0.999


@pytest.mark.parametrize(
    ("event", "rdp_alone"),
    [
        (QUICKSTART, False),
        (LONG, False),
        (DpEvent(1.0, 1e-6, 10**9), True),
        (DpEvent(0.25, 1.0, 9), True),
    ],
    ids=str,
)
def test_epsilon_never_exceeds_googles_rdp_and_is_that_where_prv_gives_up(
    event: DpEvent, rdp_alone: bool
) -> None:
    accountant = RdpAccountant()
    step = PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier))
    accountant.compose(step, event.steps)
    rdp = float(accountant.get_epsilon(1e-5))
    found = epsilon([event], 1e-5)
    assert found <= rdp * 1.002
    assert (found >= rdp * 0.99) == rdp_alone


CORNERS = [
    # Each step hardly ever has a record, and tells much where it has.
    ([DpEvent(0.35, 3e-12, 100_000)], 1e-5),
    ([DpEvent(0.35, 1e-9, 20_000), DpEvent(60.0, 1.0, 20_000)], 1e-6),
    ([DpEvent(1.1, 0.008, 100_000)], 1e-8),
]
"""Numbers that an operator can write into a plan, on which a figure took 4 to 7 s and 0.5 GB."""


@pytest.mark.parametrize(("events", "delta"), CORNERS, ids=["rare", "counts", "long"])
def test_no_numbers_of_a_plan_make_a_figure_take_long(
    events: list[DpEvent], delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = []

    def noted(variable: Any, domain: Any) -> Any:
        cells.append(domain.size)
        return discretize(variable, domain)

    discretize = prv.discretize
    monkeypatch.setattr(prv, "discretize", noted)
    found = accounting._epsilon.__wrapped__(tuple(events), delta)
    assert 2**17 < sum(cells) < 1.001 * 2**18
    assert found < accounting._rdp_epsilon(tuple(events), delta)


@pytest.mark.parametrize("steps", [10_000, 100_000])
def test_a_coarse_grid_costs_a_little_and_never_says_too_little(steps: int) -> None:
    """Steps without sampling are one with the noise divided by the root of their number."""
    event, exact = DpEvent(4 * math.sqrt(steps), 1.0, steps), gaussian_epsilon(4.0, 1e-5)
    assert exact <= epsilon([event], 1e-5) <= 1.04 * exact
    assert 1.08 * exact < accounting._rdp_epsilon((event,), 1e-5)


def test_epsilon_is_an_upper_bound_where_delta_is_close_to_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full batches compose to one Gaussian step, whose epsilon is known (Balle and Wang 2018,
    theorem 8); computed with 50 digits."""
    event, delta, exact = DpEvent(30.0, 1.0, 10_000), 1e-13, 29.524326
    assert exact <= epsilon([event], delta) <= 1.05 * exact
    # PRV, if it is asked here, says too little.
    monkeypatch.setattr(accounting, "_SMALLEST_PRV_DELTA", 0.0)
    monkeypatch.setattr(accounting, "_PRV_DELTA_PER_STEP", 0.0)
    assert accounting._epsilon.__wrapped__((event,), delta) < exact


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([QUICKSTART], 1e-5),
        ([LONG], 1e-9),
        ([DpEvent(5.0, 1.0, 30)], 1e-6),
        ([DpEvent(1.0, 0.1, 30), DpEvent(2.0, 0.05, 50)], 1e-5),
    ],
    ids=str,
)
def test_prv_gives_what_opacus_accountant_gives_bit_for_bit(
    events: list[DpEvent], delta: float
) -> None:
    found = accounting._prv_epsilon(tuple(events), delta, 0.02)
    assert found == opacus_epsilon(events, delta)


def test_a_figure_comes_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Warning, match="integral"):
            opacus_epsilon([DOUBTED], 1e-5)
        accounting._prv_epsilon((DOUBTED,), 1e-5, 0.02)


def test_a_release_without_privacy_makes_the_total_infinite() -> None:
    assert total_epsilon([QUICKSTART, None], 1e-5) == math.inf
    assert total_epsilon([QUICKSTART, LONG], 1e-5) == epsilon([QUICKSTART, LONG], 1e-5)
    assert total_epsilon([], 1e-5) == 0.0


def test_reading_what_was_charged_waits_for_no_accountant() -> None:
    program = (
        "import sys, umbel_client.cli, umbel_client.ledger.ledger; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one step without sampling (Balle and Wang 2018, theorem 8)."""
    with mpmath.workdps(60):
        mu = 1 / mpmath.mpf(noise_multiplier)

        low, high = mpmath.mpf(0), mpmath.mpf(100)
        for _ in range(100):
            middle = (low + high) / 2
            tail = mpmath.ncdf(mu / 2 - middle / mu)
            spent = tail - mpmath.exp(middle) * mpmath.ncdf(-mu / 2 - middle / mu)
            low, high = (middle, high) if spent > delta else (low, middle)
        return float(high)


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.full)])
def test_the_best_order_is_found_without_asking_all(examples: int) -> None:
    @settings(max_examples=examples)
    @given(
        noise=st.floats(math.log(0.02), math.log(100)).map(math.exp),
        rate=st.floats(math.log(1e-5), 0.0).map(math.exp),
        steps=st.integers(1, 100_000),
        delta=st.floats(math.log(1e-14), math.log(1e-3)).map(math.exp),
    )
    def holds(noise: float, rate: float, steps: int, delta: float) -> None:
        events = (DpEvent(noise, rate, steps), DpEvent(2 * noise, 1.0, 1))
        orders = [accounting._rdp_epsilon(events, delta, (order,)) for order in accounting._ORDERS]
        assert accounting._rdp_epsilon(events, delta) == min(orders)

    holds()


def test_an_order_whose_curve_overflows_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    events, curve = (DpEvent(30.0, 0.5, 1),), accounting._rdp
    orders = [accounting._rdp_epsilon(events, 1e-5, (order,)) for order in accounting._ORDERS]
    monkeypatch.setattr(
        accounting,
        "_rdp",
        lambda noise, rate, order: curve(noise, rate, order) if order < 5 else math.inf,
    )
    assert accounting._rdp_epsilon(events, 1e-5) == min(orders[:39]) > min(orders)
    monkeypatch.setattr(accounting, "_rdp", lambda *_: math.inf)
    assert accounting._rdp_epsilon(events, 1e-5) == math.inf


@pytest.mark.parametrize("delta", [1e-9, 1e-12, 1e-13, 3e-14, 1e-15])
def test_a_tiny_delta_costs_at_least_what_it_truly_costs(
    delta: float,
) -> None:
    """1,500 steps without sampling are one with the noise divided by sqrt(1,500)."""
    events = [DpEvent(noise_multiplier=25.0, sample_rate=1.0, steps=1500)]
    exact = gaussian_epsilon(25.0 / math.sqrt(1500), delta)
    assert exact <= epsilon(events, delta) <= 1.1 * exact


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0.0


def test_two_jobs_cost_at_least_each_and_at_most_their_sum() -> None:
    first, second = epsilon([QUICKSTART], 1e-5), epsilon([LONG], 1e-5)
    both = epsilon([QUICKSTART, LONG], 2e-5)
    assert epsilon([QUICKSTART, LONG], 1e-5) > max(first, second)
    assert both <= first + second


def test_the_order_and_the_slicing_of_steps_do_not_matter() -> None:
    sliced = [DpEvent(0.73, 0.1, 10), LONG, DpEvent(0.73, 0.1, 20)]
    assert epsilon(sliced, 1e-5) == epsilon([LONG, QUICKSTART], 1e-5)


@pytest.mark.parametrize("examples", [3, pytest.param(10, marks=pytest.mark.full)])
def test_less_noise_more_records_or_more_steps_never_cost_less(examples: int) -> None:
    @settings(max_examples=examples)
    @given(
        noise=st.floats(0.3, 50),
        rate=st.floats(1e-4, 1.0),
        steps=st.integers(1, 2000),
        delta=st.sampled_from([1e-4, 1e-6, 1e-9]),
    )
    def holds(noise: float, rate: float, steps: int, delta: float) -> None:
        here = epsilon([DpEvent(noise, rate, steps)], delta)
        assert epsilon([DpEvent(noise / 1.2, rate, steps)], delta) >= here * 0.99
        assert epsilon([DpEvent(noise, min(1.0, rate * 1.2), steps)], delta) >= here * 0.99
        assert epsilon([DpEvent(noise, rate, steps * 2)], delta) >= here * 0.99

    holds()


@pytest.mark.parametrize(
    "event", [DpEvent(0.001, 0.5, 1), DpEvent(0.05, 1.0, 1), DpEvent(0.2, 0.5, 100_000)], ids=str
)
def test_absurdly_little_noise_is_never_accounted_as_privacy(event: DpEvent) -> None:
    # About what one step gives away where the record was sampled: 1 / (2 s^2) + log q.
    single = 1 / (2 * event.noise_multiplier**2) + math.log(event.sample_rate)
    assert epsilon([event], 1e-5) > single


def test_absurdly_many_steps_are_answered_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.2 < epsilon([DpEvent(1.0, 1e-6, 10**9)], 1e-5) < 1
        assert epsilon([DpEvent(1.0, 1.0, 1)], 1e-5) == pytest.approx(4.377, rel=0.01)
        assert epsilon([DpEvent(1e4, 1e-9, 1)], 1e-5) < 0.01


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (0.0, 0.1, 1),
        (math.nan, 0.1, 1),
        (math.inf, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, math.nan, 1),
        (1.0, 0.1, 0),
    ],
)
def test_an_event_that_means_nothing_cannot_be_made(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        DpEvent(noise, rate, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_epsilon_at_an_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([QUICKSTART], delta)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [
        (8, 1e-5, 0.1, 30),
        # Between the others.
        pytest.param(1, 1e-5, 0.1, 30, marks=pytest.mark.full),
        (0.1, 1e-5, 0.1, 30),
        (3, 1e-6, 0.01, 2000),
        (8, 1e-5, 1.0, 100),
        (50, 1e-5, 0.1, 30),
    ],
)
def test_calibrated_noise_costs_just_below_the_target(
    target: float, delta: float, rate: float, steps: int
) -> None:
    noise = calibrate(target, delta, rate, steps)
    assert 0.998 * target < epsilon([DpEvent(noise, rate, steps)], delta) <= target


def test_no_prefix_of_a_calibrated_job_costs_more_than_the_whole() -> None:
    noise = calibrate(8, 1e-5, 0.1, 30)
    for steps in (1, 5, 15, 25, 28, 29):
        assert epsilon([DpEvent(noise, 0.1, steps)], 1e-5) <= 8


def test_where_the_smallest_noise_is_enough_it_is_taken() -> None:
    assert calibrate(100, 1e-5, 0.001, 3) == SMALLEST_NOISE_MULTIPLIER


def test_noise_is_bracketed_without_a_figure_for_each_power_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[tuple[DpEvent, ...]] = []

    def noted(events: tuple[DpEvent, ...], delta: float, error: float) -> float:
        figures.append(events)
        return prv_epsilon(events, delta, error)

    prv_epsilon = accounting._prv_epsilon
    monkeypatch.setattr(accounting, "_prv_epsilon", noted)
    # The other event alone costs more, so all noise is tried in vain.
    with pytest.raises(CalibrationError):
        calibrate(2.0, 1.1e-5, 0.1, 7, DpEvent(1.5, 1.0, 1))
    assert len(figures) == 1
    figures.clear()
    assert 32 < calibrate(0.5, 1.1e-5, 1.0, 30) < 64
    assert len(figures) <= 6


def test_an_epsilon_out_of_reach_is_refused_with_what_to_change() -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(1e-4, 1e-5, 0.1, 30)
    text = caught.value.diagnostics()
    for part in ("epsilon 0.0001", "delta 1e-05", "sampling rate 0.1", "30 steps", "larger"):
        assert part in text


def test_delta_may_reach_one_tenth_of_a_record_and_no_more() -> None:
    require_delta(1e-5, 10_000)
    with pytest.raises(PolicyRefusal) as caught:
        require_delta(1e-5, 10_001)
    assert caught.value.check == "delta-for-records"
    with pytest.raises(PolicyRefusal):
        require_delta(math.nan, 1)
