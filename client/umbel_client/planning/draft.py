"""The plan that is made of a draft with the base model's folder."""

from pathlib import Path

from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.adapters.targets import all_linear
from umbel_client.models.base.architecture import require_context
from umbel_client.models.base.skeleton import skeleton
from umbel_client.planning.draft_file import Draft, model_folder, plan_of, read_draft
from umbel_client.planning.start import started
from umbel_common.plans.plan import TrainingPlan


def make_plan(draft: Draft, folder: Path) -> TrainingPlan:
    """Makes the plan of a draft, without its `[start]` (`umbel_client.planning.start`).

    Args:
        folder: where relative paths start.

    Raises:
        DataError: the release gate's holdout cannot be read.
        ModelError, PlanError: the model lacks a target of the draft, or cannot read texts as long
            as the task's; or the parts of the plan do not fit together.
    """
    model = model_folder(draft, folder)
    require_context(model, skeleton(model, draft.task), draft.task)
    targets = draft.lora.target_modules
    lora = plan_lora(
        model,
        draft.task,
        rank=draft.lora.rank,
        alpha=draft.lora.alpha,
        target_modules=all_linear(model, draft.task) if targets == "all-linear" else targets,
        layers=draft.lora.layers,
        method=draft.lora.method,
        seed=draft.seed,
        scaling=draft.lora.scaling,
    )
    return plan_of(draft, folder, model, lora)


def read_plan(path: Path) -> TrainingPlan:
    """Makes the plan of a draft's file.

    Raises:
        ConfigError, DataError, ModelError, PlanError: see `read_draft` and `make_plan`.
    """
    draft, folder = read_draft(path), path.absolute().parent
    return started(make_plan(draft, folder), draft, folder)[0]
