"""Shamir's secret sharing (Shamir 1979) of 32-byte secrets over the prime field of 2^256 - 189.

Any `threshold` shares recover the secret; fewer are independent of it. Shares carry no
authentication: whoever recovers a secret checks it against a commitment or a public key.
"""

from collections.abc import Mapping, Sequence
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
        points: x-coordinates, different and not zero: a site's index in the sorted cohort, plus 1.
        threshold: how many shares recover the secret.

    Raises:
        LocalProtocolError: the secret is no field element, a point is zero or repeated, or the
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

    With fewer shares than the threshold, or a wrong one, this is another, random-looking value.

    Raises:
        LocalProtocolError: there is no share, or one at x = 0.
    """
    points = tuple(shares)
    _check_points(points)
    values = (int.from_bytes(share, "big") for share in shares.values())
    weights = _weights_at_zero(points)
    secret = sum(weight * value for weight, value in zip(weights, values, strict=True)) % PRIME
    return secret.to_bytes(SHARE_BYTES, "big")


def _check_points(points: Sequence[int]) -> None:
    distinct = {point % PRIME for point in points}
    if not points or 0 in distinct or len(distinct) != len(points):
        raise LocalProtocolError("points", "x-coordinates must be different and not zero")


def _evaluate(polynomial: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


# Every secret of an attempt is recovered from the same sites' shares: public, and worth keeping.
@lru_cache(maxsize=8)
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
