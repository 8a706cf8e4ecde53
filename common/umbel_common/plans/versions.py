"""A plan of version 1 as one of version 2, for what only version 2 can name."""

from typing import Any

import msgspec

from umbel_common.plans.plan import (
    LoraAdapter,
    LossGate,
    ScoreEvaluation,
    TrainingPlan,
    TrainingPlan2,
)


def second_version(plan: TrainingPlan, **parts: Any) -> TrainingPlan2:
    """The plan in version 2; a plan of version 2 keeps what `parts` does not replace.

    Args:
        parts: fields of `TrainingPlan2` by name, such as `start`.
    """
    fields: dict[str, Any] = msgspec.structs.asdict(plan) | {"version": 2}
    for name, kind in (
        ("lora", LoraAdapter),
        ("evaluation", ScoreEvaluation),
        ("release_gate", LossGate),
    ):
        if fields[name] is not None:
            fields[name] = kind(**msgspec.structs.asdict(fields[name]))
    return TrainingPlan2(**fields | parts)
