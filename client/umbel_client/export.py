"""A released adapter at the site, as a PEFT folder that plain `PeftModel.from_pretrained` loads."""

import os
import shutil
from pathlib import Path

from umbel_client.model_folder import TOKENIZER_FILES
from umbel_common.adapter import Vector
from umbel_common.canonical import encode
from umbel_common.errors import StorageError
from umbel_common.identity import Signed
from umbel_common.peft_folder import tensor_files, text_files
from umbel_common.plan import TrainingPlan
from umbel_host import tensor_file

RELEASE_FILE = "release.msgpack"


def write_adapter(
    folder: Path, plan: TrainingPlan, vector: Vector, release: Signed, *, base_model: Path
) -> None:
    """Writes the adapter, its card, its signed release and the base model's tokenizer files.

    The folder appears complete or not at all; one that is there already is replaced.

    Raises:
        StorageError: the disk does not take it.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in tensor_files(plan, vector).items():
            # PEFT wants to read which framework wrote the file.
            tensor_file.write(partial / name, tensors, {"format": "pt"})
        for name, text in text_files(plan).items():
            (partial / name).write_text(text, encoding="utf-8")
        (partial / RELEASE_FILE).write_bytes(encode(release))
        for name in TOKENIZER_FILES:
            if (base_model / name).is_file():
                shutil.copyfile(base_model / name, partial / name)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError("an adapter cannot be stored", file=folder, found=error) from error
