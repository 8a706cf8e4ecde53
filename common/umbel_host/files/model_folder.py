"""The small files of a base model's folder: configuration, index and tokenizer.

What is loaded is what was hashed. A file is read once, and its bytes are hashed and used; a file
that does not count, such as a card or further templates, is never read. One thing is: which tokens
end an answer by the settings of generation (`ends_of_generation`). A folder is refused where a file
that counts names another one to be read instead: two sites would then train two models of one
digest.

Nothing here needs the packages that load a model.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from umbel_common.errors import ModelError
from umbel_host.processes.lifecycle import reason

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
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

_ACCEPTED = "a folder with config.json, tokenizer.json and weights as safetensors"
_GGUF = (
    "get the model's safetensors: GGUF has rounded weights for llama.cpp, which are not fine-tuned"
)
_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has put in the place of a large one."""
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

FileDigests: TypeAlias = Mapping[str, str]
"""SHA-256 of each file by its name, in hexadecimal digits."""

_ADAPTER_FILE = "adapter_config.json"
"""With this file, Transformers would load an adapter on top of the model."""

_ELSEWHERE = (
    (CONFIG_FILE, "configuration_files", CONFIG_FILE),
    (CONFIG_FILE, "transformers_weights", WEIGHTS_FILE),
    ("tokenizer_config.json", "fast_tokenizer_files", TOKENIZER_FILE),
    ("tokenizer_config.json", "gguf_file", None),
    ("tokenizer_config.json", "merges", None),
    ("tokenizer_config.json", "vocab", None),
    (TOKENIZER_FILE, "model.merges", None),
    (TOKENIZER_FILE, "model.vocab", None),
)
"""Fields in which Transformers takes a text for the path of a file that it reads instead: the file
that counts, the field, and the one path that it may have."""

_IMPLEMENTATION = "_implementation"
"""End of the fields of a configuration that name code, such as `attn_implementation`. A name with a
slash is a repository, whose code Transformers runs if the package `kernels` is installed."""

_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_SPECIAL_TOKENS = ("_token", "_tokens")
"""Ends of the fields that this file has. Transformers would take any other one for a setting of the
tokenizer as well, also `tokenizer_file`, after it has found the folder's own files."""


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
        require_folder(folder)
        if os.path.lexists(folder / _ADAPTER_FILE):
            raise ModelError(
                "an adapter lies in the folder of a base model, and would be loaded with it",
                file=folder,
                field=_ADAPTER_FILE,
                remedy="move the adapter's files into a folder of their own",
            )
        for name in (CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES):
            if (folder / name).is_file():
                with opened(folder / name) as file:
                    texts[name] = file.read()
    except OSError as error:
        raise unreadable(folder, error) from None
    if TOKENIZER_FILE not in texts:
        raise missing(folder, TOKENIZER_FILE, (TOKENIZER_FILE,))
    _check_stands_alone(folder, texts)
    if expected is not None:
        _check_unchanged(folder, texts, expected)
    return texts


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


def ends_of_config(folder: Path, texts: Mapping[str, bytes]) -> list[int]:
    """The tokens that end a text by a model's configuration.

    Args:
        folder: where the files were read.
        texts: what `read_texts` returns.

    Raises:
        ModelError: the configuration is not JSON.
    """
    if CONFIG_FILE not in texts:
        return []
    found = parsed_json(folder, CONFIG_FILE, texts[CONFIG_FILE])
    inner = found.get("text_config")
    return [*_ends(found), *(_ends(inner) if isinstance(inner, dict) else [])]


def ends_of_generation(folder: Path) -> list[int]:
    """The tokens at which a model's settings of generation end an answer.

    This file is not in the model's digest. Nothing that trains may read it: it only says where an
    answer stops that a model has begun to write.

    Raises:
        ModelError: the file cannot be read, or is not JSON.
    """
    if not (folder / GENERATION_FILE).is_file():
        return []
    with opened(folder / GENERATION_FILE) as file:
        return _ends(parsed_json(folder, GENERATION_FILE, file.read()))


def _ends(settings: Mapping[str, Any]) -> list[int]:
    found = settings.get("eos_token_id")
    return [one for one in (found if isinstance(found, list) else [found]) if type(one) is int]


