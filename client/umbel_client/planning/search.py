"""The search for a draft's learning rates and clip norm, on public records."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import optuna
import tomlkit
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from umbel_client.data.records import Columns
from umbel_client.planning.draft import make_plan
from umbel_client.planning.draft_file import Draft, checked, model_folder
from umbel_client.planning.start import started
from umbel_client.planning.trial import PublicData, loss_after_training
from umbel_common.canonical import digest
from umbel_common.errors import ConfigError, ModelError, StorageError
from umbel_common.plans.plan import (
    Adam,
    DistributedPrivacy,
    LocalPrivacy,
    Sgd,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.requests import TuningRequest
from umbel_common.plans.server_optimizer import Average, ServerAdam, ServerSgd, ServerYogi
from umbel_common.toml_values import parse_toml
from umbel_host.files.output import require_new_file
from umbel_host.files.text_file import read_text, write_new_text

RATES = 30.0
"""The search range of a learning rate is the draft's value divided and multiplied by this."""

CLIP_NORMS = 10.0
"""The search range of the clip norm is the draft's value divided and multiplied by this."""

SHORT = {
    "adapter_learning_rate": "adapter rate",
    "head_learning_rate": "head rate",
    "clip_norm": "clip norm",
}
"""Names of the hyper-parameters in the table."""

Range = tuple[float, float, float]
"""(smallest value, the draft's value, largest value)."""


def search_space(plan: TrainingPlan) -> dict[str, Range]:
    """The search range of each hyper-parameter: learning rates, and `clip_norm`.

    `clip_norm` is searched in local mode with flat clipping only: else it is one more factor of the
    learning rates, or the grid of the noise follows from it. In distributed mode, the learning
    rates are the server's.
    """
    optimizer = _stepping(plan)
    rate = optimizer.adapter_learning_rate
    space = {"adapter_learning_rate": _around(rate, RATES, 1e-12, 100.0)}
    if any(tensor.role == "head" for tensor in plan.lora.tensors):
        head = optimizer.head_learning_rate or rate
        space["head_learning_rate"] = _around(head, RATES, 1e-12, 100.0)
    if isinstance(plan.privacy, LocalPrivacy) and plan.privacy.clipping == "flat":
        space["clip_norm"] = _around(plan.privacy.clip_norm, CLIP_NORMS, 1e-4, 1e4)
    return space


def _stepping(plan: TrainingPlan) -> Adam | Sgd | ServerSgd | ServerAdam | ServerYogi:
    """The optimizer whose learning rates are searched."""
    if isinstance(plan.privacy, DistributedPrivacy) and not isinstance(plan.server, Average):
        return plan.server
    return plan.training.site_optimizer


def _around(value: float, factor: float, least: float, most: float) -> Range:
    return max(value / factor, least), value, min(value * factor, most)


def with_values(plan: TrainingPlan, values: Mapping[str, float]) -> TrainingPlan:
    """The plan with the values of a trial."""
    rates = {name: value for name, value in values.items() if name != "clip_norm"}
    optimizer: Any = msgspec.structs.replace(_stepping(plan), **rates)
    if isinstance(plan.privacy, DistributedPrivacy):
        return second_version(plan, server=optimizer)
    training = msgspec.structs.replace(plan.training, optimizer=optimizer)
    privacy = plan.privacy
    if "clip_norm" in values and isinstance(privacy, LocalPrivacy):
        privacy = msgspec.structs.replace(privacy, clip_norm=values["clip_norm"])
    return msgspec.structs.replace(plan, training=training, privacy=privacy)


def draft_with(text: str, values: Mapping[str, float]) -> str:
    """A draft's text with other values; the rest stays as it was, comments included."""
    document: Any = tomlkit.parse(text)
    shared = document.get("privacy", {}).get("mode") == "distributed"
    rates = document["server"] if shared else document["training"]["optimizer"]
    for name, value in values.items():
        (document["privacy"] if name == "clip_norm" else rates)[name] = value
    return tomlkit.dumps(document)


