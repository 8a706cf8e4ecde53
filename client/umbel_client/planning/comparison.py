"""What epsilon buys in each mode: noise, totals, attempts, dropouts and bytes, from plans.

Each row is computed from a plan that could be signed, by the same functions as at a site.
"""

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import msgspec

from umbel_client.planning.distributed import DraftDistributed, planned
from umbel_client.planning.draft_file import Draft
from umbel_client.planning.proposal import (
    Cohort,
    Outline,
    Shape,
    cohort_of,
    draft_text,
    promise_of,
    proposed,
    read_outline,
    require_batch,
    shape_of,
)
from umbel_client.privacy.attempt_cost import attempt_cost
from umbel_client.privacy.calibration import noise_for
from umbel_client.privacy.shared_noise import shares_of
from umbel_common.adapters.reach import largest_step, longest_step
from umbel_common.adapters.vector import size_of
from umbel_common.errors import ConfigError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan, second_version
from umbel_common.plans.requests import Bought, Calibration, CalibrationRequest
from umbel_common.secagg.encoding import encoding_of
from umbel_host.files.text_file import read_text


def calibrate_draft(request: CalibrationRequest) -> Calibration:
    """Proposes the numbers of a draft, and says what each epsilon buys.

    Raises:
        CalibrationError, ConfigError, DataError, ModelError, PlanError: the draft, its model or the
            cohort makes no plan.
    """
    file = Path(request.draft)
    text = read_text(file, ConfigError)
    outline, cohort = read_outline(text, file), cohort_of(request)
    shape, promise = shape_of(request, cohort), promise_of(outline, cohort)
    draft = proposed(outline, cohort, shape, promise, request.rounds)
    require_batch(draft, cohort)
    why = (
        f"Proposed for {cohort.sites} sites with about {cohort.records:,} records, of which"
        f" {cohort.colluding} may collude, by the rules of umbel-server calibrate."
    )
    written = draft_text(text, draft, why, file)
    base = _base(outline, cohort, promise, file.parent)
    rows = tuple(_rows(base, outline, cohort, shape, promise, request))
    own = next(row for row in rows if (row.epsilon, row.proposed) == (promise[0], True))
    # The noise, which is a part of a step's length, is that of the whole plan.
    plan = plan_with(base, draft, cohort.sites) if _can_account() else None
    return Calibration(
        draft=written,
        mode=shape.mode,
        accounted=_can_account(),
        sites=cohort.sites,
        records=cohort.records,
        rounds=draft.training.rounds,
        rows=rows,
        batch=draft.training.expected_batch_size,
        policy=_policy(draft, plan, own, cohort, promise[1]),
    )


def _can_account() -> bool:
    """Whether the packages with the accountants are installed."""
    return find_spec("opacus") is not None


def _base(
    outline: Outline, cohort: Cohort, promise: tuple[float, float], folder: Path
) -> TrainingPlan:
    """A plan with the draft's model, task and adapter, which needs no accountant."""
    draft = proposed(outline, cohort, Shape("local", 0), promise)
    if find_spec("torch") is None:
        from umbel_client.planning.untried import untried_plan

        return untried_plan(draft, folder)
    from umbel_client.planning.draft import make_plan

    return make_plan(draft, folder)


def _rows(
    base: TrainingPlan,
    outline: Outline,
    cohort: Cohort,
    shape: Shape,
    promise: tuple[float, float],
    request: CalibrationRequest,
) -> Iterator[Bought]:
    least = cohort.sites - cohort.threshold
    tolerated = sorted({0, least, cohort.usual_dropouts, shape.dropouts})
    shapes = [Shape("local", least), *(Shape("distributed", number) for number in tolerated)]
    for epsilon in sorted({*request.epsilons, promise[0]}):
        for one in shapes:
            draft = proposed(outline, cohort, one, (epsilon, promise[1]), request.rounds)
            # Where sites share no noise, any number of them down to the threshold makes a sum.
            chosen = one == shape or one.mode == shape.mode == "local"
            yield _bought(base, draft, cohort, one, epsilon=epsilon, proposed=chosen)


