"""Weights that are read once: the tensors of a safetensors file and its digest, of the same bytes.

The format's own library maps a file into memory, so that a change of the file would change the
model that was loaded from it.

A tensor is read piece by piece into memory that belongs to this process. Each piece is hashed there
and copied from there to its place, in the precision that it has there. So one tensor after the
other reaches the model's device, and the file is never in memory as a whole.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

_PIECE = 1 << 24
"""Number of bytes that are read, hashed and copied at once."""

Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True):
    """The place of a tensor, in bytes after the header."""

    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True)
class Place:
    """Where a tensor goes in a model, and in which precision."""

    parameter: str
    """The parameter's name in the model."""
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Makes the parameter of the tensor's float32 values, in memory of the CPU; None: it is the
    values in `dtype` on `device`."""


class WeightFile:
    """A safetensors file that is open, with its header read. Use `opened_weights`."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        """Reads the header."""
        self._path = path
        self._source = _Hashed(file)
        with _readable(path):
            self._entries = _entries(self._source, os.fstat(file.fileno()).st_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its name."""
        return {name: entry.shape for name, entry in self._entries}

    @property
    def are_numbers(self) -> dict[str, bool]:
        """Whether each tensor, by its name, has real numbers; indices and masks do not."""
        whole = ("I", "U", "B")
        return {
            name: entry.dtype == "BF16" or not entry.dtype.startswith(whole)
            for name, entry in self._entries
        }

    def read(self, places: Mapping[str, Place]) -> tuple[dict[str, torch.Tensor], str]:
        """Reads the rest of the file, once.

        Args:
            places: of tensors, by their names in the file. A tensor without a place stays on the
                CPU: of half precision as float32, of any other as it is.

        Returns:
            The tensors by name, and the file's SHA-256, in hexadecimal digits.

        Raises:
            ModelError: the file cannot be read, or is no whole safetensors file.
        """
        tensors = {}
        with _readable(self._path):
            for name, entry in self._entries:
                tensors[name] = _tensor(self._source, name, entry, places.get(name))
        return tensors, self._source.hexdigest()


@contextmanager
def opened_weights(path: Path) -> Iterator[WeightFile]:
    """A file with weights, and its header.

    Raises:
        ModelError: it cannot be read, or its header is malformed.
    """
    with opened(path) as file:
        yield WeightFile(path, file)


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Reads a file from its beginning to its end, without places: see `WeightFile.read`."""
    with opened_weights(path) as file:
        return file.read({})


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns the errors of reading into `ModelError`."""
    try:
        yield
    # Torch raises the last two where a shape is too large.
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError("a model's weights cannot be read", file=path, found=error) from None


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


def _tensor(source: _Hashed, name: str, entry: _Entry, place: Place | None) -> torch.Tensor:
    stored = _DTYPES.get(entry.dtype)
    if stored is None:
        raise ValueError(f"the tensor {name} is of the unknown type {entry.dtype}")
    first, last = entry.data_offsets
    if last - first != math.prod(entry.shape) * stored.itemsize:
        raise ValueError(f"the tensor {name} does not have the length of its shape")
    device = torch.device("cpu")
    dtype = torch.float32 if stored in _HALVES else stored
    if place is not None:
        dtype = torch.float32 if place.change is not None else place.dtype
        device = device if place.change is not None else place.device
    values = torch.empty(entry.shape, dtype=dtype, device=device)
    _fill(source, stored, values.view(-1))
    return values if place is None or place.change is None else place.change(values)


def _fill(source: _Hashed, stored: torch.dtype, values: torch.Tensor) -> None:
    """Reads numbers in the precision `stored` into `values`, piece by piece."""
    in_place = values.dtype == stored and values.device.type == "cpu"
    length = _PIECE // stored.itemsize
    piece = None if in_place else torch.empty(min(length, len(values)), dtype=stored)
    for start in range(0, len(values), length):
        part = values[start : start + length]
        read = part if piece is None else piece[: len(part)]
        source.fill(read.view(torch.uint8).numpy().data)
        if piece is not None:
            # Each number is rounded once, and as it always was: by way of float32.
            exact = read if stored in (*_HALVES, torch.float32) else read.float()
            part.copy_(exact if part.device == exact.device else exact.to(part.dtype))
