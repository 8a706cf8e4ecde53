"""Adapters at the site, as PEFT folders that plain `PeftModel.from_pretrained` loads."""

import os
import shutil
from pathlib import Path

from umbel_client.models.base.files import TOKENIZER_FILES
from umbel_common.adapters.peft_folder import ADAPTER_FILE, PLAN_FILE, text_files
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import encode
from umbel_common.errors import ModelError, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.trust.identity import Signed
from umbel_host.files.adapter_folder import RELEASE_FILE, read_vector, write_vector
from umbel_host.files.text_file import read_text


def write_adapter(
    folder: Path, plan: TrainingPlan, vector: Vector, release: Signed | None, *, base_model: Path
) -> None:
    """Writes the adapter, its card, its signed release and the base model's tokenizer files.

    The folder appears complete or not at all. An existing folder is replaced.

    Args:
        vector: the adapter, float32[plan.lora.size].
        release: None: this site trained the adapter alone, and only the owner can read the folder.
        base_model: the base model's folder, with the tokenizer files.

    Raises:
        StorageError: the disk does not take it.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o777 if release is not None else 0o700, parents=True)
        write_vector(partial, plan, vector)
        for name, text in text_files(plan, alone=release is None).items():
            (partial / name).write_text(text, encoding="utf-8")
        if release is not None:
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


def read_adapter(folder: Path) -> tuple[TrainingPlan, Vector]:
    """Reads an adapter that `write_adapter` wrote.

    Returns:
        The plan, and the adapter, float32[plan.lora.size].

    Raises:
        ModelError: the folder is missing, was not written by Umbel, or does not fit its plan.
        PlanError: its plan is malformed.
    """
    for name in (PLAN_FILE, ADAPTER_FILE):
        if not (folder / name).is_file():
            raise ModelError(
                "a folder holds no adapter of Umbel",
                file=folder,
                field=name,
                found="missing" if folder.is_dir() else "no such folder",
                remedy="give a folder that a federation or `umbel-client train` wrote",
            )
    plan, _ = plan_from_json(read_text(folder / PLAN_FILE), folder / PLAN_FILE)
    try:
        return plan, read_vector(folder, plan)
    except StorageError as error:
        raise ModelError(
            "an adapter does not fit its plan", file=folder, found=error.found
        ) from error


def copy_adapter(folder: Path, out: Path) -> None:
    """Copies the folder of an adapter as it is; the copy appears complete or not at all.

    Raises:
        ModelError, PlanError: the folder holds no adapter of Umbel.
        StorageError: `out` exists, or the disk does not take it.
    """
    read_adapter(folder)
    if out.exists():
        raise StorageError("a file or folder is in the way", file=out, remedy="give a new name")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        shutil.copytree(folder, partial)
        partial.rename(out)
    except (OSError, shutil.Error) as error:
        raise StorageError("an adapter cannot be stored", file=out, found=error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
