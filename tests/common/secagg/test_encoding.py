"""Encoded deltas are unbiased and within their levels, and no sum of them wraps."""

import math
import os

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel_common.errors import LocalProtocolError, PlanError, RemoteProtocolError
from umbel_common.plans.plan import Aggregation
from umbel_common.secagg.encoding import (
    CHUNK,
    Encoding,
    Rounding,
    add_mean,
    decode_sum,
    encode,
    encoding_of,
)
from umbel_common.secagg.primitives import Keystream

SAMPLES = 200_000


def encoding(**fields) -> Encoding:
    standard = {"clip_range": 1.0, "step": 0.01, "ring_bits": 32, "max_weight": 4, "sites": 10}
    return Encoding(**{**standard, **fields})


def signed(vector):
    return vector.view(f"<i{vector.itemsize}")


def rounded(value: float, code: Encoding):
    """One coordinate, rounded many times independently, in units of the step."""
    delta = np.full(SAMPLES, value, dtype=np.float32)
    return signed(encode(delta, 1, code, os.urandom))[1:]


@pytest.mark.parametrize("value", [0.0, 0.0012, 0.005, 0.0399, -0.0012, -0.0075, 0.9999, -1.0])
@pytest.mark.parametrize("ring_bits", [16, 32])
def test_rounding_is_unbiased_with_the_variance_of_one_coin(value, ring_bits):
    exact = float(np.float32(value)) / 0.01
    up = exact - math.floor(exact)
    levels = rounded(value, encoding(ring_bits=ring_bits)).astype(np.float64)
    assert set(levels) <= {math.floor(exact), math.floor(exact) + 1}
    variance = up * (1 - up)
    # Six standard errors: a test that fails by chance once in half a billion runs.
    assert abs(levels.mean() - exact) <= 6 * math.sqrt(variance / SAMPLES) + 2**-31
    assert abs(levels.var() - variance) <= 6 * 0.5 / math.sqrt(SAMPLES)


def test_a_value_between_two_levels_goes_up_as_often_as_its_fraction_says_in_fine_steps():
    """At a million levels, the fraction has few bits left in float32, and none of them is lost."""
    value = np.float32(0.7000001)
    exact = float(value) / 1e-6
    levels = rounded(float(value), encoding(step=1e-6, sites=10)).astype(np.float64)
    assert abs(levels.mean() - exact) < 6 * 0.5 / math.sqrt(SAMPLES)


def test_coordinates_are_rounded_independently_of_each_other():
    levels = rounded(0.005, encoding()).astype(np.float64) - 0.5
    for lag in (1, 2, 4, CHUNK):
        correlation = (levels[:-lag] * levels[lag:]).mean() * 4
        assert abs(correlation) < 6 / math.sqrt(SAMPLES - lag)


def test_each_call_rounds_with_fresh_randomness_and_only_with_it():
    delta = np.full(1000, 0.005, dtype=np.float32)
    first, second = (encode(delta, 1, encoding(), os.urandom) for _ in range(2))
    assert (first != second).any()
    fixed = [encode(delta, 1, encoding(), lambda size: bytes(size)) for _ in range(2)]
    assert (fixed[0] == fixed[1]).all()


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
@pytest.mark.parametrize("ring_bits", [16, 32])
def test_a_delta_of_any_length_survives_the_round_trip(length, ring_bits):
    code = encoding(ring_bits=ring_bits)
    delta = np.linspace(-0.9, 0.9, length, dtype=np.float32)
    vector = encode(delta, 3, code, os.urandom)
    assert vector.dtype == np.dtype(f"<u{ring_bits // 8}")
    assert vector.shape == (length + 1,)
    weight, mean = decode_sum(vector, code)
    assert weight == 3
    assert mean.dtype == np.float32
    assert mean.shape == (length,)
    assert np.abs(mean - delta).max(initial=0) <= 0.01 + 1e-6


