"""Weights that are read once: the tensors of a safetensors file and its digest, of the same bytes.

The format's own library maps a file into memory, so that a change of the file would change the
model that was loaded from it.
"""

import hashlib
import math
import os
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from umbel_common.errors import ModelError
from umbel_host.files.model_folder import opened

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_HALVES = (torch.float16, torch.bfloat16)
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
"""Number of bytes that the format itself allows."""

Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True):
    """The place of a tensor, in bytes after the header."""

    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Reads a file from its beginning to its end.

    Returns:
        The tensors by name, of half precision as float32, and the file's SHA-256, in hexadecimal
        digits. Tensors are turned into float32 one by one: that takes no more memory than the
        model.

    Raises:
        ModelError: it cannot be read, or is no whole safetensors file.
    """
    tensors = {}
    with opened(path) as file:
        source = _Hashed(file)
        try:
            for name, entry in _entries(source, os.fstat(file.fileno()).st_size):
                tensor = _tensor(source, name, entry)
                tensors[name] = tensor.float() if tensor.dtype in _HALVES else tensor
        # Torch raises the last two where a shape is too large.
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise ModelError("a model's weights cannot be read", file=path, found=error) from None
    return tensors, source.hexdigest()


class _Hashed:
    """A file of which every byte that is read is hashed."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def fill(self, buffer: bytearray | memoryview) -> None:
        if self._file.readinto(buffer) != len(buffer):
            raise ValueError("the file is not whole")
        self._hash.update(buffer)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _entries(source: _Hashed, size: int) -> list[tuple[str, _Entry]]:
    """The header: names and places of the tensors, in their order in the file.

    Args:
        size: of the file, in bytes. The tensors fill it, each byte belonging to one.
    """
    start = bytearray(_LENGTH_BYTES)
    source.fill(start)
    length = int.from_bytes(start, "little")
    if length > _LARGEST_HEADER:
        raise ValueError("the header is too long")
    header = bytearray(length)
    source.fill(header)
    try:
        fields = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        found = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in fields.items()}
    except msgspec.MsgspecError as error:
        raise ValueError(f"the header is malformed: {error}") from None
    entries = sorted(found.items(), key=lambda item: item[1].data_offsets)
    ends = [0, *(entry.data_offsets[1] for _, entry in entries)]
    if [entry.data_offsets[0] for _, entry in entries] != ends[:-1]:
        raise ValueError("the tensors do not follow each other")
    if _LENGTH_BYTES + length + ends[-1] != size:
        raise ValueError("the tensors do not fill the file")
    return entries


def _tensor(source: _Hashed, name: str, entry: _Entry) -> torch.Tensor:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"the tensor {name} is of the unknown type {entry.dtype}")
    first, last = entry.data_offsets
    if last - first != math.prod(entry.shape) * dtype.itemsize:
        raise ValueError(f"the tensor {name} does not have the length of its shape")
    buffer = torch.empty(last - first, dtype=torch.uint8)
    source.fill(buffer.numpy().data)
    return buffer.view(dtype).reshape(entry.shape)
