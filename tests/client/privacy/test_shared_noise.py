"""What a sum of integer noise promises: each part of the proof, computed where its error shows."""

import math

import numpy as np
import pytest

from umbel_client.privacy.accounting import calibrate, epsilon
from umbel_client.privacy.discrete_gaussian import DiscreteGaussian
from umbel_client.privacy.noise import NoiseSource
from umbel_client.privacy.shared_noise import NoiseShares, grid_for
from umbel_common.plans.largest_sum import largest_noise

REACH = np.arange(-400, 401)


def discrete_gaussian(scale: float, centre: float = 0.0) -> np.ndarray:
    weights = np.exp(-((REACH - centre) ** 2) / (2 * scale**2))
    return weights / weights.sum()


def unevenness(scale: float) -> float:
    """How far a sum of a Gaussian over shifted integers is from its mean: Poisson's formula."""
    return 2 * sum(math.exp(-2 * (math.pi * scale * j) ** 2) for j in range(1, 20))


@pytest.mark.parametrize(("scale", "sites"), [(0.6, 2), (0.8, 2), (0.8, 3), (1.0, 5)])
def test_a_sum_of_discrete_gaussians_is_nearly_one(scale: float, sites: int) -> None:
    one = discrete_gaussian(scale)
    total = one
    for _ in range(sites - 1):
        total = np.convolve(total, one)[400:1201]
    wanted = discrete_gaussian(scale * math.sqrt(sites))
    seen = wanted > 1e-12
    found = np.abs(np.log(total[seen] / wanted[seen])).max()
    bound = sum(
        math.log((1 + unevenness(there)) / (1 - unevenness(there)))
        for there in (scale * math.sqrt(n / (n + 1)) for n in range(1, sites))
    )
    # The error is there, so that the formula of the bound is what is tested, and not the rounding.
    assert 1e-12 < found <= bound


@pytest.mark.parametrize(("scale", "rounding"), [(0.8, 0.4), (1.0, 0.5), (1.5, 0.6)])
def test_a_discrete_gaussian_is_a_rounded_continuous_one(scale: float, rounding: float) -> None:
    inner = math.sqrt(scale**2 - rounding**2)
    points = np.linspace(-12 * scale, 12 * scale, 40_001)
    density = np.exp(-(points**2) / (2 * inner**2))
    density /= density.sum()
    weights = np.exp(-((REACH[:, None] - points[None, :]) ** 2) / (2 * rounding**2))
    rounded = (weights / weights.sum(0)) @ density
    wanted = discrete_gaussian(scale)
    seen = wanted > 1e-9
    found = np.abs(np.log(rounded[seen] / wanted[seen])).max()
    bound = 2 * (unevenness(rounding) + unevenness(scale)) / (1 - unevenness(rounding))
    assert 1e-9 < found <= bound


@pytest.mark.parametrize("centre", [1, 2, 5])
@pytest.mark.parametrize("sampled", [1.0, 0.1])
def test_delta_of_the_integers_is_at_most_that_of_the_continuous(
    centre: int, sampled: float
) -> None:
    """The hockey-stick divergence of a step, both ways, against that of the smaller Gaussian."""
    scale, rounding = 8.0, 2.0
    kept = math.sqrt(scale**2 - rounding**2)
    fine = np.linspace(-120, 120, 480_001)

    def divergence(first: np.ndarray, second: np.ndarray, spent: float) -> float:
        return float(np.maximum(first - math.exp(spent) * second, 0).sum())

    def continuous(middle: float) -> np.ndarray:
        weights = np.exp(-((fine - middle) ** 2) / (2 * kept**2))
        return weights / weights.sum()

    without, there = discrete_gaussian(scale), discrete_gaussian(scale, centre)
    mixed = (1 - sampled) * without + sampled * there
    plain, moved = continuous(0.0), continuous(float(centre))
    mixed_plain = (1 - sampled) * plain + sampled * moved
    for spent in (0.01, 0.1, 0.3, 0.6):
        for pair, bound in (
            ((mixed, without), (mixed_plain, plain)),
            ((without, mixed), (plain, mixed_plain)),
        ):
            assert divergence(*pair, spent) <= divergence(*bound, spent) + 1e-12


def shares(**changes: float) -> NoiseShares:
    fields = {"bits": 16, "grid": 1e-5, "clip_norm": 1.0, "coordinates": 10_000}
    return NoiseShares(**(fields | changes))  # type: ignore[arg-type]  # by name


def test_a_rounded_gradient_is_no_longer_than_the_sensitivity() -> None:
    """The worst gradient: every coordinate lies just past the middle between two steps."""
    found = shares(grid=1e-3, coordinates=390)
    worst = np.full(390, 50.5 + 1e-9)
    rounded = np.rint(worst)
    assert np.linalg.norm(worst) < 1000 < np.linalg.norm(rounded) <= found.sensitivity
    # Without what rounding adds, the bound would not hold.
    assert np.linalg.norm(rounded) > 1 / found.grid


def test_more_honest_sites_give_more_noise_and_one_alone_its_own() -> None:
    found = shares()
    one, three = found.noise_multiplier(1), found.noise_multiplier(3)
    assert three == pytest.approx(one * math.sqrt(3), rel=1e-6)
    assert one < 2**16 / found.sensitivity
    with pytest.raises(ValueError, match="honest"):
        found.noise_multiplier(0)


@pytest.mark.parametrize("bits", [10, 16, 20])
@pytest.mark.parametrize("honest", [1, 2, 3, 7])
@pytest.mark.parametrize("wanted", [0.5, 1.0, 4.0, 37.0])
def test_a_grid_gives_the_noise_that_was_asked_for(bits: int, honest: int, wanted: float) -> None:
    grid = grid_for(wanted, honest=honest, bits=bits, clip_norm=0.5, coordinates=3_000)
    if grid is None:
        assert 2**bits * math.sqrt(honest) / wanted <= math.sqrt(3_000) / 2 + 1
        return
    found = NoiseShares(bits, grid, 0.5, 3_000).noise_multiplier(honest)
    assert wanted <= found <= wanted * (1 + 1e-5)


def test_too_many_coordinates_for_so_little_noise_have_no_grid() -> None:
    assert grid_for(4.0, honest=2, bits=8, clip_norm=1.0, coordinates=10_000_000) is None


def test_the_figures_of_the_design_for_those_who_know_all_other_noise() -> None:
    """A claim of 1 with three honest sites costs about 2 against everybody."""
    rate, steps, delta = 0.0927, 100, 1e-5
    sigma = calibrate(1.0, delta, rate, steps)
    grid = grid_for(sigma, honest=3, bits=20, clip_norm=1.0, coordinates=7_315)
    assert grid is not None
    found = NoiseShares(20, grid, 1.0, 7_315)
    assert epsilon([found.event(3, rate, steps)], delta) <= 1.0
    assert epsilon([found.event(1, rate, steps)], delta) == pytest.approx(2.0, rel=0.05)


def test_noise_stays_below_its_bound_and_comes_near_it() -> None:
    bits, sites, coordinates = 8, 3, 100_000
    bound = largest_noise(bits, sites=sites, draws=coordinates)
    source = NoiseSource(lambda length: bytes([5]) * length)
    total = sum(DiscreteGaussian(source, bits).draw(coordinates) for _ in range(sites))
    largest = int(np.abs(total).max())
    assert bound / 3 < largest < bound
