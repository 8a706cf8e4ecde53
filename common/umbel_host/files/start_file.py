"""The file beside a plan with the head that its job starts from, at its labels' names.

The plan names the whole adapter by its digest. The file has the rows of the head alone: all else
follows from the plan's seed.
"""

from pathlib import Path

import numpy as np

from umbel_common.adapters.start import LABEL_ROWS, require_start, start_from_rows
from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.errors import RemoteProtocolError, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.start import LabelNamesStart
from umbel_host.files import tensor_file
from umbel_host.files.tensor_file import TensorFile

_DIGITS = 16


def start_file(plan_file: Path, plan: TrainingPlan) -> Path | None:
    """Where the start of a plan is, in the folder of the plan's file; None: it needs no file."""
    if not isinstance(plan.start, LabelNamesStart):
        return None
    return plan_file.absolute().parent / f"start-{plan.start.tensor.hex()[:_DIGITS]}.safetensors"


def write_start(path: Path, plan: TrainingPlan, vector: Vector) -> None:
    """Writes the head of a start, which is not checked here.

    Raises:
        StorageError: it cannot be written.
    """
    rows = unflatten(vector, plan.lora.tensors)[LABEL_ROWS]
    try:
        tensor_file.write(path, {LABEL_ROWS: rows}, {})
    except OSError as error:
        raise StorageError(
            "the start of a plan cannot be written", file=path, found=error.strerror
        ) from None


def read_start(path: Path, plan: TrainingPlan) -> Vector:
    """The adapter that a plan starts from, float32[plan.lora.size].

    Raises:
        StorageError: the file is missing, cannot be read, or is not the plan's start.
    """
    shape = next(one.shape for one in plan.lora.tensors if one.name == LABEL_ROWS)
    rows = np.empty(shape, dtype=np.float32)
    try:
        with TensorFile(path) as stored:
            stored.read_into(LABEL_ROWS, rows)
        vector = start_from_rows(plan, rows)
        require_start(plan, vector)
    except (OSError, KeyError, ValueError, RemoteProtocolError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise StorageError(
            "the adapter that a plan starts from is not at hand",
            file=path,
            found="no such file" if missing else error,
            remedy="put the file that `umbel-server plan new` wrote beside the plan there",
        ) from None
    return vector
