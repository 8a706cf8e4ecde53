"""The numbers of a plan in distributed mode: noise, grid and clipping, from what a draft promises.

A site computes epsilon again from the plan, so nothing here is trusted. Numbers that would promise
too little are refused there.
"""

import math
from typing import Annotated, Literal, NamedTuple

import msgspec

from umbel_client.privacy.accounting import DpEvent, calibrate
from umbel_client.privacy.discrete_gaussian import FEWEST_BITS
from umbel_client.privacy.shared_noise import grid_for
from umbel_common.adapters.vector import size_of
from umbel_common.canonical import Value
from umbel_common.errors import PlanError
from umbel_common.plans.largest_sum import largest_cohort, largest_noise
from umbel_common.plans.plan import (
    MOST_STEPS,
    Aggregation,
    Clipping,
    DistributedPrivacy,
    FederatedEvaluation,
    LocalPrivacy,
    Lora,
    NoPrivacy,
    Training,
    Weights,
)
from umbel_common.plans.ranges import Count, Delta, Positive, Scale

_FINE = 0.01
"""Share of its noise that the rounding of each unit may cost, where the ring has room."""
_MOST_ROUNDING = 0.1
"""Share of its noise that it may cost at all."""
_MOST_BITS = 20


class DraftDistributed(Value, frozen=True, tag_field="mode", tag="distributed"):
    """`[privacy]` with `mode = "distributed"`; see `umbel_common.plans.plan.DistributedPrivacy`."""

    epsilon: Positive
    """The promise of the whole job against those who read the sums."""
    delta: Delta
    """Probability with which the promise may fail."""
    clip_norm: Scale
    """Largest contribution of one unit to the sum of a step, in the Euclidean norm."""
    sampling_rate: Annotated[float, msgspec.Meta(gt=0, le=1)]
    """Probability with which each site draws each of its units into a batch: the expected batch
    size divided by the records of all sites together."""
    honest: Annotated[int, msgspec.Meta(ge=1, le=100)]
    """Number of sites in each sum whose noise nobody else may know. With more of them the noise is
    smaller, and more sites must be relied on."""
    least_survivors: Annotated[int, msgspec.Meta(ge=2, le=100)]
    """Fewest sites in a sum. A site refuses the plan if `honest` is larger than this minus the
    number of sites that its policy assumes to collude."""
    spare_attempts: Annotated[int, msgspec.Meta(ge=0, le=100_000)] | None = None
    """Attempts beyond one for each round. All of them are paid for, used or not. Absent: a tenth of
    the rounds, and at least two."""
    clipping: Clipping = "flat"
    """Kind of clipping: `flat` or `automatic`, as in local mode."""


class Numbers(NamedTuple):
    """What follows from a promise."""

    privacy: DistributedPrivacy
    grid: float
    """One step, in units of the gradient."""
    largest_noise: int
    """Bound of the noise in a coordinate of any sum, in steps."""


class DraftAggregation(Value, frozen=True):
    """`[aggregation]`; see `umbel_common.plans.plan.Aggregation`."""

    threshold: Annotated[int, msgspec.Meta(ge=2, le=100)]
    """Number of shares that recover a secret; also the least number of survivors."""
    clip_range: Positive | None = None
    """Bound of each coordinate that a site sends. Local mode needs it. In distributed mode, absent:
    what one site with the whole expected batch could send, or what the ring has room for."""
    step: Positive | None = None
    """Quantisation step. Local mode needs it. In distributed mode it follows from the noise."""
    ring_bits: Literal[16, 32] = 32
    """Number of bits of a masked coordinate. With 16, distributed mode has room for few numbers
    only."""
    weights: Weights = "equal"
    """Weight of a site: `equal`, `size-class` (public, from the roster), or `examples`, its number
    of records, masked. `examples` is refused with differential privacy, because the exact sum of
    the numbers is a release of its own."""
    max_weight: Count = 1
    """Largest weight that a site may use; 1 for `equal`."""

    def planned(self) -> Aggregation:
        """The plan's part where sites do not share their noise.

        Raises:
            PlanError: a number is missing.
        """
        clip_range, step = self.clip_range, self.step
        if clip_range is None or step is None:
            raise PlanError(
                "a delta needs a bound and a quantisation step",
                field="aggregation." + ("clip_range" if clip_range is None else "step"),
                found="no such field",
                accepted="a number, such as "
                + ("clip_range = 1.0" if clip_range is None else "step = 1e-6"),
            )
        return self._with(clip_range, step)

    def _with(self, clip_range: float, step: float) -> Aggregation:
        return Aggregation(
            threshold=self.threshold,
            clip_range=clip_range,
            step=step,
            ring_bits=self.ring_bits,
            weights=self.weights,
            max_weight=self.max_weight,
        )

    def shared(
        self, draft: DraftDistributed, training: Training, numbers: "Numbers"
    ) -> Aggregation:
        """The plan's part where sites share their noise.

        Raises:
            PlanError: the draft names a step; or the ring has no room for a unit's gradient beside
                the noise.
        """
        if self.step is not None:
            raise PlanError(
                "in distributed mode the grid follows from the noise",
                field="aggregation.step",
                found=self.step,
                accepted="no such field",
            )
        grid, most_sites = numbers.grid, largest_cohort(self.threshold)
        room = (2 ** (self.ring_bits - 1) - 1 - numbers.largest_noise) // most_sites
        wanted = self.clip_range or draft.clip_norm * training.expected_batch_size
        clip_range = min(wanted, (room - 1) * grid) if self.clip_range is None else wanted
        if (room - 1) * grid < max(clip_range, draft.clip_norm):
            raise PlanError(
                f"a ring of {self.ring_bits} bits has no room for gradients beside the noise of"
                f" {most_sites} sites",
                field="aggregation.ring_bits" if self.ring_bits == 16 else "aggregation.clip_range",
                found=f"room for {max(room - 1, 0) * grid:.4g} on each coordinate",
                accepted=f"at least {max(clip_range, draft.clip_norm):.4g}",
                remedy="take ring_bits 32, or a smaller clip_range",
            )
        return self._with(clip_range, grid)


