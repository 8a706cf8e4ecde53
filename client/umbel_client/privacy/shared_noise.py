"""Noise that sites share: what the sum of their integer noise promises, by proven bounds.

Each site adds a discrete Gaussian of scale s = 2^bits to its integer sum of clipped gradients. Who
reads only the sum over sites meets the noise of every honest one in it. `NoiseShares` says which
continuous Gaussian mechanism the sum is at least as private as, so that one accountant serves all.

The proof has three parts; docs/privacy.md writes them out. Probabilities are compared up to a
factor, which is below e^(1e-135) for each coordinate here. Even for 10^9 coordinates in 10^6 steps
this adds less to epsilon than the rounding of float64, and what the sampler lacks
(`discrete_gaussian`) adds less than 2^-120 to delta.

1. The sum of the noise of h sites is a discrete Gaussian of scale s sqrt(h) (Kairouz, Liu and
   Steinke 2021, "The Distributed Discrete Gaussian Mechanism", on sums of discrete Gaussians).
2. A discrete Gaussian of scale S around an integer is a continuous Gaussian of variance S^2 - r^2
   around it, rounded by a discrete Gaussian of scale r (Peikert 2010, "An Efficient and Parallel
   Gaussian Sampler for Lattices", theorem 3.1). The second step sees no record: it is
   post-processing.
3. What two neighbouring data sets differ by is at most `NoiseShares.sensitivity` long. Sampling a
   batch mixes such pairs, and a factor between probabilities stays one in a mixture.

This module is part of the core of the privacy guarantee. Never add or change here:

- A sensitivity without the rounding of a record, or a noise multiplier that is rounded up.
- A number of honest sites that follows from who answered: it is fixed in the plan.
- A bound that assumes a distribution of gradients or of batches.
"""

import math
from dataclasses import dataclass

from umbel_client.privacy.accounting import DpEvent
from umbel_common.errors import PlanError
from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan

_ROUNDED = 16.0
"""r^2, the variance in squared steps that part 2 gives up. With r = 4, the sum of a Gaussian over
shifted integers differs from its mean by 2 e^(-2 pi^2 r^2) = 2e-137 of it."""

_FLOAT = 1 + 2.0**-20
"""What the products of a float32 gradient with its factor of clipping can add to its norm, and the
rounding of these formulas."""


@dataclass(frozen=True)
class NoiseShares:
    """The noise of one step of DP-SGD, as each site adds its share."""

    bits: int
    """The scale of one site's noise is 2^bits steps of the grid."""
    grid: float
    """One step of the grid, in units of the gradient."""
    clip_norm: float
    """Largest contribution of one unit, in the Euclidean norm, in units of the gradient."""
    coordinates: int
    """Number of coordinates that are summed."""

    @property
    def sensitivity(self) -> float:
        """Largest contribution of one unit in steps of the grid, in the Euclidean norm.

        A unit's clipped gradient is rounded by itself, each coordinate to the nearest step.
        """
        return self.clip_norm / self.grid * _FLOAT + math.sqrt(self.coordinates) / 2

    def noise_multiplier(self, honest: int) -> float:
        """Noise multiplier of a Gaussian mechanism that is no more private than the sum.

        Args:
            honest: number of sites in the sum whose noise the reader does not know.

        Raises:
            ValueError: no such mechanism exists.
        """
        if honest < 1:
            raise ValueError("a sum without the noise of an honest site promises nothing")
        variance = honest * 4.0**self.bits - _ROUNDED
        return math.sqrt(variance) / self.sensitivity / _FLOAT

    def event(self, honest: int, sample_rate: float, steps: int = 1) -> DpEvent:
        """The DP event of some steps against who knows the noise of all but `honest` sites."""
        return DpEvent(self.noise_multiplier(honest), sample_rate, steps)


def shares_of(plan: TrainingPlan) -> NoiseShares:
    """The noise of a plan whose sites share it.

    The number of coordinates is that of the round that trains most.

    Raises:
        PlanError: its sites do not.
    """
    privacy = plan.privacy
    if not isinstance(privacy, DistributedPrivacy):
        raise PlanError(
            "sites do not share their noise under this plan",
            field="privacy.mode",
            accepted="distributed",
        )
    trained = (plan.trained_tensors(number) for number in plan.kinds_of_rounds)
    return NoiseShares(
        bits=privacy.noise_bits,
        grid=plan.aggregation.step,
        clip_norm=privacy.clip_norm,
        coordinates=max(sum(tensor.size for tensor in tensors) for tensors in trained),
    )


def grid_for(
    noise_multiplier: float, *, honest: int, bits: int, clip_norm: float, coordinates: int
) -> float | None:
    """The grid with which `honest` shares of 2^bits steps give a noise multiplier, or more.

    None: the rounding of the coordinates alone is too large for noise of this scale.
    """
    reach = math.sqrt(honest * 4.0**bits - _ROUNDED) / (noise_multiplier * _FLOAT)
    steps = (reach - math.sqrt(coordinates) / 2) / _FLOAT
    if steps <= 0:
        return None
    # One part in 2^40 more than the quotient, for the rounding of the same formula backwards.
    return clip_norm / steps * (1 + 2.0**-40)