def text_digest(text: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(text).hexdigest()


def opened(path: Path) -> BufferedReader:
    """A file of a model, for reading.

    Raises:
        ModelError: it cannot be read, or only stands for the file.
    """
    try:
        file = path.open("rb")
        is_pointer = file.peek(len(_POINTER)).startswith(_POINTER)
    except OSError as error:
        raise unreadable(path, error) from None
    if is_pointer:
        file.close()
        raise ModelError(
            "a file of a model was not fetched: it is a pointer of Git LFS",
            file=path,
            found=_POINTER.decode(),
            remedy="in the clone, run: git lfs pull; or get the model with: hf download",
        )
    return file


def parsed_json(folder: Path, name: str, text: bytes) -> dict[str, Any]:
    """The JSON object of a file, read as Transformers reads it.

    Raises:
        ModelError: the file holds none.
    """
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


def require_folder(folder: Path) -> None:
    """Refuses what is no folder, and says what it looks like.

    Raises:
        ModelError: there is no such folder, or it is a file.
        OSError: the system does not say.
    """
    if folder.is_dir():
        return
    if folder.exists():
        raise ModelError(
            "a base model is a folder, and this is a file",
            file=folder,
            found="a GGUF file" if folder.suffix == ".gguf" else "a file",
            accepted=_ACCEPTED,
            remedy=_GGUF if folder.suffix == ".gguf" else "give the folder that it is in",
        )
    remedy = "correct the path; docs/base-model.md says how to get a model"
    name = f"{folder.parent.name}/{folder.name}"
    if not folder.parent.exists() and _HUB_NAME.fullmatch(name):
        remedy = (
            f"if {name} is a name on the Hugging Face hub, get it first, on a machine with a"
            f" network: hf download {name} --local-dir models/{folder.name}; then give that folder"
        )
    raise ModelError(
        "there is no such folder of a base model",
        file=folder,
        found="no such folder",
        accepted=_ACCEPTED,
        remedy=remedy,
    )


def missing(folder: Path, name: str, accepted: tuple[str, ...]) -> ModelError:
    """The error that a model's folder has no file of one of the accepted names."""
    remedy = "copy all files of the model, as save_pretrained writes them"
    if any(folder.glob("*.gguf")):
        remedy = _GGUF
    elif name == TOKENIZER_FILE:
        remedy = (
            "copy the tokenizer's files too; if the model has none of this name,"
            " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it"
        )
    elif name.endswith(".safetensors") and any(folder.glob("*.bin")):
        remedy = (
            "pickles (.bin) are never read: get the safetensors, or load and save the model with"
            " Transformers, on a machine without private data"
        )
    return ModelError(
        "a model folder lacks a file",
        file=folder,
        field=name,
        found="missing",
        accepted=", ".join(accepted),
        remedy=remedy,
    )


def other_file(file: Path, field: str, found: object) -> ModelError:
    """The error that a file has another one read, which the model's digest does not cover."""
    return ModelError(
        "a file of a base model names a file that the model's digest does not cover",
        file=file,
        field=field,
        found=found,
        accepted="safetensors files of this folder" if field == "weight_map" else None,
        remedy="use a folder that save_pretrained wrote as safetensors",
    )


def unreadable(path: Path, error: OSError) -> ModelError:
    """The error that the system gives no access to a file or folder of a model."""
    return ModelError(
        "a model cannot be read",
        file=path,
        found=reason(error),
        remedy="let the trainer's user read it",
    )


def _check_stands_alone(folder: Path, texts: Mapping[str, bytes]) -> None:
    parsed = {
        name: parsed_json(folder, name, texts[name])
        for name in {name for name, _, _ in _ELSEWHERE} & texts.keys()
    }
    for name, field, allowed in _ELSEWHERE:
        value: object = parsed.get(name)
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        paths = value if field.endswith("_files") and isinstance(value, list) else [value]
        if any(isinstance(path, str) and path != allowed for path in paths):
            raise other_file(folder / name, field, value)
    for field, value in _implementations(parsed.get(CONFIG_FILE)):
        if "/" in value:
            raise other_file(folder / CONFIG_FILE, field, value)
    if _SPECIAL_TOKENS_FILE in texts:
        fields = parsed_json(folder, _SPECIAL_TOKENS_FILE, texts[_SPECIAL_TOKENS_FILE])
        for field, value in fields.items():
            if not field.endswith(_SPECIAL_TOKENS):
                raise other_file(folder / _SPECIAL_TOKENS_FILE, field, value)


def _implementations(configuration: object) -> Iterator[tuple[str, str]]:
    """Every text in a configuration that names code: the field and the text."""
    # Not by recursion, which a deep file would end.
    left = [("", configuration)]
    while left:
        field, value = left.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                # Below such a field are fields for each part of a model.
                named = field or (key if key.endswith(_IMPLEMENTATION) else "")
                left.append((named, inner))
        elif isinstance(value, str) and field:
            yield field, value


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
