"""Adapters at the site, as PEFT folders that plain `PeftModel.from_pretrained` loads.

A folder is read for its plan, its vector and its release. What else it says of the adapter, such as
its `adapter_config.json`, is never read: it is written again, from the plan.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from umbel_common.adapters.peft_folder import PLAN_FILE, file_of, text_files
from umbel_common.adapters.vector import Vector, adapter_digest
from umbel_common.canonical import decode_canonical, encode
from umbel_common.errors import ModelError, PlanError, RemoteProtocolError, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.plans.statements import RELEASE_VERSIONS
from umbel_common.trust.identity import Signed
from umbel_host.files.adapter_folder import RELEASE_FILE, read_vector, write_vector
from umbel_host.files.model_folder import TOKENIZER_FILES
from umbel_host.files.output import require_new
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
    try:
        tokenizer = _tokenizer(base_model)
    except OSError as error:
        raise StorageError("an adapter cannot be stored", file=folder, found=error) from error
    _write(folder, plan, vector, release, tokenizer)


def read_adapter(folder: Path) -> tuple[TrainingPlan, Vector]:
    """Reads an adapter that `write_adapter` wrote.

    Returns:
        The plan, and the adapter, float32[plan.lora.size].

    Raises:
        ModelError: the folder is missing, was not written by Umbel, or does not fit its plan.
        PlanError: its plan is malformed.
    """
    _require_file(folder, PLAN_FILE)
    plan, _ = plan_from_json(read_text(folder / PLAN_FILE, PlanError), folder / PLAN_FILE)
    for name in sorted({file_of(tensor.name) for tensor in plan.lora.tensors}):
        _require_file(folder, name)
    try:
        return plan, read_vector(folder, plan)
    except StorageError as error:
        raise ModelError(
            "an adapter does not fit its plan", file=folder, found=error.found
        ) from error


def _require_file(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise ModelError(
            "a folder holds no adapter of Umbel",
            file=folder,
            field=name,
            found="missing" if folder.is_dir() else "no such folder",
            remedy="give a folder that a federation or `umbel-client train` wrote",
        )


def read_to_export(folder: Path) -> tuple[TrainingPlan, Vector, Signed | None]:
    """Reads an adapter that is to leave its folder.

    Returns:
        The plan, the adapter, and its release; None: a site trained the adapter alone, and it is as
        private as the data.

    Raises:
        ModelError: see `read_adapter`; or the folder holds a link, which could bring any file of
            the machine into what is exported, or the release of another adapter.
        PlanError: the adapter's plan is malformed.
    """
    plan, vector = read_adapter(folder)
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise ModelError(
                "an adapter's folder holds a link",
                file=path,
                found=os.readlink(path),
                accepted="files",
                remedy="remove the link, or put the file itself in its place",
            )
    return plan, vector, _release(folder, plan, vector)


def _release(folder: Path, plan: TrainingPlan, vector: Vector) -> Signed | None:
    path = folder / RELEASE_FILE
    if not path.exists():
        return None
    try:
        signed = decode_canonical(path.read_bytes(), Signed)
        named = decode_canonical(signed.statement, RELEASE_VERSIONS).adapter
    except (OSError, RemoteProtocolError) as error:
        raise ModelError("an adapter's release cannot be read", file=path, found=error) from None
    found = adapter_digest(plan.digest(), vector)
    if named != found:
        raise ModelError(
            "a release is of another adapter", file=path, found=named.hex(), accepted=found.hex()
        )
    return signed


def export_adapter(folder: Path, out: Path) -> None:
    """Writes an adapter again, from its plan and its vector; the copy is as private as the folder.

    Raises:
        ModelError, PlanError: see `read_to_export`.
        StorageError: `out` exists, or the disk does not take it.
    """
    plan, vector, release = read_to_export(folder)
    require_new(out)
    try:
        tokenizer = _tokenizer(folder)
    except OSError as error:
        raise ModelError("an adapter cannot be read", file=folder, found=error) from None
    _write(out, plan, vector, release, tokenizer)


def _tokenizer(folder: Path) -> dict[str, bytes]:
    found = (name for name in TOKENIZER_FILES if (folder / name).is_file())
    return {name: (folder / name).read_bytes() for name in found}


def _write(
    folder: Path,
    plan: TrainingPlan,
    vector: Vector,
    release: Signed | None,
    tokenizer: Mapping[str, bytes],
) -> None:
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=folder_mode(release), parents=True)
        write_vector(partial, plan, vector)
        for name, text in text_files(plan, alone=release is None).items():
            (partial / name).write_text(text, encoding="utf-8")
        if release is not None:
            (partial / RELEASE_FILE).write_bytes(encode(release))
        for name, content in tokenizer.items():
            (partial / name).write_bytes(content)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError("an adapter cannot be stored", file=folder, found=error) from error


def folder_mode(release: Signed | None) -> int:
    """Largest permissions of a folder with an adapter, or with a model that it was merged into."""
    return 0o777 if release is not None else 0o700
