"""The answer to a server's request for an evaluation."""

from pathlib import Path

from umbel_client.data.records import Columns
from umbel_client.evaluation.score import options_for, score
from umbel_client.models.site_model import load_public
from umbel_common.adapters.vector import Vector, from_bytes
from umbel_common.errors import StorageError
from umbel_common.plans.figures import Evaluation
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.plans.requests import EvaluationRequest


def evaluate(request: EvaluationRequest) -> Evaluation:
    """Evaluates the adapter that a request names.

    Raises:
        ConfigError, DataError, ModelError, PlanError: see `options_for`, `score`, `load_public` and
            `plan_from_json`.
        RemoteProtocolError: a vector has another length than the plan's adapter.
        StorageError: a vector's file cannot be read.
    """
    plan, _ = plan_from_json(request.plan, "the plan of an evaluation")
    columns = Columns(
        text_column=request.columns.text_column,
        label_column=request.columns.label_column,
        record_format=request.columns.format,
    )
    options = options_for(
        plan.task,
        columns=columns,
        general=None if request.general is None else Path(request.general),
        groups=request.groups,
        answers=request.answers,
        answer_tokens=request.answer_tokens,
        batch_size=request.batch_size,
    )
    vector = _vector(plan, request.adapter)
    before = None if request.before is None else _vector(plan, request.before)
    folder = Path(request.model)
    model = load_public(folder, plan, request.device, field="evaluation.device")
    model.set_vector(vector)
    return score(model, folder, Path(request.holdout), options, before=before)


def _vector(plan: TrainingPlan, file: str) -> Vector:
    try:
        return from_bytes(Path(file).read_bytes(), plan.lora.size)
    except OSError as error:
        raise StorageError("an adapter cannot be read", file=file, found=error.strerror) from None
