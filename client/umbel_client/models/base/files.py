"""The files of a base model: which of them count, and the digest that names them all.

Nothing here needs the packages that load a model.
"""

import hashlib
from io import BufferedReader
from pathlib import Path

from umbel_common.canonical import digest
from umbel_common.errors import ModelError
from umbel_host.processes.lifecycle import reason

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def folder_digest(folder: Path) -> bytes:
    """32 bytes that name a model: configuration, weights and tokenizer, file by file.

    Other files (a card, weights in other formats) do not count: they are never read.

    Raises:
        ModelError: the folder, its configuration, weights or tokenizer are missing or unreadable.
    """
    lines = [f"{_file_digest(folder / name)}  {name}\n" for name in _names(folder)]
    return digest("model-folder", "".join(lines).encode())


def require_model(folder: Path) -> None:
    """Checks that a model folder can be read, without reading all of it.

    Raises:
        ModelError: see `folder_digest`.
    """
    for name in _names(folder):
        with _opened(folder / name):
            pass


def _names(folder: Path) -> list[str]:
    """The files of a model that count."""
    try:
        return _found(folder)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _found(folder: Path) -> list[str]:
    names = {path.name for path in folder.glob("*.safetensors")}
    accepted = {
        "config.json": (folder / "config.json").is_file(),
        "*.safetensors": bool(names),
        "tokenizer.json": (folder / "tokenizer.json").is_file(),
    }
    for name, present in accepted.items():
        if not present:
            raise ModelError(
                "a model folder lacks a file",
                file=folder,
                field=name,
                found="missing" if folder.is_dir() else "no such folder",
                accepted=", ".join(accepted),
                remedy="point model.path at a folder that save_pretrained wrote as safetensors",
            )
    optional = ("config.json", "model.safetensors.index.json", *TOKENIZER_FILES)
    names |= {name for name in optional if (folder / name).is_file()}
    return sorted(names)


def _file_digest(path: Path) -> str:
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        "a model cannot be read",
        file=path,
        found=reason(error),
        remedy="let the trainer's user read it",
    )
