"""All files of a base model that count: the digest that names them, and the files with weights.

`model_folder` says which small files count, and what a folder is refused for.
Nothing here needs the packages that load a model.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from umbel_common.canonical import digest
from umbel_common.errors import ModelError
from umbel_common.plans.plan import BaseModel
from umbel_host.files.model_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    FileDigests,
    missing,
    opened,
    other_file,
    parsed_json,
    read_texts,
    require_folder,
    text_digest,
    unreadable,
)

_SHARD = re.compile(r"[\w.-]+-\d+-of-\d+\.safetensors")
"""One of several files with weights, as save_pretrained names them."""


def folder_digest(folder: Path) -> bytes:
    """32 bytes that name a model: configuration, weights and tokenizer, file by file.

    Other files (a card, weights in other formats) do not count: they are never read.

    Raises:
        ModelError: see `folder_files`.
    """
    return model_digest(folder_files(folder))


def folder_files(folder: Path) -> FileDigests:
    """Digests of all files of a model that count, by name.

    Raises:
        ModelError: see `read_texts`; or weights are missing or unreadable.
    """
    weights = weights_of(folder)
    texts = read_texts(folder)
    shards_of(folder, texts, weights)
    digests = {name: text_digest(text) for name, text in texts.items()}
    return digests | {name: file_digest(folder / name) for name in weights}


def model_digest(digests: FileDigests) -> bytes:
    """The model's digest from those of all files that count."""
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
    return digest("model-folder", "".join(lines).encode())


def require_model(folder: Path) -> None:
    """Checks that a model folder can be read, without reading all of it.

    Raises:
        ModelError: see `folder_digest`.
    """
    weights = weights_of(folder)
    shards_of(folder, read_texts(folder), weights)
    for name in weights:
        with opened(folder / name):
            pass


def require_digest(folder: Path, found: bytes, agreed: BaseModel) -> None:
    """Refuses another model than the one of a plan.

    Raises:
        ModelError: it has both digests.
    """
    if found != agreed.digest:
        raise ModelError(
            "a base model is not the one that the plan names",
            file=folder,
            field="model.digest",
            found=found.hex(),
            accepted=agreed.digest.hex(),
            remedy=f"obtain exactly the revision of {agreed.name} that was agreed on",
        )


def weights_of(folder: Path) -> list[str]:
    """Names of all files with weights, sorted.

    Raises:
        ModelError: a file that every model has is missing, a name is not printable, or the folder
            cannot be read.
    """
    try:
        require_folder(folder)
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        accepted = {
            CONFIG_FILE: (folder / CONFIG_FILE).is_file(),
            "*.safetensors": bool(names),
            TOKENIZER_FILE: (folder / TOKENIZER_FILE).is_file(),
        }
    except OSError as error:
        raise unreadable(folder, error) from None
    for name, present in accepted.items():
        if not present:
            raise missing(folder, name, tuple(accepted))
    for name in names:
        # The digest is over lines, so that a name with a line break would stand for two files.
        if not _is_plain(name):
            raise ModelError(
                "a file of a model has a name that is not printable",
                file=folder,
                found=ascii(name),
                remedy="use a folder that save_pretrained wrote as safetensors",
            )
    return names


def _is_plain(name: str) -> bool:
    return name.isprintable()


def shards_of(folder: Path, texts: Mapping[str, bytes], weights: Sequence[str]) -> list[str]:
    """Names of the files whose tensors are the model's, in the order in which they are loaded.

    Args:
        texts: from `read_texts`.
        weights: from `weights_of`.

    Raises:
        ModelError: the index names a file that is missing, or something else than files of this
            folder.
    """
    if WEIGHTS_FILE in weights:
        return [WEIGHTS_FILE]
    if INDEX_FILE not in texts:
        raise missing(folder, WEIGHTS_FILE, (WEIGHTS_FILE, INDEX_FILE))
    index = parsed_json(folder, INDEX_FILE, texts[INDEX_FILE])
    named = index.get("weight_map")
    names = list(named.values()) if isinstance(named, dict) else []
    for name in names or [None]:
        if isinstance(name, str) and _SHARD.fullmatch(name) and name not in weights:
            raise missing(folder, name, ("every file that the index names",))
        if name not in weights:
            raise other_file(folder / INDEX_FILE, "weight_map", name)
    return sorted(set(names))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        ModelError: it cannot be read.
    """
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
