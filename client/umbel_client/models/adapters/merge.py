"""Merges an adapter into its base model, for tools that cannot use adapters."""

import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from umbel_client.models.adapters.folder import folder_mode, read_to_export
from umbel_client.models.adapters.lora import attach, fill, fold, require_tensors
from umbel_client.models.base.files import require_digest
from umbel_client.models.base.folder import build_base, quietly, read_base
from umbel_common.adapters.peft_folder import HEAD_FILE, TASK_FILE, tensor_files, text_files
from umbel_common.errors import StorageError
from umbel_host.files import tensor_file
from umbel_host.files.model_folder import TOKENIZER_FILES

_CPU = torch.device("cpu")


def merge_adapter(
    adapter: Path,
    base: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"],
    device: torch.device = _CPU,
) -> None:
    """Writes W + scaling B A in place of each adapted W, as safetensors that Transformers loads.

    The sum is float32, and rounded once to `dtype`. Scaling and places are the plan's. If the
    adapter has no release, only the owner can read the folder.

    Args:
        adapter: the folder that `write_adapter` wrote.
        base: the folder of exactly the base model that the adapter's plan names.
        out: the new folder; it appears complete or not at all.
        device: where the sums are computed; it holds the whole model in float32.

    Raises:
        ModelError: the adapter is not Umbel's, its folder holds a link, or the base model is
            another one.
        PlanError: the adapter's plan is malformed.
        StorageError: `out` exists, or the disk does not take it.
    """
    plan, vector, release = read_to_export(adapter)
    if out.exists():
        raise StorageError("a file or folder is in the way", file=out, remedy="give a new name")
    content = read_base(base)
    require_digest(base, content.digest, plan.model)
    model = build_base(content, plan.task).to(device)  # type: ignore[arg-type]  # wrapped by torch
    parameters, _head = attach(base, model, plan.task, plan.lora)
    require_tensors(base, parameters, plan.lora)
    fill(parameters, vector, plan.lora)
    fold(model)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=folder_mode(release), parents=True)
        with quietly():
            model.to(getattr(torch, dtype)).to(_CPU).save_pretrained(partial)
        for name in TOKENIZER_FILES:
            if name in content.texts:
                (partial / name).write_bytes(content.texts[name])
        (partial / TASK_FILE).write_text(text_files(plan)[TASK_FILE], encoding="utf-8")
        head = tensor_files(plan, vector).get(HEAD_FILE)
        if head is not None:
            tensor_file.write(partial / HEAD_FILE, head, {"format": "pt"})
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise StorageError("a model cannot be stored", file=out, found=error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