def test_values_past_the_range_are_clipped():
    delta = np.array([5, -5, 1, -1, 3e38, -3e38], dtype=np.float32)
    levels = signed(encode(delta, 2, encoding(), os.urandom))
    assert levels.tolist() == [2, 200, -200, 200, -200, 200, -200]


@given(
    clip_range=st.floats(1e-3, 1e3),
    step_share=st.floats(1e-7, 1.0),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20),
)
def test_no_level_is_passed_whatever_the_values_are(clip_range, step_share, values):
    code = encoding(clip_range=clip_range, step=clip_range * step_share, max_weight=1, sites=2)
    delta = np.array([*values, clip_range, -clip_range], dtype=np.float32)
    levels = signed(encode(delta, 1, code, os.urandom))[1:]
    assert np.abs(levels.astype(np.int64)).max() <= code.levels


class Constant(Keystream):
    """A keystream of one repeated element, as AES gives it once in 2^32 elements."""

    def __init__(self, element: int) -> None:
        self.element = element

    def fill(self, buffer: memoryview) -> None:
        np.frombuffer(buffer, dtype=np.int32)[:] = self.element


@pytest.mark.parametrize("levels", [1, 2**20, 2**22 + 1, 2**31 - 1])
@pytest.mark.parametrize("random", [-(2**31), 2**31 - 1])
def test_no_level_is_passed_whatever_the_random_bits_are(levels, random):
    code = Encoding(clip_range=levels, step=1.0, ring_bits=32, max_weight=1, sites=1)
    code.prove_headroom()
    ends = np.array([3e38, -3e38], dtype=np.float32)
    rounded_ends = Rounding(code, Constant(random)).round(ends).astype(np.int64)
    assert np.abs(rounded_ends).max() == levels


@pytest.mark.parametrize(("ring_bits", "sites", "max_weight"), [(16, 7, 31), (32, 1, 1)])
def test_at_the_headroom_bound_the_largest_sum_does_not_wrap_and_one_step_past_it_is_refused(
    ring_bits, sites, max_weight
):
    """sites * max_weight * levels is 2^(bits - 1) - 1: 7 * 31 * 151, and a prime."""
    limit = 2 ** (ring_bits - 1)
    levels = (limit - 1) // (sites * max_weight)
    code = Encoding(
        clip_range=float(levels), step=1.0, ring_bits=ring_bits, max_weight=max_weight, sites=sites
    )
    code.prove_headroom()
    for sign in (1, -1):
        delta = np.array([sign * 1e38, sign * levels], dtype=np.float32)
        total = np.zeros(3, dtype=f"<u{ring_bits // 8}")
        for _ in range(sites):
            total += encode(delta, max_weight, code, os.urandom)
        weight, mean = decode_sum(total, code)
        assert weight == sites * max_weight
        assert int(signed(total)[1]) == sign * (limit - 1)
        assert (np.sign(mean) == sign).all()
    past = Encoding(
        clip_range=float(levels + 1),
        step=1.0,
        ring_bits=ring_bits,
        max_weight=max_weight,
        sites=sites,
    )
    with pytest.raises(PlanError) as caught:
        past.prove_headroom()
    assert caught.value.field == "aggregation.step"
    with pytest.raises(PlanError):
        encode(np.zeros(1, dtype=np.float32), 1, past, os.urandom)


@pytest.mark.parametrize("ring_bits", [16, 32])
def test_a_sum_of_exactly_half_the_ring_is_refused(ring_bits):
    """It would be read as its own negative."""
    half = float(2 ** (ring_bits - 1))
    code = encoding(clip_range=half / 2, step=1.0, ring_bits=ring_bits, max_weight=1, sites=2)
    with pytest.raises(PlanError):
        code.prove_headroom()
    msgspec.structs.replace(code, clip_range=half / 2 - 1).prove_headroom()


@pytest.mark.parametrize(
    "fields",
    [
        {"sites": 2**25},
        {"max_weight": 2**25},
        {"step": 1e-9},
        {"step": 1e-320, "clip_range": 1e300},
        {"ring_bits": 16, "sites": 100},
    ],
)
def test_an_encoding_whose_sum_could_wrap_is_refused(fields):
    encoding().prove_headroom()
    with pytest.raises(PlanError):
        encoding(**fields).prove_headroom()


