"""Shamir's secret sharing (Shamir 1979) of 32-byte secrets over the prime field of 2^256 - 189.

The law: a share carries no authentication, so a secret that was recovered is believed only after a
check against a commitment or a public key, which the caller makes. No share is at x = 0, where the
secret is. Coefficients come from `Entropy` alone, each uniform in the field.

Any `threshold` shares recover the secret; fewer are independent of it. More shares than the
threshold are a word of a Reed-Solomon code (McEliece and Sarwate 1981): `decode` finds the secret,
and the wrong shares, where some shares are wrong.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from umbel_common.canonical import Entropy
from umbel_common.errors import LocalProtocolError
from umbel_common.secagg.primitives import draw

PRIME = 2**256 - 189
"""The largest prime below 2^256."""

SHARE_BYTES = 32


def draw_element(entropy: Entropy) -> bytes:
    """A uniform field element, 32 bytes big-endian, by rejection (one draw in 2^248 repeats)."""
    while True:
        data = draw(entropy, SHARE_BYTES)
        if is_element(data):
            return data


def is_element(data: bytes) -> bool:
    """Whether 32 bytes, big-endian, are an integer below the prime."""
    return len(data) == SHARE_BYTES and int.from_bytes(data, "big") < PRIME


def split(
    secret: bytes, points: Sequence[int], threshold: int, entropy: Entropy
) -> tuple[bytes, ...]:
    """One 32-byte share of `secret` for each of `points`, in their order.

    Args:
        secret: 32 bytes, an integer below the prime.
        points: different x-coordinates, none zero: a site's index in the sorted cohort, plus 1.
        threshold: number of shares that recover the secret.

    Raises:
        LocalProtocolError: the secret is not a field element, a point is zero or repeated, or the
            threshold is not in 1 to len(points).
    """
    _check_points(points)
    if not is_element(secret):
        raise LocalProtocolError("secret", "a secret to share is not below the prime")
    if not 1 <= threshold <= len(points):
        raise LocalProtocolError(
            "threshold",
            "a secret cannot be shared with this threshold",
            found=threshold,
            accepted=f"1 to {len(points)}",
        )
    coefficients = [secret, *(draw_element(entropy) for _ in range(threshold - 1))]
    polynomial = [int.from_bytes(coefficient, "big") for coefficient in coefficients]
    return tuple(_evaluate(polynomial, point).to_bytes(SHARE_BYTES, "big") for point in points)


def recover(shares: Mapping[int, bytes]) -> bytes:
    """The 32-byte secret of the polynomial through `shares` (x-coordinate -> share).

    With fewer shares than the threshold, or a wrong one, the result is another, random-looking
    value.

    Raises:
        LocalProtocolError: there is no share, or there is one at x = 0.
    """
    points = tuple(shares)
    _check_points(points)
    values = (int.from_bytes(share, "big") for share in shares.values())
    weights = _weights_at_zero(points)
    secret = sum(weight * value for weight, value in zip(weights, values, strict=True)) % PRIME
    return secret.to_bytes(SHARE_BYTES, "big")


@dataclass(frozen=True)
class Decoded:
    """A secret, and what is known about its shares."""

    secret: bytes
    wrong: tuple[int, ...]
    """x-coordinates of the shares that are not on the secret's polynomial."""


