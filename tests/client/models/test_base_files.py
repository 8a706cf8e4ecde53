"""What of a model's folder counts, and how it is read: once, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from umbel_client.models.base.folder import load_base, read_base
from umbel_client.models.base.skeleton import skeleton
from umbel_client.models.base.weights import read_weights
from umbel_common.errors import ModelError
from umbel_common.plans.plan import Classification
from umbel_host.files.model_digest import file_digest, folder_digest, require_model
from umbel_host.files.model_folder import read_texts

LABELS = Classification(labels=("a", "b"))


def folder_of(folder: Path, **files: str) -> Path:
    """The small files of a model that may be loaded, and two files of weights that may not."""
    shard = "model-0000{}-of-00002.safetensors"
    names = {"a": shard.format(1), "b": shard.format(2)}
    texts = {
        "config.json": '{"model_type": "bert"}\n',
        "tokenizer.json": '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}\n',
        "tokenizer_config.json": '{"special_tokens_map_file": "/root/.cache/x.json"}\n',
        "vocab.txt": "a\n",
        names["a"]: "one",
        names["b"]: "two",
        "model.safetensors.index.json": json.dumps({"weight_map": names}) + "\n",
        **files,
    }
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_digest_of_a_folder_stays_what_it_was(tmp_path: Path) -> None:
    known = "35ca6f6b1d7fe5820affceb91ccd4e9314132001b7d7b0447d9d058e0649ebe7"
    assert folder_digest(folder_of(tmp_path / "plain")).hex() == known
    others = {
        ".gitattributes": "*.bin filter=lfs",
        "README.md": "a card",
        "LICENSE": "",
        "generation_config.json": "{}",
        "pytorch_model.bin": "",
        "onnx/model.onnx": "",
        "1_Pooling/config.json": "{}",
        "additional_chat_templates/tool_use.jinja": "",
    }
    crowded = folder_of(tmp_path / "crowded", **others)
    assert folder_digest(crowded).hex() == known
    require_model(crowded)


def test_a_snapshot_of_links_is_a_model(tiny_model: Path, tmp_path: Path) -> None:
    """As the cache of the Hub stores models."""
    shutil.copytree(tiny_model, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert folder_digest(tmp_path / "snapshot") == folder_digest(tiny_model)
    load_base(tmp_path / "snapshot", LABELS)


def test_the_digest_is_that_of_what_is_loaded(tiny_model: Path) -> None:
    assert read_base(tiny_model).digest == folder_digest(tiny_model)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "configuration_files", ["config.json", "/elsewhere/config.4.0.0.json"]),
        ("config.json", "transformers_weights", "adapter_model.bin"),
        ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
        ("tokenizer_config.json", "gguf_file", "/elsewhere/model.gguf"),
        ("tokenizer_config.json", "merges", "merges.txt"),
        ("tokenizer_config.json", "vocab", "vocab.txt"),
        ("tokenizer.json", "model.merges", "merges.txt"),
        ("tokenizer.json", "model.vocab", "vocab.txt"),
        ("model.safetensors.index.json", "weight_map", {"a": "b/c.safetensors"}),
        ("model.safetensors.index.json", "weight_map", {"a": "model.safetensors"}),
        ("model.safetensors.index.json", "weight_map", {"a": 1}),
        ("model.safetensors.index.json", "weight_map", {}),
    ],
)
def test_a_file_that_names_another_is_refused(
    tmp_path: Path, file: str, field: str, value: Any
) -> None:
    content: Any = value
    for key in reversed(field.split(".")):
        content = {key: content}
    folder = folder_of(tmp_path / "m", **{file: json.dumps(content)})
    for read in (folder_digest, require_model):
        with pytest.raises(ModelError, match="names a file") as caught:
            read(folder)
        assert (caught.value.file, caught.value.field) == (folder / file, field)


def test_a_file_that_names_itself_is_no_other(tmp_path: Path) -> None:
    names = {
        "config.json": '{"configuration_files": ["config.json"], "transformers_weights": null}',
        "tokenizer_config.json": '{"fast_tokenizer_files": ["tokenizer.json"]}',
    }
    require_model(folder_of(tmp_path / "m", **names))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"]
)
def test_what_was_not_fetched_is_told(tmp_path: Path, name: str) -> None:
    """A clone without Git LFS has pointers; a copy may lack one of several files with weights."""
    folder = folder_of(tmp_path / "m")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    with pytest.raises(ModelError, match="pointer of Git LFS") as caught:
        require_model(folder)
    assert caught.value.file == folder / name
    (folder / name).unlink()
    with pytest.raises(ModelError, match="lacks a file") as caught:
        require_model(folder)
    assert caught.value.field == name


def test_code_of_a_folder_is_never_asked_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(own))
    with pytest.raises(ModelError, match="code from its own folder") as caught:
        skeleton(folder, LABELS)
    assert (caught.value.field, caught.value.found) == ("model_type", "own")


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    folder = folder_of(tmp_path / "m")
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match="is not") as caught:
        read_texts(folder)
    assert caught.value.file == folder / "config.json"


TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def test_weights_are_read_as_they_are_and_halves_as_float32(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    written = {str(kind): torch.tensor([[1.5, 0.0, -2.0]]).to(kind) for kind in TYPES}
    written |= {"number": torch.tensor(3.25), "nothing": torch.empty(0, 4)}
    save_file(written, file, {"format": "pt"})
    read, found = read_weights(file)
    assert found == file_digest(file)
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        wanted = tensor.float() if name in ("torch.float16", "torch.bfloat16") else tensor
        assert read[name].dtype == wanted.dtype
        assert read[name].shape == wanted.shape
        assert torch.equal(read[name].double(), wanted.double())


def weights(header: object, size: int = 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(7),
        b"\xff" * 100,
        (1000).to_bytes(8, "little") + b"{}",
        weights([]),
        weights({"a": {"dtype": "F32"}}),
        weights({"a": ONE}, 7),
        weights({"a": ONE}, 9),
        weights({"a": ONE | {"dtype": "F31"}}),
        weights({"a": ONE | {"shape": [3]}}),
        weights({"a": ONE | {"shape": [-1, -2]}}),
        weights({"a": ONE | {"shape": [2**70, 0], "data_offsets": [0, 0]}}, 0),
        weights({"a": ONE | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, 0),
        weights({"a": ONE, "b": ONE}),
        weights({"a": ONE | {"data_offsets": [8, 16]}}, 16),
        weights({"a": ONE | {"shape": [2**40], "data_offsets": [0, 2**42]}}),
    ],
)
def test_what_is_no_whole_file_of_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="weights cannot be read") as caught:
        read_weights(file)
    assert caught.value.file == file