def _bought(
    base: TrainingPlan,
    draft: Draft,
    cohort: Cohort,
    shape: Shape,
    *,
    epsilon: float,
    proposed: bool,
) -> Bought:
    kinds = base.lora.kinds_of_rounds(draft.training.rounds)
    width = max(base.vector_length(number) for number in kinds) + 1
    row = Bought(
        epsilon=epsilon,
        mode=shape.mode,
        proposed=proposed,
        dropouts=shape.dropouts,
        honest=cohort.sites - shape.dropouts - cohort.colluding,
        steps=draft.training.steps,
        bytes_sent=width * draft.aggregation.ring_bits // 8,
        bytes_received=4 * max(size_of(base.trained_tensors(number)) for number in kinds),
    )
    if shape.mode == "local":
        row = msgspec.structs.replace(row, honest=1, most_attempts=None)
    if not _can_account():
        return row
    plan = plan_with(base, draft, cohort.sites)
    privacy = plan.privacy
    batch = plan.training.expected_batch_size
    if not isinstance(privacy, DistributedPrivacy):
        noises = [noise_for(plan, size).noise_multiplier or math.inf for size in cohort.sizes]
        return msgspec.structs.replace(
            row,
            noise_multiplier=max(noises),
            noise_of_mean=math.hypot(*noises) / (batch * cohort.sites),
            epsilon_readers=epsilon,
            epsilon_everybody=epsilon,
        )
    cost = attempt_cost(plan)
    assert cost is not None  # the plan is of distributed mode
    found = cost.epsilons(privacy.delta)
    summed = math.sqrt(cohort.sites) * 2.0**privacy.noise_bits * plan.aggregation.step
    return msgspec.structs.replace(
        row,
        noise_multiplier=shares_of(plan).noise_multiplier(privacy.honest),
        noise_of_mean=summed / (batch * privacy.clip_norm),
        epsilon_readers=found.shared,
        epsilon_everybody=found.everybody,
        most_attempts=privacy.most_attempts,
    )


def plan_with(base: TrainingPlan, draft: Draft, sites: int) -> TrainingPlan:
    """A draft's plan, with the model, task and adapter of another plan.

    Raises:
        CalibrationError, PlanError: the draft makes no plan for this number of sites.
    """
    privacy, aggregation = planned(
        draft.privacy, draft.aggregation, draft.training, base.lora, draft.evaluation
    )
    plan = msgspec.structs.replace(
        base, training=draft.training, privacy=privacy, aggregation=aggregation
    )
    if isinstance(privacy, DistributedPrivacy):
        plan = second_version(plan, server=draft.server)
    check_plan(plan)
    encoding_of(plan, sites).prove_headroom()
    return plan


def _policy(
    draft: Draft, plan: TrainingPlan | None, row: Bought, cohort: Cohort, promised_delta: float
) -> dict[str, float]:
    """Values of the policy's fields with which a site accepts the plan of a draft.

    Args:
        plan: of the draft; None where the accountants are not installed. In distributed mode the
            noise is not known then, and `max_clip_range` leaves it out.
        row: of the draft's own promise.
    """
    privacy = draft.privacy
    needed: dict[str, float] = {}
    if row.epsilon_everybody is not None:
        everybody = _up(row.epsilon_everybody)
        needed |= {"max_epsilon": everybody, "total_epsilon": everybody}
    change = draft.aggregation.clip_range or 0.0
    if isinstance(privacy, DraftDistributed):
        needed |= {"max_shared_epsilon": row.epsilon, "total_shared_epsilon": row.epsilon}
        # As `longest_step` does, but for the noise.
        change = max(privacy.clip_norm, change / draft.training.expected_batch_size)
    longest = largest_step(draft.server, change, draft.training.rounds)
    if plan is not None:
        longest = longest_step(plan)
    return needed | {
        "max_delta": promised_delta,
        "max_rounds": draft.training.rounds,
        "max_clip_range": _up(longest),
        "colluding_sites": cohort.colluding,
        "minimum_cohort": cohort.threshold,
    }


def _up(value: float) -> float:
    """With two decimals, and not less."""
    return math.ceil(value * 100) / 100
