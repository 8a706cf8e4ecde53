"""Safetensors files of float32 tensors, written and read one tensor at a time.

The format's own library copies all that it writes, and maps all that it reads into memory. For an
adapter, that would take as much memory again.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

Tensor = npt.NDArray[np.float32]

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
"""Number of bytes that the format itself allows."""

Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The place of a tensor, in bytes after the header."""

    dtype: Literal["F32"]
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    mode: int = 0o666,
) -> None:
    """Writes a new file, or over an old one, and syncs it.

    Args:
        mode: largest permissions of a new file, from which the umask takes away.

    Raises:
        OSError: it cannot be written; what is there is not whole.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    # In this format, the tensors begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, dtype="<f4").reshape(-1).data)
        file.flush()
        os.fsync(file.fileno())


class TensorFile:
    """A file that is open for reading. A tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not such a file, or not whole.
        """
        self._file = path.open("rb")
        try:
            self._start, self._entries, self.metadata = self._header(path.stat().st_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            KeyError: no tensor has that name.
            OSError: it cannot be read.
            ValueError: the file became shorter.
        """
        tensor = np.empty(self._entries[name].shape, dtype=np.float32)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, target: Tensor) -> None:
        """Like `read`, into a contiguous array of the tensor's shape.

        Raises:
            ValueError: the array has another shape.
        """
        entry = self._entries[name]
        if target.shape != entry.shape:
            raise ValueError(f"the tensor {name} has the shape {entry.shape}, not {target.shape}")
        self._file.seek(self._start + entry.data_offsets[0])
        view = target.reshape(-1, copy=False).view(np.uint8).data
        if self._file.readinto(view) != len(view):
            raise ValueError(f"the file ends in the middle of the tensor {name}")
        if not np.little_endian:
            target.byteswap(inplace=True)

    def _header(self, size: int) -> tuple[int, dict[str, _Entry], dict[str, str]]:
        length = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if length > _LARGEST_HEADER or start > size:
            raise ValueError("the header does not fit into the file")
        try:
            fields = msgspec.json.decode(self._file.read(length), type=dict[str, msgspec.Raw])
            metadata = msgspec.json.decode(fields.pop(_METADATA, b"{}"), type=dict[str, str])
            entries = {
                name: msgspec.json.decode(entry, type=_Entry) for name, entry in fields.items()
            }
        except msgspec.MsgspecError as error:
            raise ValueError(f"the header is malformed: {error}") from None
        for name, entry in entries.items():
            first, last = entry.data_offsets
            if last - first != 4 * math.prod(entry.shape) or start + last > size:
                raise ValueError(f"the tensor {name} does not fit into the file")
        return start, entries, metadata
