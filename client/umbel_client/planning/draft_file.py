"""The fields of a plan's draft, and what needs no model to be checked.

Nothing here needs the packages that load a model.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from umbel_client.data.tables import read_table
from umbel_client.planning.distributed import DraftAggregation, DraftDistributed, planned
from umbel_common.canonical import Name, Value
from umbel_common.errors import DataError, PlanError
from umbel_common.plans.alike import check_labels
from umbel_common.plans.check import check_plan
from umbel_common.plans.drafted_start import DraftedStart
from umbel_common.plans.plan import (
    BaseModel,
    FederatedEvaluation,
    LocalPrivacy,
    Lora,
    Method,
    NoPrivacy,
    ReleaseGate,
    Scaling,
    Task,
    Training,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.ranges import Scale
from umbel_common.plans.server_optimizer import Average, ServerOptimizer
from umbel_host.files.model_digest import folder_digest
from umbel_host.files.text_file import from_home, read_toml


class DraftModel(Value, frozen=True):
    """`[model]`."""

    name: str
    """The base model's usual name; the released adapter names it so."""
    path: str
    """The base model's folder; a relative path starts at the draft's folder."""


class DraftLora(Value, frozen=True):
    """`[lora]`; see `umbel_common.plans.plan.Lora`."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=512)]
    alpha: Scale
    target_modules: tuple[str, ...] | Literal["all-linear"]
    """Names of linear layers; `all-linear`: all but the output layer."""
    layers: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] | None = None
    method: Method = "alternate"
    scaling: Scaling = "standard"
    use_dora: bool = False
    lora_dropout: float = 0.0
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    """`use_dora`, `lora_dropout`, `bias` and `modules_to_save` are fields so that they can be
    refused with a reason: see `UNSUPPORTED`."""


UNSUPPORTED: dict[str, tuple[object, str]] = {
    "use_dora": (
        False,
        "DoRA divides by a norm of the whole weight, so that the weights and not the records pass"
        " through A and B: a record has no gradient of its own",
    ),
    "lora_dropout": (
        0.0,
        "a step must be a function of batch and noise alone; the noise regularises",
    ),
    "bias": (
        "none",
        "trained biases are not in the adapter that sites sum: adapt the layer instead",
    ),
    "modules_to_save": (
        (),
        "embeddings, norms and whole layers are large, and each record's gradient would be as"
        " large: adapt linear layers instead",
    ),
}
"""Settings of PEFT that a plan cannot have: the accepted value of each, and the reason."""


class DraftGate(Value, frozen=True):
    """`[release_gate]`; see `umbel_common.plans.plan.ReleaseGate`."""

    holdout: str
    """The file of public records; a relative path starts at the draft's folder."""
    max_loss_increase: Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Draft(Value, frozen=True):
    """A plan without what is read from the model's folder."""

    federation: Name
    job: Name
    model: DraftModel
    task: Task
    lora: DraftLora
    training: Training
    privacy: LocalPrivacy | NoPrivacy | DraftDistributed
    aggregation: DraftAggregation
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)] = 0
    """Public seed of the initial adapter."""
    evaluation: FederatedEvaluation | None = None
    release_gate: DraftGate | None = None
    start: DraftedStart | None = None
    """The adapter that the job starts from; absent: that of the seed."""
    server: ServerOptimizer = Average()
    """The optimizer of the server: how the adapter moves by a round's sum. Absent, or `optimizer =
    "average"`: by the mean of the deltas."""


def checked(draft: Draft) -> Draft:
    """The draft, if it asks for nothing that no plan can have. No model is needed to see that.

    Raises:
        PlanError: it asks for a kind of LoRA that no plan can have, for an adapter in no layer, or
            has labels that are alike.
    """
    if draft.lora.layers == ():
        raise PlanError(
            "an adapter is asked for in no layer",
            field="lora.layers",
            found="[]",
            accepted="numbers of layers, or no such field for all of them",
        )
    for name, (accepted, reason) in UNSUPPORTED.items():
        if getattr(draft.lora, name) != accepted:
            raise PlanError(
                f"a plan cannot have this kind of LoRA: {reason}",
                field=f"lora.{name}",
                found=getattr(draft.lora, name),
                accepted="nothing" if accepted == () else str(accepted).lower(),
            )
    check_labels(draft.task)
    return draft


def plan_of(draft: Draft, folder: Path, model: Path, lora: Lora) -> TrainingPlan:
    """The plan of a draft, with what was read from the model's folder.

    Args:
        folder: where relative paths start.
        model: the base model's folder.
        lora: the adapter with its tensors.

    Raises:
        DataError: the release gate's holdout cannot be read.
        ModelError: the model's folder cannot be read.
        PlanError: see `checked`; or the parts of the plan do not fit together.
    """
    # Again, for a draft that was not read from a file.
    checked(draft)
    privacy, aggregation = planned(
        draft.privacy, draft.aggregation, draft.training, lora, draft.evaluation
    )
    plan = TrainingPlan(
        federation=draft.federation,
        job=draft.job,
        model=BaseModel(name=draft.model.name, digest=folder_digest(model)),
        task=draft.task,
        lora=lora,
        training=draft.training,
        privacy=privacy,
        aggregation=aggregation,
        evaluation=draft.evaluation,
        release_gate=_gate_of(draft.release_gate, folder),
    )
    plan = second_version(plan, server=draft.server)
    check_plan(plan)
    return plan


def _gate_of(gate: DraftGate | None, folder: Path) -> ReleaseGate | None:
    """A plan's release gate.

    Args:
        folder: where a relative path starts.

    Raises:
        DataError: the holdout cannot be read.
    """
    if gate is None:
        return None
    path = folder / from_home(gate.holdout, field="release_gate.holdout")
    if path.is_dir():
        raise DataError(
            "a holdout is named by the digest of its file",
            file=path,
            field="release_gate.holdout",
            found="a folder",
            accepted=".jsonl, .csv or .parquet",
        )
    return ReleaseGate(
        holdout=read_table(path).source,
        max_loss_increase=gate.max_loss_increase,
    )


def read_draft(path: Path) -> Draft:
    """Reads a draft's file.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has an unknown, missing or wrong
            field.
        PlanError: see `checked`.
    """
    hint = "give the path of a draft; docs/operator.md describes it"
    draft = checked(read_toml(path, Draft, hint))
    # Here, where the error can name the draft.
    from_home(draft.model.path, path, field="model.path")
    if draft.release_gate is not None:
        from_home(draft.release_gate.holdout, path, field="release_gate.holdout")
    return draft


def model_folder(draft: Draft, folder: Path) -> Path:
    """The base model's folder.

    Args:
        folder: where a relative path starts.

    Raises:
        ConfigError: the path begins with ~, and this user has no home folder.
    """
    return folder / from_home(draft.model.path, field="model.path")
