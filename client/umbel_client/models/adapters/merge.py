"""Merges an adapter into its base model, for tools that cannot use adapters."""

import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError

from umbel_client.models.adapters.folder import read_adapter
from umbel_client.models.base.files import TOKENIZER_FILES, folder_digest
from umbel_client.models.base.folder import load_base, peft_quietly, quietly
from umbel_common.adapters.peft_folder import HEAD_FILE
from umbel_common.errors import ModelError, StorageError

BESIDE = ("task.json", HEAD_FILE)
"""Files that a merged model needs beside it: its labels, and a mean-pool head."""


def merge_adapter(
    adapter: Path, base: Path, out: Path, *, dtype: Literal["float32", "bfloat16", "float16"]
) -> None:
    """Writes W + scaling B A in place of each adapted W, as safetensors that Transformers loads.

    The sum is float32, and rounded once to `dtype`.

    Args:
        adapter: the folder that `write_adapter` wrote.
        base: the folder of exactly the base model that the adapter's plan names.
        out: the new folder; it appears complete or not at all.

    Raises:
        ModelError: the adapter is not Umbel's, or the base model is another one.
        StorageError: `out` exists, or the disk does not take it.
    """
    plan, _ = read_adapter(adapter)
    found = folder_digest(base)
    if found != plan.model.digest:
        raise ModelError(
            "a base model is not the one that the adapter belongs to",
            file=base,
            field="model.digest",
            found=found.hex(),
            accepted=f"{plan.model.digest.hex()} ({plan.model.name})",
        )
    if out.exists():
        raise StorageError("a file or folder is in the way", file=out, remedy="give a new name")
    model = load_base(base, plan.task)
    if plan.lora.target_modules:
        with peft_quietly():
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with quietly():
            model.to(getattr(torch, dtype)).save_pretrained(partial)
        for folder, names in ((base, TOKENIZER_FILES), (adapter, BESIDE)):
            for name in names:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, partial / name)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise StorageError("a model cannot be stored", file=out, found=error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
