"""The sampling rate and the noise multiplier of one site under one plan (ADR 3).

This module is part of the core of the privacy guarantee. Never add a figure of the records, round
noise down, or give a federated plan its noise without the cost of its evaluation.
"""

from dataclasses import dataclass

import msgspec

from umbel_client.privacy.accounting import DpEvent, calibrate, require_delta
from umbel_client.privacy.shared_noise import grid_for, shares_of
from umbel_common.errors import CalibrationError, DataError
from umbel_common.plans.plan import DistributedPrivacy, LocalPrivacy, TrainingPlan


@dataclass(frozen=True)
class SiteNoise:
    """The sampling rate and the noise multiplier of one site; both stay at the site."""

    sampling_rate: float
    """Probability with which each unit (record, or patient) is in a batch."""
    noise_multiplier: float | None
    """Standard deviation of the noise in units of the clip norm; None without privacy."""

    def event(self, steps: int) -> DpEvent | None:
        """Returns the DP event of some training steps; None without privacy."""
        if self.noise_multiplier is None:
            return None
        return DpEvent(self.noise_multiplier, self.sampling_rate, steps)


def noise_for(plan: TrainingPlan, public_size: int) -> SiteNoise:
    """Noise for the plan's epsilon at the sampling rate of a site with this public size (ADR 3).

    In distributed mode, the plan says the numbers, and no size does: it is what this site's own
    share of the noise is worth by itself.

    Raises:
        DataError: the plan expects a larger batch.
        CalibrationError, PolicyRefusal: the plan's epsilon or delta cannot be had with this size.
    """
    if isinstance(plan.privacy, DistributedPrivacy):
        require_delta(plan.privacy.delta, public_size)
        alone = shares_of(plan).noise_multiplier(1)
        return SiteNoise(plan.privacy.sampling_rate, alone)
    rate = sampling_rate(plan, public_size)
    if not isinstance(plan.privacy, LocalPrivacy):
        return SiteNoise(rate, None)
    require_delta(plan.privacy.delta, public_size)
    noise = calibrate(
        plan.privacy.epsilon,
        plan.privacy.delta,
        rate,
        plan.training.steps,
        evaluation_event(plan, rounds=plan.training.rounds),
    )
    return SiteNoise(rate, noise)


def noise_alone(plan: TrainingPlan, public_size: int) -> SiteNoise:
    """Noise for the plan's epsilon and delta, for one who trains alone and releases nothing.

    Unlike `noise_for`, it leaves nothing for counts of held-out records, and takes the plan's delta
    however many records there are.

    Raises:
        DataError: the plan expects a larger batch.
        CalibrationError: the plan's epsilon cannot be had with this size.
    """
    if isinstance(plan.privacy, DistributedPrivacy):
        return SiteNoise(plan.privacy.sampling_rate, shares_of(plan).noise_multiplier(1))
    rate = sampling_rate(plan, public_size)
    if not isinstance(plan.privacy, LocalPrivacy):
        return SiteNoise(rate, None)
    noise = calibrate(plan.privacy.epsilon, plan.privacy.delta, rate, plan.training.steps)
    return SiteNoise(rate, noise)


def plan_alone(plan: TrainingPlan, public_size: int) -> TrainingPlan:
    """The plan for one who trains alone: in distributed mode, with noise that is not shared.

    The grid gives one site's noise the whole of what the plan's epsilon asks for, and the sum is
    divided by this site's own expected batch.

    Raises:
        CalibrationError: the plan's epsilon cannot be had by one site.
    """
    privacy, aggregation = plan.privacy, plan.aggregation
    if not isinstance(privacy, DistributedPrivacy):
        return plan
    multiplier = calibrate(
        privacy.epsilon, privacy.delta, privacy.sampling_rate, plan.training.rounds
    )
    grid = grid_for(
        multiplier,
        honest=1,
        bits=privacy.noise_bits,
        clip_norm=privacy.clip_norm,
        coordinates=shares_of(plan).coordinates,
    )
    if grid is None:
        raise CalibrationError(
            "rounding costs more noise than one site has",
            field="privacy.noise_bits",
            found=privacy.noise_bits,
            remedy="train alone under a plan of local mode",
        )
    batch = max(1, round(privacy.sampling_rate * public_size))
    return msgspec.structs.replace(
        plan,
        privacy=msgspec.structs.replace(privacy, honest=1),
        aggregation=msgspec.structs.replace(aggregation, step=grid),
        training=msgspec.structs.replace(plan.training, expected_batch_size=batch),
    )


def evaluation_event(plan: TrainingPlan, *, rounds: int) -> DpEvent | None:
    """The DP event of the counts of some rounds; None if the plan has no evaluation.

    Args:
        rounds: how many of the plan's rounds are counted.
    """
    if plan.evaluation is None:
        return None
    return DpEvent(plan.evaluation.noise_multiplier, 1.0, rounds)


def sampling_rate(plan: TrainingPlan, public_size: int) -> float:
    """Probability with which each unit (record, or patient) is in a batch.

    Raises:
        DataError: the data set is smaller than a batch is expected to be.
    """
    expected = plan.training.expected_batch_size
    if public_size < expected:
        raise DataError(
            "the data set is smaller than the batch that the plan expects",
            field="training.expected_batch_size",
            found=f"{public_size} records",
            accepted=f"at least {expected} records",
            remedy="agree on a smaller expected batch size, or leave this site out",
        )
    return expected / public_size
