"""Epsilon of DP-SGD: Poisson-subsampled Gaussian steps, composed numerically.

There are two accountants, both upper bounds on the true epsilon under add/remove adjacency. PRV
(Gopi, Lee and Wutschitz 2021, "Numerical Composition of Differential Privacy") is tight and gives
the answer in most cases. RDP (Mironov, Talwar and Zhang 2019, section 3.3; converted by Balle et
al. 2020, theorem 21) is looser and never fails. It is used where PRV's grid would take minutes, its
floating point overflows, or delta is close to its rounding. The smaller of two upper bounds is an
upper bound, so `epsilon` returns the smaller one.

This module is part of the core of the privacy guarantee. Never add or change here:

- An accountant that is not an upper bound, such as the central-limit one (GDP).
- An event of another mechanism or another adjacency than Poisson-subsampled Gaussian steps.
- A rounding of epsilon or of a noise multiplier downwards.

Both accountants are Opacus', which imports torch. They are imported where they are used, so that a
ledger can be read and verified without waiting for torch.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np

from umbel_common.canonical import Value
from umbel_common.errors import CalibrationError, PolicyRefusal

SMALLEST_NOISE_MULTIPLIER = 0.2
LARGEST_NOISE_MULTIPLIER = 1e4

_ORDERS = (
    *(1 + tenths / 10 for tenths in range(1, 100)),
    *(float(order) for order in range(11, 64)),
    *(80.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0),
)

_OPACUS_ORDERS = (*_ORDERS[:99], *(float(order) for order in range(12, 64)))
"""Those by which Opacus' `PRVAccountant` finds the width of its grid."""

# Cells of PRV's grids, over all distinct events: 0.2 to 0.4 s on one core. An offer is answered
# with four figures, before any person is asked, and its numbers are the operator's. A coarser grid,
# and in the end RDP alone, keeps any numbers from taking longer.
_MOST_CELLS = 2**18

# Largest error of a coarse grid, and the same as a share of RDP's figure. Past it, PRV tells little
# that RDP does not; the proof of PRV's width is for errors below 1.
_LARGEST_ERROR = 1.0
_LARGEST_ERROR_OF_RDP = 1 / 20

# Above this, PRV's exponentials overflow, and its answer is far too small (710 instead of 500,000
# for a noise multiplier of 0.001). A tight figure has no use there anyway.
_LARGEST_PRV_EPSILON = 100.0

# PRV composes by powers of a Fourier transform in float64, so its delta is off by about 1e-16 for
# each step. Where that is not far below delta, its epsilon may be too small (8 % for delta 1e-12
# after 470,000 steps), and RDP alone answers.
_SMALLEST_PRV_DELTA = 1e-10
_PRV_DELTA_PER_STEP = 1e-14

# Tolerance of calibration, as a share of epsilon. It also keeps the composition of the first
# rounds, which is computed on another grid, below the target.
_SLACK = 1e-3


class DpEvent(Value, frozen=True):
    """Steps of DP-SGD of one kind: what is necessary and sufficient for accounting.

    Raises:
        ValueError: noise multiplier or sampling rate is not positive, the sampling rate is above 1,
            or there is no step.
    """

    noise_multiplier: float
    """Standard deviation of the noise in units of the clip norm."""
    sample_rate: float
    """Probability with which each unit (record, or patient) is in a batch."""
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError("noise_multiplier must be positive and finite")
        if not 0 < self.sample_rate <= 1:
            raise ValueError("sample_rate must be above 0 and at most 1")
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def epsilon(events: Sequence[DpEvent], delta: float) -> float:
    """An upper bound on the epsilon of all `events` together, in any order, at `delta`.

    It is within 1 % of the true value where epsilon is between about 0.2 and 60, in up to 1,000
    steps, and above 1 in up to 10,000. Elsewhere it is looser, with more steps by up to a tenth,
    but still an upper bound. Without events it is 0.

    Raises:
        ValueError: delta is not between 0 and 1.
    """
    if not 0 < delta < 1:
        raise ValueError("delta must be above 0 and below 1")
    return _epsilon(_merged(events), delta)


