"""Integer noise: distributed as the theorem assumes, from the key's words alone, and exactly."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import msgspec
import numpy as np
import pytest
from scipy import stats

from umbel_client.privacy.discrete_gaussian import (
    _TABLE,
    FEWEST_BITS,
    MOST_BITS,
    DiscreteGaussian,
)
from umbel_client.privacy.noise import NoiseSource
from umbel_common.plans.plan import FEWEST_NOISE_BITS, DistributedPrivacy


def fixed(byte: int):
    return lambda length: bytes([byte]) * length


def test_draws_have_the_probabilities_of_the_discrete_gaussian() -> None:
    draws = DiscreteGaussian(NoiseSource(fixed(7)), 4).draw(400_000)
    assert draws.dtype == np.int64
    values = np.arange(-70, 71)
    weights = np.exp(-(values**2) / (2 * 16.0**2))
    middle = np.abs(values) <= 60
    observed = np.array([np.sum(draws == value) for value in values[middle]])
    wanted = len(draws) * (weights / weights.sum())[middle]
    rest = len(draws) - observed.sum(), len(draws) - wanted.sum()
    assert stats.chisquare([*observed, rest[0]], [*wanted, rest[1]]).pvalue > 0.001


@pytest.mark.parametrize("bits", [10, 16, MOST_BITS])
def test_a_large_scale_looks_like_a_gaussian(bits: int) -> None:
    draws = DiscreteGaussian(NoiseSource(fixed(bits)), bits).draw(100_000) / 2.0**bits
    assert abs(draws.mean()) < 0.015
    assert abs(draws.std() - 1) < 0.012
    # A uniform value within a step, so that the test of a continuous distribution applies.
    spread = draws + (np.random.default_rng(0).random(len(draws)) - 0.5) / 2.0**bits
    assert stats.kstest(spread, "norm").pvalue > 0.001
    if bits < 20:
        # The lowest bit is a fair coin: draws are not rounded to coarser steps.
        odd = (draws * 2.0**bits).astype(np.int64) & 1
        assert abs(odd.mean() - 0.5) < 0.01


def test_draws_are_independent() -> None:
    draws = DiscreteGaussian(NoiseSource(fixed(9)), 8).draw(1 << 16)
    for lag in (1, 2, 1 << 14, 1 << 15):
        first, second = draws[:-lag].astype(float), draws[lag:].astype(float)
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
        assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 0.02


def test_tails_are_as_long_as_they_should_be() -> None:
    draws = np.abs(DiscreteGaussian(NoiseSource(fixed(3)), 5).draw(500_000))
    for distance in (3, 4):
        values = np.arange(-1000, 1001)
        weights = np.exp(-(values**2) / (2 * 32.0**2))
        share = weights[np.abs(values) > 32 * distance].sum() / weights.sum()
        expected = share * len(draws)
        assert abs(np.sum(draws > 32 * distance) - expected) < 5 * math.sqrt(expected)


def test_every_toss_is_decided_by_integers() -> None:
    """Coins of exp(-n / 2^b), against exact fractions of the series of the exponential."""
    gaussian = DiscreteGaussian(NoiseSource(fixed(4)), 4)
    for numerator, bits in ((0, 5), (1, 5), (13, 5), (31, 5), (32, 5), (1, 0)):
        tosses = gaussian._toss_exp(np.full(100_000, numerator, dtype=np.uint64), bits)
        x = Fraction(numerator, 2**bits)
        exact = float(sum((-x) ** k / math.factorial(k) for k in range(60)))
        error = 5 * math.sqrt(max(exact * (1 - exact), 1e-12) / len(tosses))
        assert abs(tosses.mean() - exact) <= error, (numerator, bits)


def test_a_remainder_is_never_likelier_than_another() -> None:
    words = iter([np.array([2**64 - 1, 5, 2**64 - 1], dtype=np.uint64)])
    redrawn = iter([np.array([2**64 - 1, 6], dtype=np.uint64), np.array([7], dtype=np.uint64)])
    gaussian = DiscreteGaussian(NoiseSource(fixed(4)), 4)
    calls = [*words, *redrawn]
    gaussian._words = lambda count: calls.pop(0)  # type: ignore[method-assign]
    # 2^64 - 1 is a multiple of 3, and the one word of its remainder that is one too many.
    assert gaussian._toss_one_in(3, 3).tolist() == [False, False, True]
    assert not calls


def test_a_word_that_begins_as_an_entry_of_the_table_is_decided_by_the_next_ones() -> None:
    entry = _TABLE[3]
    parts = [entry >> 128, entry >> 64 & (2**64 - 1), entry & (2**64 - 1)]
    for last, wanted in ((parts[2] - 1, 3), (parts[2], 4), (parts[2] + 1, 4)):
        gaussian = DiscreteGaussian(NoiseSource(fixed(4)), 4)
        calls = [np.array(parts[:1], np.uint64), np.array([parts[1], last], np.uint64)]
        gaussian._words = lambda count, calls=calls: calls.pop(0)  # type: ignore[method-assign]
        assert gaussian._from_table(1).tolist() == [wanted]
        assert not calls


def test_the_table_is_that_of_the_half_gaussian() -> None:
    with localcontext() as context:
        context.prec = 120
        weights = [(Decimal(-x * x) / 512).exp() for x in range(2000)]
        total = sum(weights)
        ends = [sum(weights[: x + 1]) / total for x in (0, 1, 16, 253)]
        for x, end in zip((0, 1, 16, 253), ends, strict=True):
            assert abs(Decimal(_TABLE[x]) / 2**192 - end) < Decimal(2) ** -180
    assert sorted(set(_TABLE)) == _TABLE
    assert _TABLE[-1] < 2**192


@pytest.mark.parametrize("size", [0, 1, 2, (1 << 14) + 1])
def test_any_number_of_draws_can_be_asked_for(size: int) -> None:
    draws = DiscreteGaussian(NoiseSource(fixed(1)), 12).draw(size)
    assert draws.shape == (size,)


def test_a_source_never_repeats_itself() -> None:
    gaussian = DiscreteGaussian(NoiseSource(fixed(1)), MOST_BITS)
    assert not np.isin(gaussian.draw(1000), gaussian.draw(1000)).any()


def test_a_plan_has_the_bits_that_the_sampler_draws() -> None:
    privacy = msgspec.json.schema(DistributedPrivacy)["$defs"]["DistributedPrivacy"]
    assert FEWEST_BITS == FEWEST_NOISE_BITS
    assert privacy["properties"]["noise_bits"]["maximum"] == MOST_BITS


@pytest.mark.parametrize("bits", [FEWEST_BITS - 1, MOST_BITS + 1, -1])
def test_a_scale_whose_tosses_are_not_exact_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be between"):
        DiscreteGaussian(NoiseSource(fixed(1)), bits)
