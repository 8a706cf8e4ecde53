"""Deltas as elements of the ring Z_2^16 or Z_2^32: clipped, stochastically rounded, weighted.

The law: no sum may wrap, and `prove_headroom` proves it before anything is encoded. Each coordinate
is clipped before it is rounded. Nothing that is not finite is encoded.

A site's vector is `[w, w*q_1, ..., w*q_n]` modulo 2^bits. The sum over sites has the total weight
and the weighted sum of deltas, and shows neither for any one site.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NoReturn, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from umbel_common.adapters.server_step import Integers, add_scaled
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import Entropy, Value, digest
from umbel_common.errors import LocalProtocolError, PlanError, require
from umbel_common.plans.largest_sum import noise_in_sum
from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan, levels
from umbel_common.plans.ranges import Positive
from umbel_common.secagg.primitives import KEY_BYTES, Keystream, draw

RingVector: TypeAlias = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
"""A vector uint16[n] or uint32[n], little-endian; its arithmetic is modulo 2^16 or 2^32."""

CHUNK = 2**14
"""Number of coordinates rounded at a time, so that their temporaries stay in the L2 cache."""

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]


class Encoding(Value, frozen=True):
    """How the deltas of up to `sites` sites become elements of one ring."""

    clip_range: Positive
    """Bound of each coordinate, which is clipped to [-clip_range, clip_range]."""
    step: Positive
    """Distance of neighbouring levels, in units of the delta."""
    ring_bits: Literal[16, 32]
    max_weight: PositiveInt
    sites: PositiveInt
    """Upper bound on the size of the cohort."""

    @property
    def levels(self) -> int:
        """Largest magnitude of a rounded coordinate: ceil(clip_range / step)."""
        return levels(self.clip_range, self.step)

    def prove_headroom(self) -> None:
        """Proves that no sum can wrap, whatever the deltas and the random bits are.

        A clipped coordinate x has |x / step| <= L with L = `levels`. Stochastic rounding moves it
        to one of the two integers around it; since -L and L are integers, it stays within them. So
        a site adds at most max_weight * L in magnitude, and `sites` sites add at most
        S = sites * max_weight * L. Two's complement holds every sum if S < 2^(bits - 1). Since
        L >= 1, the total weight, at most sites * max_weight <= S, fits into the unsigned ring too.
        With noise (`NoisyEncoding`), its bound is a part of S.

        Raises:
            PlanError: S could reach 2^(bits - 1).
        """
        limit = 2 ** (self.ring_bits - 1)
        per_level = self.sites * self.max_weight
        # The quotient is compared as a float first, because it may be infinite and have no ceiling.
        if not self.clip_range / self.step < limit or self.bound(per_level) >= limit:
            self._refuse(limit)

    def bound(self, weight: int) -> int:
        """Largest magnitude of a coordinate of a sum with this total weight, in steps."""
        return weight * self.levels

    def _refuse(self, limit: int) -> NoReturn:
        per_level = self.sites * self.max_weight
        raise PlanError(
            f"a sum of {self.sites} deltas could wrap in a ring of {self.ring_bits} bits",
            field="aggregation.step",
            found=f"{self.step} with clip_range {self.clip_range} and max_weight {self.max_weight}",
            accepted=f"sites * max_weight * ceil(clip_range / step) below 2^{self.ring_bits - 1}",
            remedy=f"take a step above {per_level * self.clip_range / limit:.3g}, a smaller "
            "clip_range or max_weight, or ring_bits 32",
        )


class NoisyEncoding(Encoding, frozen=True, kw_only=True):
    """How the integer sums of sites that share their noise become elements of one ring."""

    largest_noise: Annotated[int, msgspec.Meta(ge=0)]
    """Magnitude, in steps, that the noise in no coordinate of any sum of the job exceeds, but with
    probability 2^-40 (`umbel_common.plans.largest_sum`)."""

    def bound(self, weight: int) -> int:
        """Largest magnitude of a coordinate of a sum with this total weight, in steps."""
        return super().bound(weight) + self.largest_noise

    def _refuse(self, limit: int) -> NoReturn:
        raise PlanError(
            f"a sum of {self.sites} noisy vectors could wrap in a ring of {self.ring_bits} bits",
            field="privacy.noise_bits",
            found=f"{self.sites} sites of at most {self.levels} steps each, and noise of at most"
            f" {self.largest_noise} steps",
            accepted=f"less than 2^{self.ring_bits - 1} in sum",
            remedy="take a smaller clip_range, fewer noise_bits, or ring_bits 32",
        )


def encoding_of(plan: TrainingPlan, sites: int) -> Encoding:
    """The encoding that a plan prescribes for a cohort of at most `sites` sites."""
    aggregation = plan.aggregation
    encoding = Encoding(
        clip_range=aggregation.clip_range,
        step=aggregation.step,
        ring_bits=aggregation.ring_bits,
        max_weight=aggregation.max_weight,
        sites=sites,
    )
    if not isinstance(plan.privacy, DistributedPrivacy):
        return encoding
    noise = noise_in_sum(plan, sites)
    return NoisyEncoding(**msgspec.structs.asdict(encoding), largest_noise=noise)


def encode(delta: Vector, weight: int, encoding: Encoding, entropy: Entropy) -> RingVector:
    """The ring vector `[w, w*q]` of one site, uint[n + 1] of `encoding.ring_bits` bits.

    q is delta / step, clipped, then rounded up with a probability equal to its fractional part f.
    The mean of q is exact up to 2^-32 of a step, and its variance is f(1 - f).

    Args:
        delta: float32[n], finite.
        weight: 1 to `encoding.max_weight`.
        entropy: drawn from once, for the key of the rounding's keystream.

    Raises:
        PlanError: a sum could wrap.
        LocalProtocolError: `weight`, `delta-type`, or `delta-values` for a value that is not
            finite.
    """
    encoding.prove_headroom()
    if not 1 <= weight <= encoding.max_weight:
        raise LocalProtocolError(
            "weight",
            "a weight is not one that the plan allows",
            found=weight,
            accepted=f"1 to {encoding.max_weight}",
        )
    if delta.dtype != np.float32 or delta.ndim != 1:
        raise LocalProtocolError(
            "delta-type", "a delta has the wrong type", found=delta.dtype, accepted="float32[n]"
        )
    vector = np.empty(delta.size + 1, dtype=f"<u{encoding.ring_bits // 8}")
    vector[0] = weight
    rounding = Rounding(encoding, Keystream(draw(entropy, KEY_BYTES)))
    for start in range(0, delta.size, CHUNK):
        chunk = delta[start : start + CHUNK]
        rounded = rounding.round(chunk)
        target = vector[1 + start : 1 + start + chunk.size]
        # int32 holds the product by the headroom proof; the cast to the ring is modulo 2^bits.
        np.multiply(rounded, np.int32(weight), out=rounded)
        np.copyto(target, rounded, casting="unsafe")
    return vector


def encode_integers(values: npt.NDArray[np.int64], encoding: Encoding) -> RingVector:
    """The ring vector `[1, values]` of one site, uint[n + 1] of `encoding.ring_bits` bits.

    Args:
        values: int64[n], clipped before their noise was added.

    Raises:
        PlanError: a sum could wrap.
        LocalProtocolError: `delta-type`.
    """
    encoding.prove_headroom()
    if values.dtype != np.int64 or values.ndim != 1:
        raise LocalProtocolError(
            "delta-type", "a noisy sum has the wrong type", found=values.dtype, accepted="int64[n]"
        )
    vector = np.empty(values.size + 1, dtype=f"<u{encoding.ring_bits // 8}")
    vector[0] = 1
    # Noise beyond its bound, which happens with probability 2^-40, wraps and is not clipped: a
    # clipped value would tell what the noise hid.
    np.copyto(vector[1:], values, casting="unsafe")
    return vector


class Rounding:
    """Clips and rounds one chunk after the other, in buffers that are used again."""

    def __init__(self, encoding: Encoding, keystream: Keystream) -> None:
        self._encoding = encoding
        self._keystream = keystream
        # One ulp below L + 1: the float64 sum of a value near L and a uniform value may round up.
        self._top = math.nextafter(encoding.levels + 1, 0)
        self._scaled = np.empty(CHUNK, dtype=np.float64)
        self._uniform = np.empty(CHUNK, dtype=np.float64)
        self._random = np.empty(CHUNK, dtype=np.int32)
        self._rounded = np.empty(CHUNK, dtype=np.int32)

    def round(self, chunk: Vector) -> npt.NDArray[np.int32]:
        """Integers in [-levels, levels], valid until the next call."""
        if not np.isfinite(chunk).all():
            raise LocalProtocolError("delta-values", "a delta has values that are not finite")
        encoding = self._encoding
        scaled, uniform = self._scaled[: chunk.size], self._uniform[: chunk.size]
        random, rounded = self._random[: chunk.size], self._rounded[: chunk.size]
        np.clip(chunk, -encoding.clip_range, encoding.clip_range, out=scaled, dtype=np.float64)
        # A division, not a product with 1 / step: it is monotone, so |x| <= clip_range / step <= L.
        np.divide(scaled, encoding.step, out=scaled)
        self._keystream.fill(random.data.cast("B"))
        # Uniform on [0, 1): signed integers convert to float64 in one instruction.
        np.multiply(random, 2.0**-32, out=uniform)
        np.add(uniform, 0.5, out=uniform)
        np.add(scaled, uniform, out=scaled)
        np.minimum(scaled, self._top, out=scaled)
        np.floor(scaled, out=scaled)
        np.copyto(rounded, scaled, casting="unsafe")
        return rounded


def decode_sum(total: RingVector, encoding: Encoding) -> tuple[int, Vector]:
    """The total weight in a sum of vectors, and the weighted mean of the deltas, float32[n].

    Raises:
        RemoteProtocolError: see `total_weight`.
    """
    weight = total_weight(total, encoding)
    mean = np.zeros(total.size - 1, dtype=np.float32)
    add_mean(total, encoding, [mean])
    return weight, mean


def sum_digest(total: RingVector) -> bytes:
    """The digest by which a sum of vectors is named in a signed release, 32 bytes.

    Its label has the size of the ring, so that no sum of one ring is one of another.
    """
    return digest(f"sum-{8 * total.itemsize}", np.ascontiguousarray(total).view(np.uint8).data)


def total_weight(total: RingVector, encoding: Encoding) -> int:
    """The total weight in a sum of vectors, after a check of the whole sum.

    A sum that is refused is not one of honest vectors, or has masks that do not cancel.

    Raises:
        RemoteProtocolError: `total-weight` if the weight is 0 or more than all sites may have;
            `sum-out-of-range` if a coordinate exceeds `Encoding.bound`.
    """
    weight = int(total[0])
    require(
        1 <= weight <= encoding.sites * encoding.max_weight,
        "total-weight",
        "the total weight in a sum is impossible",
        found=weight,
        accepted=f"1 to {encoding.sites * encoding.max_weight}",
    )
    signed = signed_part(total)
    bound = encoding.bound(weight)
    require(
        signed.size == 0 or (-bound <= int(signed.min()) and int(signed.max()) <= bound),
        "sum-out-of-range",
        "a coordinate of a sum is larger than its weight allows",
        accepted=f"at most {bound} in magnitude",
    )
    return weight


def add_mean(total: RingVector, encoding: Encoding, targets: Sequence[Vector]) -> None:
    """Adds the weighted mean of the deltas in a sum to vectors, in place.

    Args:
        total: a sum that `total_weight` accepted.
        targets: consecutive parts of a vector as long as a delta; float32, contiguous, writeable.
    """
    add_scaled(signed_part(total), encoding.step / int(total[0]), targets)


def signed_part(total: RingVector) -> Integers:
    """A sum without its weight, as signed integers: a view."""
    signed: Integers = total[1:].view(np.dtype(f"<i{total.itemsize}"))
    return signed
