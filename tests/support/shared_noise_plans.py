"""Plans of distributed mode, whose noise is calibrated as a plan's maker does it."""

from typing import Any

import msgspec

from umbel_client.privacy.accounting import calibrate
from umbel_client.privacy.shared_noise import grid_for
from umbel_common.plans.plan import (
    DistributedPrivacy,
    LoraAdapter,
    NoOptimizer,
    ScoreEvaluation,
    Training,
    TrainingPlan,
    TrainingPlan2,
)
from umbel_common.plans.server_optimizer import ServerSgd

NOISE_BITS = 20


def shared_noise_plan(
    plan: TrainingPlan,
    *,
    epsilon: float = 1.0,
    delta: float = 1e-5,
    honest: int = 3,
    least_survivors: int = 4,
    sampling_rate: float = 0.0927,
    attempts: int = 100,
    evaluation: ScoreEvaluation | None = None,
    **parts: Any,
) -> TrainingPlan2:
    """A plan like another one, whose sites share their noise: it costs just what it claims.

    The cost of an evaluation is not kept free.

    Args:
        parts: of the plan, instead of those here.
    """
    lora = LoraAdapter(**msgspec.structs.asdict(plan.lora))
    sizes = (sum(one.size for one in plan.trained_tensors(n)) for n in plan.kinds_of_rounds)
    grid = grid_for(
        calibrate(epsilon, delta, sampling_rate, attempts),
        honest=honest,
        bits=NOISE_BITS,
        clip_norm=1.0,
        coordinates=max(sizes),
    )
    assert grid is not None
    fields: dict[str, Any] = {
        "federation": plan.federation,
        "job": plan.job,
        "model": plan.model,
        "task": plan.task,
        "lora": lora,
        "training": Training(
            rounds=plan.training.rounds,
            local_steps=1,
            expected_batch_size=plan.training.expected_batch_size,
            optimizer=NoOptimizer(),
        ),
        "privacy": DistributedPrivacy(
            epsilon=epsilon,
            delta=delta,
            clip_norm=1.0,
            sampling_rate=sampling_rate,
            noise_bits=NOISE_BITS,
            honest=honest,
            least_survivors=least_survivors,
            most_attempts=attempts,
        ),
        "aggregation": msgspec.structs.replace(plan.aggregation, step=grid, clip_range=1.0),
        "evaluation": evaluation,
        "own_server": ServerSgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
    }
    return TrainingPlan2(**{**fields, **parts})
