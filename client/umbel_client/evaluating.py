"""One evaluation as a process: a request as JSON on standard input, the figures on standard output.

The server runs `python -P -m umbel_client.evaluating`: so the server needs none of a model's
packages, and a crash here ends no job.
"""

import sys
from pathlib import Path

import msgspec

from umbel_client.data.records import Columns
from umbel_client.evaluation.score import options_for, score
from umbel_client.models.site_model import load_public
from umbel_client.trainer.isolation import confine_command
from umbel_common.adapters.vector import Vector, from_bytes
from umbel_common.errors import ConfigError, StorageError
from umbel_common.plans.figures import Evaluation
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.plans.requests import EvaluationRequest
from umbel_host.terminal import exit_code


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


def main() -> int:
    """Answers the request on standard input."""
    confine_command()

    def command() -> None:
        try:
            request = msgspec.json.decode(sys.stdin.buffer.read(), type=EvaluationRequest)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                "a request for an evaluation is malformed", found=str(error)
            ) from None
        print(msgspec.json.encode(evaluate(request)).decode())

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