def _merged(events: Sequence[DpEvent]) -> tuple[DpEvent, ...]:
    """Distinct events in canonical order, each with all its steps."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sample_rate)
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(DpEvent(noise, rate, count) for (noise, rate), count in sorted(steps.items()))


def total_epsilon(events: Sequence[DpEvent | None], delta: float) -> float:
    """As `epsilon`; infinite with a None, which is a release without differential privacy."""
    private = [event for event in events if event is not None]
    return epsilon(private, delta) if len(private) == len(events) else math.inf


@cache
def calibrate(
    epsilon: float, delta: float, sample_rate: float, steps: int, beside: DpEvent | None = None
) -> float:
    """The smallest noise multiplier with which `steps` steps cost at most `epsilon` at `delta`.

    It is rounded up: the steps never cost more than `epsilon`. They cost more than 0.999 of it
    unless `SMALLEST_NOISE_MULTIPLIER` is enough, or epsilon is so large that RDP alone answers.

    Args:
        sample_rate: probability with which each unit is in a batch.
        beside: another event; the two together cost at most `epsilon`.

    Raises:
        CalibrationError: no noise multiplier up to `LARGEST_NOISE_MULTIPLIER` is enough.
    """

    def events(noise: float) -> tuple[DpEvent, ...]:
        own = [DpEvent(noise, sample_rate, steps)]
        return _merged(own if beside is None else [*own, beside])

    def cost(noise: float) -> float:
        return _epsilon(events(noise), delta)

    # RDP's bound takes milliseconds and is rarely twice too high.
    high = 1.0
    while 2 * high <= LARGEST_NOISE_MULTIPLIER and _rdp_epsilon(events(high), delta) > epsilon:
        high *= 2
    if cost(high) > epsilon:
        raise _unreachable(epsilon, delta, sample_rate, steps)
    low = high / 2
    while cost(low) <= epsilon:
        if low <= SMALLEST_NOISE_MULTIPLIER:
            return SMALLEST_NOISE_MULTIPLIER
        high, low = low, max(low / 2, SMALLEST_NOISE_MULTIPLIER)
    return _narrow(cost, epsilon, low, high)


def _narrow(cost: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """Finds the root by the Illinois variant of false position, on logarithms.

    `cost` falls, and `cost(low) > epsilon >= cost(high)`. The result costs at most `epsilon`.
    """
    target = epsilon * (1 - _SLACK / 2)

    def excess(value: float) -> float:
        return math.log(max(value, 1e-300) / target)

    above, below = excess(cost(low)), excess(cost(high))
    moved = ""
    while high / low > 1 + 1e-6 and below < -_SLACK / 2:
        share = above / (above - below)
        middle = low * (high / low) ** min(max(share, 0.01), 0.99)
        spent = cost(middle)
        if spent <= epsilon:
            high, below = middle, excess(spent)
            above = above / 2 if moved == "high" else above
            moved = "high"
        else:
            low, above = middle, excess(spent)
            below = below / 2 if moved == "low" else below
            moved = "low"
    return high


def largest_delta(records: int) -> float:
    """The largest delta for n records, 1 / (10 n): with probability delta, anything about any one
    record may be revealed."""
    return 1 / (10 * records)


def require_delta(delta: float, records: int) -> None:
    """Refuses a delta above `largest_delta`.

    Raises:
        PolicyRefusal: `delta-for-records`.
    """
    accepted = largest_delta(records)
    if not delta <= accepted:
        raise PolicyRefusal(
            "delta-for-records",
            "delta is too large for so few records",
            field="privacy.delta",
            found=delta,
            accepted=f"at most 1 / (10 x {records} records) = {accepted:.3g}",
            remedy="agree on a plan with a smaller delta, or bring more records",
        )


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[DpEvent, ...], delta: float) -> float:
    """As `epsilon`, for distinct events in canonical order."""
    if not events:
        return 0.0
    loose = _rdp_epsilon(events, delta)
    steps = sum(event.steps for event in events)
    if loose > _LARGEST_PRV_EPSILON or delta < max(
        _SMALLEST_PRV_DELTA, _PRV_DELTA_PER_STEP * steps
    ):
        return loose
    fine = min(max(loose / 500, 1e-3), 0.05)
    error = fine * max(1.0, _cells(events, delta, fine) / _MOST_CELLS)
    if error > max(min(loose * _LARGEST_ERROR_OF_RDP, _LARGEST_ERROR), fine):
        return loose
    return min(loose, _prv_epsilon(events, delta, error))


def _prv_epsilon(events: tuple[DpEvent, ...], delta: float, error: float) -> float:
    """PRV's upper bound, at most 2 `error` above the true epsilon; infinite where PRV fails.

    It is what Opacus' `PRVAccountant` answers, bit for bit. That one computes whole RDP curves to
    find the width of its grid, which takes longer than all the rest.
    """
    from opacus.accountants.analysis import prv

    steps = [event.steps for event in events]
    delta_error = delta / 1000
    mesh = error / np.sqrt(sum(steps) * np.log(12 / delta_error) / 2)
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="raise"):
        # SciPy doubts a mean that rounding keeps it from refining. The test against Google's
        # accountant has such an event.
        warnings.filterwarnings("ignore", message="The integral is probably divergent")
        try:
            half = _half_width(events, delta_error, error)
            domain = prv.Domain.create_aligned(-half, half, mesh)
            discrete = [
                prv.discretize(
                    prv.TruncatedPrivacyRandomVariable(
                        prv.PoissonSubsampledGaussianPRV(event.sample_rate, event.noise_multiplier),
                        domain.t_min,
                        domain.t_max,
                    ),
                    domain,
                )
                for event in events
            ]
            together = prv.compose_heterogeneous(dprvs=discrete, num_self_compositions=steps)
            upper = float(together.compute_epsilon(delta, delta_error, error)[2])
        except (ArithmeticError, ValueError, RuntimeError, MemoryError):
            return math.inf
    return max(upper, 0.0) if math.isfinite(upper) else math.inf


def _half_width(events: tuple[DpEvent, ...], delta_error: float, error: float) -> float:
    """Half the width of PRV's grid (Gopi et al. 2021, remark 5.6), over the orders of Opacus."""
    together = _rdp_epsilon(events, delta_error / 4, _OPACUS_ORDERS)
    share = delta_error / (8 * sum(event.steps for event in events))
    single = [(DpEvent(event.noise_multiplier, event.sample_rate, 1),) for event in events]
    alone = [_rdp_epsilon(event, share, _OPACUS_ORDERS) for event in single]
    return max(together, *alone, error) + 3