def test_the_step_that_the_refusal_recommends_is_accepted():
    limit_step = 10 * 4 * 1.0 / 2**31
    with pytest.raises(PlanError) as caught:
        encoding(step=limit_step).prove_headroom()
    assert f"{limit_step:.3g}" in str(caught.value)
    encoding(step=1.01 * limit_step).prove_headroom()


@given(
    weights=st.lists(st.integers(1, 4), min_size=1, max_size=10),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_decoded_mean_is_the_weighted_mean_of_the_levels(weights, seed):
    generator = np.random.default_rng(seed)
    code = encoding()
    vectors = [
        encode(generator.uniform(-1.2, 1.2, 5).astype(np.float32), weight, code, os.urandom)
        for weight in weights
    ]
    total = np.zeros(6, dtype="<u4")
    for vector in vectors:
        total += vector
    expected = sum(signed(vector)[1:].astype(np.float64) for vector in vectors) / sum(weights)
    weight, mean = decode_sum(total, code)
    assert weight == sum(weights)
    assert np.allclose(mean, expected * code.step, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, CHUNK, CHUNK + 5])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(value, place):
    delta = np.zeros(CHUNK + 10, dtype=np.float32)
    delta[place] = value
    with pytest.raises(LocalProtocolError) as caught:
        encode(delta, 1, encoding(), os.urandom)
    assert caught.value.check == "delta-values"


@pytest.mark.parametrize("weight", [0, 5, -1])
def test_a_weight_past_the_plan_is_refused(weight):
    with pytest.raises(LocalProtocolError) as caught:
        encode(np.zeros(1, dtype=np.float32), weight, encoding(), os.urandom)
    assert caught.value.check == "weight"


@pytest.mark.parametrize("delta", [np.zeros(2), np.zeros((2, 2), dtype=np.float32)])
def test_a_delta_of_another_type_or_shape_is_refused(delta):
    with pytest.raises(LocalProtocolError) as caught:
        encode(delta, 1, encoding(), os.urandom)
    assert caught.value.check == "delta-type"


@pytest.mark.parametrize(
    ("total", "check"),
    [
        ([0, 0, 0], "total-weight"),
        ([41, 0, 0], "total-weight"),
        ([2**32 - 1, 0, 0], "total-weight"),
        ([2, 0, 201], "sum-out-of-range"),
        ([2, 2**32 - 201, 0], "sum-out-of-range"),
        ([2, 2**31, 0], "sum-out-of-range"),
    ],
)
def test_a_sum_that_no_honest_vectors_give_is_refused(total, check):
    decode_sum(np.array([40, 4000, 2**32 - 4000], dtype="<u4"), encoding())
    with pytest.raises(RemoteProtocolError) as caught:
        decode_sum(np.array(total, dtype="<u4"), encoding())
    assert caught.value.check == check


def test_the_encoding_of_a_plan_takes_its_numbers_from_it(make_plan):
    aggregation = Aggregation(threshold=2, clip_range=0.5, step=1e-3, ring_bits=16, max_weight=1)
    assert encoding_of(make_plan(aggregation=aggregation), 12) == Encoding(
        clip_range=0.5, step=1e-3, ring_bits=16, max_weight=1, sites=12
    )


def test_a_mean_is_added_in_place_to_vectors_that_follow_one_another() -> None:
    code = encoding()
    total = np.random.default_rng(3).integers(-40, 40, 2 * CHUNK + 8).astype("<i4").view("<u4")
    total[0] = 2
    _, mean = decode_sum(total, code)
    targets = [np.full(shape, 0.5, np.float32) for shape in ((CHUNK + 3,), (2, 2), (CHUNK,))]
    add_mean(total, code, targets)
    assert np.array_equal(
        np.concatenate([one.reshape(-1) for one in targets]), mean + np.float32(0.5)
    )
