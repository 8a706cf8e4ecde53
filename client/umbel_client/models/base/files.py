"""The files of a base model: which of them count, the digest that names them all.

What is loaded is what was hashed. A file is read once, and its bytes are hashed and used; a file
that does not count is never read. A folder is refused where Transformers would take something else
from it than from the files that count: two sites would then train two models of one digest.

Nothing here needs the packages that load a model.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from umbel_common.canonical import digest
from umbel_common.errors import ModelError
from umbel_common.plans.plan import BaseModel
from umbel_host.processes.lifecycle import reason

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    TOKENIZER_FILE,
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

FileDigests: TypeAlias = Mapping[str, str]
"""SHA-256 of each file by its name, in hexadecimal digits."""

_APPLIED = {
    "adapter_config.json": "an adapter, which would be added to the model",
    "additional_chat_templates/default.jinja": "a template in place of the model's own",
}
"""Files that do not count, and that Transformers would apply to the model all the same."""

_ELSEWHERE = {
    CONFIG_FILE: ("configuration_files", "transformers_weights"),
    "tokenizer_config.json": ("fast_tokenizer_files", "gguf_file", "merges", "vocab"),
    TOKENIZER_FILE: ("model.merges", "model.vocab"),
}
"""Fields of files that count in which Transformers takes a text for the path of another file."""


def folder_digest(folder: Path) -> bytes:
    """32 bytes that name a model: configuration, weights and tokenizer, file by file.

    Other files (a card, weights in other formats) do not count: they are never read.

    Raises:
        ModelError: see `read_texts`; or weights are missing or unreadable.
    """
    weights = weights_of(folder)
    texts = read_texts(folder)
    shards_of(folder, texts, weights)
    digests = {name: text_digest(text) for name, text in texts.items()}
    return model_digest(digests | {name: file_digest(folder / name) for name in weights})


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
        ModelError: a file that every model has is missing, or the folder cannot be read.
    """
    try:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        accepted = {
            CONFIG_FILE: (folder / CONFIG_FILE).is_file(),
            "*.safetensors": bool(names),
            TOKENIZER_FILE: (folder / TOKENIZER_FILE).is_file(),
        }
    except OSError as error:
        raise _unreadable(folder, error) from None
    for name, present in accepted.items():
        if not present:
            raise _missing(folder, name, tuple(accepted))
    return names


def read_texts(folder: Path, expected: FileDigests | None = None) -> dict[str, bytes]:
    """Reads the files that count but the weights, each once: configuration, index and tokenizer.

    Args:
        expected: digests of these files, as they were when the model was hashed; None: any.

    Raises:
        ModelError: a file is missing, unreadable or not what was hashed; or the folder holds or
            names what would change the model and is not in its digest.
    """
    texts = {}
    try:
        for name, what in _APPLIED.items():
            if os.path.lexists(folder / name):
                raise _refused(folder, name, what, "move it out of the folder")
        for name in (CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES):
            if (folder / name).is_file():
                with opened(folder / name) as file:
                    texts[name] = file.read()
    except OSError as error:
        raise _unreadable(folder, error) from None
    if TOKENIZER_FILE not in texts:
        raise _missing(folder, TOKENIZER_FILE, (TOKENIZER_FILE,))
    _check_stands_alone(folder, texts)
    if expected is not None:
        _check_unchanged(folder, texts, expected)
    return texts


def shards_of(folder: Path, texts: Mapping[str, bytes], weights: Sequence[str]) -> list[str]:
    """Names of the files whose tensors are the model's, in the order in which they are loaded.

    Args:
        texts: from `read_texts`.
        weights: from `weights_of`.

    Raises:
        ModelError: the index names something else than files of this folder.
    """
    if WEIGHTS_FILE in weights:
        return [WEIGHTS_FILE]
    if INDEX_FILE not in texts:
        raise _missing(folder, WEIGHTS_FILE, (WEIGHTS_FILE, INDEX_FILE))
    index = _parsed(folder, INDEX_FILE, texts[INDEX_FILE])
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        raise _refused(folder / INDEX_FILE, "weight_map", "no names of files", None)
    for name in named.values():
        if name not in weights:
            raise _refused(
                folder / INDEX_FILE,
                "weight_map",
                f"{name!r}, which is no safetensors file of this folder",
                "put all weights into the folder itself",
            )
    return sorted(set(named.values()))


@contextmanager
def private_folder(folder: Path, texts: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder that holds these bytes alone, for a library that reads files by their paths.

    Args:
        folder: where they were read. Errors of the library name it.

    Raises:
        OSError: there is no place for it.
        ValueError: the library could not read it.
    """
    with TemporaryDirectory(prefix="umbel-model-") as name:
        for file, text in texts.items():
            (Path(name) / file).write_bytes(text)
        try:
            yield Path(name)
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(name, str(folder))) from error


def text_digest(text: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(text).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        ModelError: it cannot be read.
    """
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def opened(path: Path) -> BufferedReader:
    """A file of a model, for reading.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None


def _check_stands_alone(folder: Path, texts: Mapping[str, bytes]) -> None:
    for file, fields in _ELSEWHERE.items():
        content = _parsed(folder, file, texts[file]) if file in texts else {}
        for field in fields:
            value: object = content
            for key in field.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            names = value if field.endswith("_files") and isinstance(value, list) else [value]
            if any(isinstance(name, str) and name not in texts for name in names):
                raise _refused(folder / file, field, f"{value!r}, the name of a file", None)


def _parsed(folder: Path, name: str, text: bytes) -> dict[str, Any]:
    """The JSON object of a file, read as Transformers reads it."""
    try:
        found = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ModelError("a file of a model is not JSON", file=folder / name, found=error) from None
    if not isinstance(found, dict):
        raise ModelError(
            "a file of a model is not a JSON object",
            file=folder / name,
            found=type(found).__name__,
        )
    return found


def _check_unchanged(folder: Path, texts: Mapping[str, bytes], expected: FileDigests) -> None:
    for name in sorted(name for name in {*texts, *expected} if not name.endswith(".safetensors")):
        found = text_digest(texts[name]) if name in texts else "missing"
        if found != expected.get(name):
            raise ModelError(
                "a file of a base model changed after the model was loaded",
                file=folder / name,
                found=found,
                accepted=expected.get(name, "no such file"),
                remedy="leave the model's folder alone while it is in use, and start again",
            )


def _missing(folder: Path, name: str, accepted: tuple[str, ...]) -> ModelError:
    return ModelError(
        "a model folder lacks a file",
        file=folder,
        field=name,
        found="missing" if folder.is_dir() else "no such folder",
        accepted=", ".join(accepted),
        remedy="point model.path at a folder that save_pretrained wrote as safetensors",
    )


def _refused(file: Path, field: str, found: str, remedy: str | None) -> ModelError:
    return ModelError(
        "a base model's folder would load something that its digest does not cover",
        file=file,
        field=field,
        found=found,
        remedy=remedy or "use a folder that save_pretrained wrote as safetensors",
    )


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        "a model cannot be read",
        file=path,
        found=reason(error),
        remedy="let the trainer's user read it",
    )