def _cells(events: tuple[DpEvent, ...], delta: float, error: float) -> float:
    """Cells of PRV's grids: events times width over mesh (Gopi et al. 2021, section 5)."""
    steps = sum(event.steps for event in events)
    width = 2 * _half_width(events, delta / 1000, error)
    mesh = error / math.sqrt(steps * math.log(12_000 / delta) / 2)
    return len(events) * width / mesh


def _rdp_epsilon(
    events: tuple[DpEvent, ...], delta: float, orders: tuple[float, ...] = _ORDERS
) -> float:
    """RDP's upper bound (Balle et al. 2020, theorem 21): each order gives one, the best one counts.

    A curve takes milliseconds an order, so few orders are asked. Should the search miss the best,
    its answer is an upper bound all the same.
    """

    @cache
    def bound(index: int) -> float:
        order = orders[index]
        curve = sum(
            event.steps * _rdp(event.noise_multiplier, event.sample_rate, order) for event in events
        )
        return curve - (math.log(delta) + math.log(order)) / (order - 1) + math.log1p(-1 / order)

    # The bounds fall up to the best order and rise after it. One is infinite where its curve
    # overflowed, at a large order first.
    low, high = 0, len(orders) - 1
    while low < high:
        middle = (low + high) // 2
        if bound(middle) <= bound(middle + 1):
            high = middle
        else:
            low = middle + 1
    return max(min(map(bound, range(max(low - 1, 0), min(low + 2, len(orders))))), 0.0)


@lru_cache(maxsize=65536)
def _rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """RDP of one step at one order; infinite where floating point overflows."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with np.errstate(all="ignore"):
        try:
            value = compute_rdp(
                q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=[order]
            )
        except (ArithmeticError, ValueError):
            return math.inf
    bound = float(np.asarray(value)[0])
    return bound if math.isfinite(bound) else math.inf


def _unreachable(epsilon: float, delta: float, sample_rate: float, steps: int) -> CalibrationError:
    return CalibrationError(
        f"no noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g} gives the epsilon asked for",
        field="privacy.epsilon",
        found=f"epsilon {epsilon:g}, delta {delta:g}, sampling rate {sample_rate:g}, {steps} steps",
        remedy="ask for a larger epsilon or delta, fewer steps, or a smaller expected batch size",
    )
