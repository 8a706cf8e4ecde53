"""Shamir's scheme: any t shares recover the secret, t - 1 shares fit every secret."""

import os
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel_common.errors import LocalProtocolError
from umbel_common.secagg.shamir import (
    PRIME,
    decode,
    draw_element,
    is_element,
    recover,
    split,
)

secrets = st.integers(0, PRIME - 1).map(lambda value: value.to_bytes(32, "big"))
cohorts = st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


def lagrange_at_zero(points: dict[int, int]) -> int:
    """The textbook formula over the rationals, reduced modulo the prime at the end."""
    total = Fraction(0)
    for x, y in points.items():
        term = Fraction(y)
        for other in points:
            if other != x:
                term *= Fraction(0 - other, x - other)
        total += term
    return total.numerator * pow(total.denominator, -1, PRIME) % PRIME


def test_the_modulus_is_prime():
    """Fermat's test to many bases; tables say that 2^256 - 189 is the largest prime below 2^256."""
    assert PRIME == 2**256 - 189
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in range(2, 60))


@given(secret=secrets, cohort=cohorts, data=st.data())
def test_any_threshold_of_shares_recovers_the_secret(secret, cohort, data):
    size, threshold = cohort
    points = list(range(1, size + 1))
    shares = dict(zip(points, split(secret, points, threshold, os.urandom), strict=True))
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, size))]
    assert recover({point: shares[point] for point in chosen}) == secret


@given(secret=secrets, cohort=cohorts)
def test_recovery_agrees_with_the_textbook_formula(secret, cohort):
    size, threshold = cohort
    points = list(range(1, size + 1))
    shares = dict(zip(points, split(secret, points, threshold, os.urandom), strict=True))
    few = {point: shares[point] for point in points[-threshold:]}
    ints = {point: int.from_bytes(share, "big") for point, share in few.items()}
    assert int.from_bytes(recover(few), "big") == lagrange_at_zero(ints)


def test_a_published_example_over_the_integers():
    """Shares of f(x) = 1234 + 166 x + 94 x^2 (the standing example of the literature)."""
    values = {1: 1494, 2: 1942, 3: 2578, 4: 3402, 5: 4414, 6: 5614}
    for chosen in combinations(values, 3):
        shares = {x: values[x].to_bytes(32, "big") for x in chosen}
        assert int.from_bytes(recover(shares), "big") == 1234


@given(secret=secrets, claimed=secrets, threshold=st.integers(2, 10))
def test_one_share_too_few_is_consistent_with_every_secret(secret, claimed, threshold):
    points = list(range(1, threshold + 1))
    shares = dict(zip(points, split(secret, points, threshold, os.urandom), strict=True))
    few = {point: shares[point] for point in points[:-1]}
    # The polynomial through the claimed secret and the t - 1 shares has a value at the last point,
    # and that value is a share that gives exactly this secret.
    last = points[-1]
    known = {0: int.from_bytes(claimed, "big")} | {
        point: int.from_bytes(share, "big") for point, share in few.items()
    }
    shifted = {x - last: y for x, y in known.items()}
    missing = lagrange_at_zero(shifted).to_bytes(32, "big")
    assert recover({**few, last: missing}) == claimed


def test_shares_of_one_secret_differ_each_time():
    first = split(bytes(32), [1, 2, 3], 2, os.urandom)
    second = split(bytes(32), [1, 2, 3], 2, os.urandom)
    assert not set(first) & set(second)


def test_a_single_share_is_uniform_in_its_leading_bit():
    ones = sum(split(bytes(32), [1, 2], 2, os.urandom)[0][0] >> 7 for _ in range(4000))
    assert 1800 < ones < 2200


def test_coefficients_past_the_prime_are_drawn_again():
    draws = iter([PRIME.to_bytes(32, "big"), b"\xff" * 32, (PRIME - 1).to_bytes(32, "big")])
    assert draw_element(lambda size: next(draws)) == (PRIME - 1).to_bytes(32, "big")


def test_the_prime_itself_is_no_element():
    assert is_element((PRIME - 1).to_bytes(32, "big"))
    assert not is_element(PRIME.to_bytes(32, "big"))
    assert not is_element(bytes(31))


@pytest.mark.parametrize(
    ("secret", "points", "threshold", "check"),
    [
        (PRIME.to_bytes(32, "big"), [1, 2], 2, "secret"),
        (bytes(32), [0, 1], 2, "points"),
        (bytes(32), [1, 1], 2, "points"),
        (bytes(32), [], 1, "points"),
        (bytes(32), [1, 2], 3, "threshold"),
        (bytes(32), [1, 2], 0, "threshold"),
    ],
)
def test_a_sharing_that_makes_no_sense_is_refused(secret, points, threshold, check):
    with pytest.raises(LocalProtocolError) as caught:
        split(secret, points, threshold, os.urandom)
    assert caught.value.check == check


def test_a_share_at_zero_is_not_recovered_from():
    with pytest.raises(LocalProtocolError):
        recover({0: bytes(32)})


@st.composite
def words(draw, errors):
    """A secret's shares, some of them wrong: (secret, threshold, shares, points of wrong ones)."""
    threshold = draw(st.integers(1, 12))
    count = draw(st.integers(threshold, threshold + 9))
    points = draw(st.permutations(range(1, 25)))[:count]
    secret = draw(secrets)
    shares = dict(zip(points, split(secret, points, threshold, os.urandom), strict=True))
    wrong = points[: draw(errors((count - threshold) // 2, count))]
    for point in wrong:
        shares[point] = draw(secrets.filter(lambda share, right=shares[point]: share != right))
    return secret, threshold, shares, tuple(sorted(wrong))


@given(word=words(lambda radius, count: st.integers(0, radius)))
def test_decoding_recovers_the_secret_and_names_exactly_the_wrong_shares(word):
    secret, threshold, shares, wrong = word
    decoded = decode(shares, threshold)
    assert decoded.secret == secret
    assert tuple(sorted(decoded.wrong)) == wrong


@given(word=words(lambda radius, count: st.integers(radius + 1, count)))
def test_past_its_radius_decoding_never_names_more_wrong_shares_than_the_radius(word):
    _, threshold, shares, _ = word
    decoded = decode(shares, threshold)
    assert decoded is None or len(decoded.wrong) <= (len(shares) - threshold) // 2


def test_random_words_past_the_radius_are_not_decoded():
    points = list(range(1, 11))
    shares = dict(zip(points, split(bytes(32), points, 6, os.urandom), strict=True))
    for point in points[:3]:
        shares[point] = draw_element(os.urandom)
    assert decode(shares, 6) is None


def test_wrong_shares_that_lie_on_another_polynomial_win_once_they_are_many():
    """This is why a decoded secret is checked: past the radius, liars can agree on another one."""
    points = list(range(1, 8))
    honest = split(bytes(32), points, 3, os.urandom)
    lie = split(bytes(31) + b"\1", points, 3, os.urandom)
    shares = dict(zip(points, (*honest[:2], *lie[2:]), strict=True))
    assert decode(shares, 3).secret == bytes(31) + b"\1"


def test_the_zero_secret_of_a_zero_polynomial_is_decoded():
    shares = {point: bytes(32) for point in range(1, 6)}
    decoded = decode({**shares, 2: b"\1" * 32}, 3)
    assert (decoded.secret, decoded.wrong) == (bytes(32), (2,))


def test_fewer_shares_than_the_threshold_are_not_decoded():
    with pytest.raises(LocalProtocolError) as caught:
        decode({1: bytes(32), 2: bytes(32)}, 3)
    assert caught.value.check == "threshold"
