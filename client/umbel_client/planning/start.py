"""What the plan of a draft starts from: `[start]`, turned into a digest and a tensor."""

import math
from pathlib import Path

import msgspec

from umbel_client.data.tables import read_table, require_columns
from umbel_client.planning.draft_file import Draft, model_folder
from umbel_common.adapters.start import start_from_rows
from umbel_common.adapters.vector import Vector, start_digest
from umbel_common.errors import DataError, PlanError
from umbel_common.plans.check import check_plan
from umbel_common.plans.drafted_start import (
    DraftedLabelNames,
    DraftedReleased,
    DraftedSeed,
    DraftedStart,
)
from umbel_common.plans.plan import (
    Classification,
    Task,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.plans.requests import EarlierAdapter
from umbel_common.plans.start import LabelNamesStart, ReleasedStart
from umbel_host.files.text_file import from_home

_DIGITS = 3


def started(
    plan: TrainingPlan, draft: Draft, folder: Path, earlier: EarlierAdapter | None = None
) -> tuple[TrainingPlan, Vector | None]:
    """The plan of a draft with what it starts from.

    Args:
        plan: the draft's, without a start.
        folder: where relative paths start.
        earlier: the adapter that the draft names by job and round, from the operator's registry.

    Returns:
        The plan, and its start, if it is a tensor that was computed here.

    Raises:
        DataError, ModelError, PlanError: the start does not fit the plan.
    """
    match draft.start:
        case None | DraftedSeed():
            return plan, None
        case DraftedReleased() as asked:
            return started_from(plan, asked, earlier), None
        case DraftedLabelNames() as asked:
            return with_label_names(plan, model_folder(draft, folder), asked, folder)


def with_label_names(
    plan: TrainingPlan, model: Path, asked: DraftedLabelNames, folder: Path
) -> tuple[TrainingPlan, Vector]:
    """The plan with a head that starts at its labels' names, and that start.

    Args:
        model: the base model's folder.
        folder: where a relative path starts.

    Raises:
        DataError: the file of names cannot be read, or does not have the labels' names.
        ModelError: the model cannot be loaded, or a name has no embedding.
        PlanError: the plan's task has no such head, or another number of labels.
    """
    # Before the model is loaded, which takes long.
    names = _names(asked, plan.task, folder)
    start = LabelNamesStart(
        tensor=bytes(32), names=names, scale=asked.scale, tolerance=asked.tolerance
    )
    planned = second_version(plan, start=start)
    check_plan(planned)

    from umbel_client.models.site_model import load_public
    from umbel_client.tasks.label_names import label_rows

    loaded = load_public(model, planned, "cpu", field="start")
    rows = label_rows(loaded, model, planned, names, scale=asked.scale)
    vector = start_from_rows(planned, rows)
    named = msgspec.structs.replace(start, tensor=start_digest(vector))
    return second_version(planned, start=named), vector


def _names(asked: DraftedLabelNames, task: Task, folder: Path) -> tuple[str, ...]:
    """The text of each label, in the order of the labels."""
    labels = task.labels if isinstance(task, Classification) else ()
    if asked.names is None:
        return labels
    if not isinstance(asked.names, str):
        return asked.names
    path = folder / from_home(asked.names, field="start.names")
    table = read_table(path)
    require_columns(path, table, "label", "text")
    found: dict[str, str] = {}
    for number, row in table.numbered():
        label, text = row.get("label"), row.get("text")
        if (
            not isinstance(label, str)
            or not isinstance(text, str)
            or found.get(label, text) != text
        ):
            raise DataError(
                f"row {number} does not name one label and its text",
                file=path,
                field=f"label and text, row {number}",
                accepted="texts, and each label once",
            )
        found[label] = text
    missing = [label for label in labels if label not in found]
    if missing:
        raise DataError(
            "a label has no text in the file of names",
            file=path,
            field="start.names",
            found=f"none for {', '.join(missing[:3])}, {len(missing)} of {len(labels)} labels",
            accepted="a row for each label of the plan",
        )
    return tuple(found[label] for label in labels)


def started_from(
    plan: TrainingPlan, asked: DraftedReleased, earlier: EarlierAdapter | None
) -> TrainingPlan:
    """The plan with an earlier job's adapter as its start.

    Raises:
        PlanError: the adapter is not at hand, or of another model, task or shape.
    """
    if earlier is None:
        raise PlanError(
            "an earlier job's adapter is in its operator's registry, which this command does not"
            " read",
            field="start",
            found=f"released, of the job {asked.job}",
            accepted="seed or label-names",
            remedy="make the plan with `umbel-server plan new`, in the operator's folder",
        )
    before, _ = plan_from_json(earlier.plan, f"the plan of {asked.job}")
    same = {
        "federation": (plan.federation, before.federation),
        "model": (plan.model.digest.hex(), before.model.digest.hex()),
        "task": (_reads(plan.task), _reads(before.task)),
        "lora.tensors": (_shape(plan), _shape(before)),
        "lora.alpha": (_factor(plan), _factor(before)),
    }
    for field, (found, accepted) in same.items():
        if found != accepted:
            raise PlanError(
                f"a plan cannot start from an adapter of {asked.job}, which means something else",
                field=field,
                found=found,
                accepted=f"as in the plan of {asked.job}: {accepted}",
            )
    largest = asked.largest_norm or _rounded_up(earlier.norm)
    if largest < earlier.norm:
        raise PlanError(
            "the adapter that a plan starts from is longer than the draft says",
            field="start.largest_norm",
            found=largest,
            accepted=f"at least {earlier.norm:g}",
        )
    return second_version(
        plan,
        start=ReleasedStart(
            adapter=bytes.fromhex(earlier.adapter),
            plan=before.digest(),
            round=earlier.round,
            largest_norm=largest,
        ),
    )


def _reads(task: Task) -> str:
    """What an adapter's numbers mean for a task."""
    if isinstance(task, Classification):
        return f"{task.head} head, times {task.logit_scale:g}, over {', '.join(task.labels)}"
    return "a language model"


def _shape(plan: TrainingPlan) -> str:
    return "; ".join(f"{one.name} {one.shape}" for one in plan.lora.tensors)


def _factor(plan: TrainingPlan) -> str:
    lora = plan.lora
    return f"alpha {lora.alpha:g} of rank {lora.rank}, {lora.scaling}"


def _rounded_up(norm: float) -> float:
    """The norm with three digits, and not less."""
    if norm <= 0:
        return 1e-12
    unit = 10.0 ** (math.floor(math.log10(norm)) - _DIGITS + 1)
    return float(f"{(math.floor(norm / unit) + 1) * unit:.{_DIGITS}g}")


def is_computed(start: DraftedStart | None) -> bool:
    """Whether the base model has to be loaded for a start."""
    return isinstance(start, DraftedLabelNames)