def decode(shares: Mapping[int, bytes], threshold: int) -> Decoded | None:
    """The secret of the one polynomial that at most (m - threshold) // 2 of the m shares miss.

    Gao 2003, "A new algorithm for decoding Reed-Solomon codes", algorithm 1: O(m^2) operations in
    the field. Two polynomials of degree below the threshold agree at fewer than `threshold` points,
    so no second polynomial is as near. The result is None if no polynomial is that near.

    Raises:
        LocalProtocolError: there are fewer shares than the threshold, or there is one at x = 0.
    """
    points = tuple(shares)
    _check_points(points)
    if len(points) < threshold:
        raise LocalProtocolError(
            "threshold",
            "there are too few shares to recover a secret",
            found=len(points),
            accepted=f"at least {threshold}",
        )
    values = [int.from_bytes(share, "big") for share in shares.values()]
    former, rest = _vanishing(points), _interpolate(points, values)
    former_factor, factor = [], [1]
    # Euclid's algorithm, stopped half-way. Then rest = factor * interpolation modulo the first
    # value of `former`, and the roots of `factor` are the points of the wrong shares.
    while 2 * (len(rest) - 1) >= len(points) + threshold:
        quotient, remainder = _divide(former, rest)
        former, rest = rest, remainder
        former_factor, factor = factor, _subtract(former_factor, _multiply(quotient, factor))
    polynomial, remainder = _divide(rest, factor)
    if remainder or len(polynomial) > threshold:
        return None
    wrong = tuple(
        point
        for point, value in zip(points, values, strict=True)
        if _evaluate(polynomial, point) != value
    )
    secret = _evaluate(polynomial, 0)
    return Decoded(secret=secret.to_bytes(SHARE_BYTES, "big"), wrong=wrong)


def _check_points(points: Sequence[int]) -> None:
    distinct = {point % PRIME for point in points}
    if not points or 0 in distinct or len(distinct) != len(points):
        raise LocalProtocolError(
            "points", "x-coordinates must differ from each other and from zero"
        )


def _evaluate(polynomial: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


# Every secret of an attempt is recovered from the same sites' shares; if some are wrong, from as
# many choices of sites as there are sites. So the weights, which are public, are cached.
@lru_cache(maxsize=128)
def _weights_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's basis polynomials at zero: the product of x_j / (x_j - x_i) over all j != i."""
    weights = []
    for point in points:
        numerator = denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(weights)


# A polynomial below is its coefficients from the constant on, without zeros at the end; zero is [].


def _trimmed(coefficients: Iterable[int]) -> list[int]:
    polynomial = [coefficient % PRIME for coefficient in coefficients]
    while polynomial and polynomial[-1] == 0:
        polynomial.pop()
    return polynomial


def _subtract(left: Sequence[int], right: Sequence[int]) -> list[int]:
    size = max(len(left), len(right))
    padded = ([*side, *[0] * (size - len(side))] for side in (left, right))
    return _trimmed(a - b for a, b in zip(*padded, strict=True))


def _multiply(left: Sequence[int], right: Sequence[int]) -> list[int]:
    product = [0] * (len(left) + len(right))
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    return _trimmed(product)


def _divide(dividend: Sequence[int], divisor: Sequence[int]) -> tuple[list[int], list[int]]:
    """Quotient and remainder."""
    remainder = list(dividend)
    inverse = pow(divisor[-1], -1, PRIME)
    quotient = [0] * max(len(dividend) - len(divisor) + 1, 0)
    for shift in reversed(range(len(quotient))):
        scale = remainder[shift + len(divisor) - 1] * inverse % PRIME
        quotient[shift] = scale
        for index, coefficient in enumerate(divisor):
            remainder[shift + index] = (remainder[shift + index] - scale * coefficient) % PRIME
    return _trimmed(quotient), _trimmed(remainder)


def _vanishing(points: Sequence[int]) -> list[int]:
    """The product of (x - point) over all points."""
    product = [1]
    for point in points:
        product = _multiply(product, [-point, 1])
    return product


def _interpolate(points: Sequence[int], values: Sequence[int]) -> list[int]:
    """The polynomial of the smallest degree through all points, by Lagrange's formula."""
    total = [0] * len(points)
    for value, basis in zip(values, _lagrange_basis(tuple(points)), strict=True):
        for index, coefficient in enumerate(basis):
            total[index] += value * coefficient
    return _trimmed(total)


@lru_cache(maxsize=8)
def _lagrange_basis(points: tuple[int, ...]) -> tuple[list[int], ...]:
    """For each point, the polynomial that is 1 there and 0 at the others."""
    vanishing = _vanishing(points)
    basis = []
    for point in points:
        others, _ = _divide(vanishing, [-point, 1])
        scale = pow(_evaluate(others, point), -1, PRIME)
        basis.append([coefficient * scale % PRIME for coefficient in others])
    return tuple(basis)
