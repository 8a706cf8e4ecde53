"""The tensors of a PEFT folder: one vector in several safetensors files."""

from pathlib import Path

import numpy as np

from umbel_common.adapters.peft_folder import tensor_files
from umbel_common.adapters.vector import Vector
from umbel_common.errors import StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_host.files import tensor_file
from umbel_host.files.tensor_file import TensorFile

RELEASE_FILE = "release.msgpack"
"""File with the signed release of the adapter beside it."""


def write_vector(folder: Path, plan: TrainingPlan, vector: Vector) -> None:
    """Writes the files that `umbel_common.adapters.peft_folder.tensor_files` names into a folder.

    Raises:
        OSError: they cannot be written.
    """
    for name, tensors in tensor_files(plan, vector).items():
        # PEFT reads from this field which framework wrote the file.
        tensor_file.write(folder / name, tensors, {"format": "pt"})


def read_vector(folder: Path, plan: TrainingPlan) -> Vector:
    """The vector of a PEFT folder of this plan, float32[plan.lora.size].

    Raises:
        StorageError: a file is missing or unreadable, or does not have the plan's tensors.
    """
    vector = np.empty(plan.lora.size, dtype=np.float32)
    try:
        for file, tensors in tensor_files(plan, vector).items():
            with TensorFile(folder / file) as stored:
                for name, tensor in tensors.items():
                    stored.read_into(name, tensor)
    except (OSError, KeyError, ValueError) as error:
        raise StorageError("an adapter cannot be read", file=folder, found=error) from error
    return vector