def numbers_of(
    draft: DraftDistributed,
    aggregation: DraftAggregation,
    training: Training,
    coordinates: int,
    evaluation: FederatedEvaluation | None,
) -> Numbers:
    """The noise that keeps a draft's promise, and the grid that it is drawn on.

    The noise is a power of two steps, and the grid follows: fine enough that rounding costs a
    hundredth of the noise, as far as the ring and noise of 2^20 steps allow.

    Args:
        coordinates: number of trained coordinates of the round that trains most.

    Raises:
        CalibrationError: no noise keeps the promise.
        PlanError: rounding the coordinates would cost more than a tenth of the noise.
    """
    spare = draft.spare_attempts
    attempts = training.rounds + (max(2, training.rounds // 10) if spare is None else spare)
    counts = None
    if evaluation is not None:
        counts = DpEvent(evaluation.noise_multiplier, 1.0, attempts)
    multiplier = calibrate(draft.epsilon, draft.delta, draft.sampling_rate, attempts, counts)
    most_sites = largest_cohort(aggregation.threshold)

    def noise_of(bits: int) -> int:
        return largest_noise(bits, sites=most_sites, draws=float(attempts) * (coordinates + 2))

    share = multiplier / math.sqrt(draft.honest)
    wanted = math.ceil(math.log2(share * math.sqrt(coordinates) / (2 * _FINE)))
    bits = min(max(wanted, FEWEST_BITS + 4), _MOST_BITS)
    # Half of the ring is left for what sites clip to.
    while bits > FEWEST_BITS and noise_of(bits) > 2 ** (aggregation.ring_bits - 2):
        bits -= 1
    while bits > FEWEST_BITS and 2.0**bits / share > MOST_STEPS:
        bits -= 1
    grid = grid_for(
        multiplier,
        honest=draft.honest,
        bits=bits,
        clip_norm=draft.clip_norm,
        coordinates=coordinates,
    )
    rounding = math.inf
    if grid is not None:
        rounding = math.sqrt(draft.honest) * 2.0**bits * grid / (multiplier * draft.clip_norm) - 1
    if grid is None or rounding > _MOST_ROUNDING:
        raise PlanError(
            f"rounding {coordinates:,} coordinates costs too much noise in a ring of"
            f" {aggregation.ring_bits} bits",
            field="aggregation.ring_bits",
            found=f"{rounding:.0%} more noise",
            accepted=f"at most {_MOST_ROUNDING:.0%}",
            remedy="take ring_bits 32, train fewer numbers, or promise a larger epsilon",
        )
    privacy = DistributedPrivacy(
        epsilon=draft.epsilon,
        delta=draft.delta,
        clip_norm=draft.clip_norm,
        clipping=draft.clipping,
        sampling_rate=draft.sampling_rate,
        noise_bits=bits,
        honest=draft.honest,
        least_survivors=draft.least_survivors,
        most_attempts=attempts,
    )
    return Numbers(privacy, grid, noise_of(bits))


def planned(
    privacy: LocalPrivacy | NoPrivacy | DraftDistributed,
    aggregation: DraftAggregation,
    training: Training,
    lora: Lora,
    evaluation: FederatedEvaluation | None,
) -> tuple[LocalPrivacy | NoPrivacy | DistributedPrivacy, Aggregation]:
    """The plan's privacy and aggregation.

    Raises:
        CalibrationError, PlanError: see `numbers_of` and `DraftAggregation`.
    """
    if not isinstance(privacy, DraftDistributed):
        return privacy, aggregation.planned()
    rounds = (lora.trained(number) for number in lora.kinds_of_rounds(training.rounds))
    coordinates = max(size_of(tensors) for tensors in rounds)
    numbers = numbers_of(privacy, aggregation, training, coordinates, evaluation)
    return numbers.privacy, aggregation.shared(privacy, training, numbers)