def tune(request: TuningRequest, console: Console) -> None:
    """Runs the missing trials, prints all trials, and writes the best draft.

    Raises:
        ConfigError: the draft is malformed, the device is not there, or the study belongs to
            another search.
        DataError, ModelError, PlanError: the public file or the model does not fit the draft.
        StorageError: the draft to be written exists, or a file cannot be written.
    """
    out, draft = Path(request.out), Path(request.draft)
    require_new_file(out)
    text = read_text(draft, ConfigError)
    parsed = checked(parse_toml(text, Draft, draft))
    plan, _ = started(make_plan(parsed, draft.parent), parsed, draft.parent)
    columns = Columns(
        text_column=request.text_column,
        label_column=request.label_column,
        record_format=request.format,
    )
    data = PublicData.load(
        plan,
        model_folder(parsed, draft.parent),
        Path(request.data),
        columns,
        share=request.validation_share,
        seed=request.seed,
        device=request.device,
    )
    study = _study(request, plan)
    space = search_space(plan)
    size = request.public_size or len(data.training)

    def objective(trial: optuna.Trial) -> float:
        values = {
            name: trial.suggest_float(name, least, most, log=True)
            for name, (least, _, most) in space.items()
        }
        try:
            loss = loss_after_training(
                with_values(plan, values),
                data,
                public_size=size,
                sites=request.sites,
                seed=request.seed,
            )
        except ModelError as error:
            raise optuna.TrialPruned(error.message) from None
        if not math.isfinite(loss):
            raise optuna.TrialPruned("the loss is not finite")
        return loss

    if not study.trials:
        study.enqueue_trial({name: value for name, (_, value, _) in space.items()})
    # The loss of a trial that a killed process left is not known: such trials do not count.
    missing = request.trials - len(_over(study))
    if missing > 0:
        study.optimize(objective, n_trials=missing)
    _report(study, list(space), console)
    write_new_text(out, draft_with(text, _best(study).params))
    console.print(f"\ndraft: {out}", soft_wrap=True)


def _study(request: TuningRequest, plan: TrainingPlan) -> optuna.Study:
    """The study of this search: a new one, or the one to resume.

    Raises:
        ConfigError: the file holds the study of another search.
        StorageError: the file cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = msgspec.structs.replace(request, draft="", data="", out="", study="", trials=1)
    with Path(request.data).open("rb") as file:
        source = hashlib.file_digest(file, "sha256").digest()
    searched = msgspec.to_builtins(options)
    searched.pop("device", None)
    search = digest("tuning", plan.digest(), source, msgspec.json.encode(searched)).hex()
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{request.study}", study_name="tuning", load_if_exists=True
        )
        known = study.user_attrs.get("search")
        if known is None:
            study.set_user_attr("search", search)
    except SQLAlchemyError as error:
        raise StorageError(
            "a study cannot be used", file=request.study, found=type(error).__name__
        ) from None
    if known not in (None, search):
        raise ConfigError(
            "a study is of another draft, other records, or other options",
            file=request.study,
            remedy="give another --study, or the same draft, records and options",
        )
    # A sampler with the seed of an earlier call would draw the same values again.
    study.sampler = optuna.samplers.TPESampler(seed=request.seed + len(study.trials))
    return study


def _over(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [one for one in study.trials if one.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def _best(study: optuna.Study) -> optuna.trial.FrozenTrial:
    done = [one for one in _over(study) if one.state is TrialState.COMPLETE]
    if not done:
        raise ModelError(
            "no trial came to an end",
            found="training diverged in each",
            remedy="begin with a draft of lower learning rates",
        )
    return min(done, key=lambda one: one.value or 0.0)


def _report(study: optuna.Study, names: list[str], console: Console) -> None:
    best = _best(study)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("trial", "loss", *(SHORT[name] for name in names), ""):
        table.add_column(column)
    for one in _over(study):
        notes = []
        if one.number == 0:
            notes.append("the draft as it is")
        if one.number == best.number:
            notes.append("best")
        loss = "diverged" if one.value is None else f"{one.value:.4f}"
        values = [f"{one.params[name]:.3g}" for name in names]
        table.add_row(str(one.number), loss, *values, ", ".join(notes))
    console.print(table, soft_wrap=True)
