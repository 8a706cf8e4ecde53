"""Noise and batches: distributed as the proofs assume, and from no generator but the key's."""

import os

import numpy as np
import pytest
import torch
from scipy import stats
from support.forks import is_refused_in_a_fork

from umbel_client.privacy.noise import NoiseSource


def fixed(byte: int):
    return lambda length: bytes([byte]) * length


def test_a_million_draws_are_standard_normal() -> None:
    draws = NoiseSource(fixed(7)).normal(1_000_000)
    assert draws.dtype == np.float64
    assert abs(draws.mean()) < 0.005
    assert abs(draws.std() - 1) < 0.004
    assert abs(stats.kurtosis(draws)) < 0.03
    assert stats.kstest(draws, "norm").pvalue > 0.001


def test_neighbouring_draws_are_independent() -> None:
    draws = NoiseSource(fixed(8)).normal(1 << 17)
    for lag in (1, 1 << 15, 1 << 16):  # inside a block, between its halves, between blocks
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 0.02
        # Cosine and sine of one radius are uncorrelated yet could depend through their squares.
        assert abs(np.corrcoef(draws[:-lag] ** 2, draws[lag:] ** 2)[0, 1]) < 0.02


@pytest.mark.parametrize("size", [0, 1, 2, 3, (1 << 16) + 1])
def test_any_number_of_draws_can_be_asked_for(size: int) -> None:
    draws = NoiseSource(fixed(1)).normal(size)
    assert draws.shape == (size,)
    assert np.isfinite(draws).all()


def test_the_same_source_never_repeats_a_draw() -> None:
    source = NoiseSource(fixed(1))
    assert not np.isin(source.normal(1000), source.normal(1000)).any()


def test_a_forked_process_cannot_repeat_the_draws_of_its_parent() -> None:
    source = NoiseSource(os.urandom)
    assert is_refused_in_a_fork(lambda: source.normal(2))
    assert len(source.normal(2)) == 2


def test_two_sources_differ() -> None:
    first, second = NoiseSource(os.urandom), NoiseSource(os.urandom)
    assert not np.isin(first.normal(1000), second.normal(1000)).any()


def test_seeding_other_generators_changes_nothing() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # the point: the global generator has no say
    first = NoiseSource(fixed(3)).normal(100)
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert np.array_equal(NoiseSource(fixed(3)).normal(100), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_batch_sizes_are_binomial() -> None:
    source = NoiseSource(fixed(5))
    records, rate, batches = 400, 0.1, 4000
    sizes = np.array([len(source.poisson_batch(records, rate)) for _ in range(batches)])
    expected = stats.binom(records, rate)
    assert abs(sizes.mean() - expected.mean()) < 4 * expected.std() / np.sqrt(batches)
    bins = np.array([-1, 33, 36, 38, 40, 42, 44, 47, records])
    observed = np.histogram(sizes, bins + 0.5)[0]
    wanted = batches * np.diff(expected.cdf(bins))
    assert stats.chisquare(observed, wanted).pvalue > 0.001


def test_each_record_is_drawn_at_the_rate_and_independently() -> None:
    source = NoiseSource(fixed(6))
    drawn = np.zeros((5000, 10))
    for row in drawn:
        row[source.poisson_batch(10, 0.3)] = 1
    assert np.abs(drawn.mean(0) - 0.3).max() < 0.03
    correlations = np.corrcoef(drawn.T) - np.eye(10)
    assert np.abs(correlations).max() < 0.06


def test_a_rate_of_one_draws_every_record_and_no_record_is_drawn_twice() -> None:
    source = NoiseSource(fixed(2))
    assert source.poisson_batch(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    batch = source.poisson_batch(1000, 0.999)
    assert len(np.unique(batch)) == len(batch)
    assert batch.dtype == np.int64


def test_a_tiny_rate_gives_empty_batches() -> None:
    assert len(NoiseSource(fixed(2)).poisson_batch(100, 1e-12)) == 0
