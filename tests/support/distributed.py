"""A plan in distributed mode, for what does not depend on how much its noise is worth."""

import msgspec

from umbel_common.plans.plan import DistributedPrivacy, NoOptimizer, TrainingPlan

SHARED = DistributedPrivacy(
    epsilon=8.0,
    delta=1e-5,
    clip_norm=1.0,
    sampling_rate=0.1,
    noise_bits=4,
    honest=2,
    least_survivors=2,
    most_attempts=10,
)


def distributed(plan: TrainingPlan) -> TrainingPlan:
    """The plan with one step a round, whose noise two sites share."""
    training = msgspec.structs.replace(plan.training, local_steps=1, optimizer=NoOptimizer())
    return msgspec.structs.replace(plan, privacy=SHARED, training=training)
