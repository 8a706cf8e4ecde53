"""The frozen-prefix cache: the output below the first adapted layer, computed once per record.

**It is private data.** Hidden states can be turned back into text. The file stays on the site's
disk, readable by its owner alone, and must be deleted with the data set.

Values are kept as float16. Logits differ from those of a whole forward pass by about a thousandth
of their range. Gradients are those of the rounded records, so the guarantee is the same: a record's
values follow from this record alone, and no record decides whether others are cached.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from umbel_client.data.tokens import Ints, Tokens
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.architecture import width_of
from umbel_client.models.inputs import HiddenInputs, PooledInputs, TokenInputs
from umbel_client.tasks.shapes import Part
from umbel_common.canonical import digest
from umbel_common.errors import StorageError

OnProgress = Callable[[int, int], None]
"""Called after each batch with (records done, records in all)."""


def ignore_progress(done: int, total: int) -> None:
    """The `OnProgress` of a caller that does not follow the work."""


_SUFFIX = ".prefix.npy"
_PARTIAL = "partial-"
"""Beginning of the name of a file that is not complete."""
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class FrozenCache:
    """Outputs of the frozen layers for every record of a data set."""

    values: npt.NDArray[np.float16]
    """float16[tokens, hidden size], or float16[records, hidden size] where it is pooled."""
    pooled: bool

    def inputs(self, tokens: Tokens, indices: Ints, length: int) -> HiddenInputs | PooledInputs:
        """The chosen records, padded to `length` tokens."""
        if self.pooled:
            return PooledInputs(torch.from_numpy(self.values[indices]).float())
        rows, mask = tokens.rows(indices, length)
        hidden = torch.from_numpy(self.values[rows]).float()
        present = torch.from_numpy(mask)
        return HiddenInputs(hidden.mul_(present.unsqueeze(-1)), present)


def token_inputs(tokens: Tokens, indices: Ints, length: int) -> TokenInputs:
    """Token ids of the chosen records, padded to `length` tokens."""
    rows, mask = tokens.rows(indices, length)
    ids = np.where(mask == 1, tokens.ids[rows], tokens.pad_id).astype(np.int64)
    return TokenInputs(torch.from_numpy(ids), torch.from_numpy(mask))


def frozen_prefix(
    model: AdaptedModel,
    tokens: Tokens,
    parts: Sequence[Part],
    folder: Path | None,
    on_progress: OnProgress,
) -> FrozenCache | None:
    """Computes the cache, or opens it if this model's outputs for these records are stored.

    Args:
        parts: every record once, in the shapes in which they are computed.
        folder: where the file goes, named by the digests of model and tokens; None: memory only.
        on_progress: called after each batch.

    Returns:
        None if the model allows no cache (`AdaptedModel.frozen_output` is `nothing`). Training then
        does whole forward passes. A record whose hidden states exceed float16 has them cut at its
        largest value: if it switched the cache off, it would change the gradients of all others.

    Raises:
        StorageError: the file cannot be written.
    """
    if model.frozen_output == "nothing":
        return None
    pooled = model.frozen_output == "pooled"
    shape = (len(tokens) if pooled else len(tokens.ids), width_of(model.base))
    if folder is None:
        values = np.empty(shape, dtype=np.float16)
        _fill(values, model, tokens, parts, on_progress)
        return FrozenCache(values, pooled)
    path = folder / (_key(model, tokens, parts) + _SUFFIX)
    if not path.is_file():
        _write(path, shape, model, tokens, parts, on_progress)
    return FrozenCache(np.load(path, mmap_mode="r", allow_pickle=False), pooled)


def _key(model: AdaptedModel, tokens: Tokens, parts: Sequence[Part]) -> str:
    """The file's name; kind, depth and precision are in it, as a model may serve several plans, and
    the shape in which each record was computed."""
    kind = f"{model.frozen_output} {model.depth} {model.precision} ".encode()
    shapes = np.empty((len(tokens), 2), dtype=np.int64)
    for part in parts:
        shapes[part.records] = part.length, part.rows
    content = model.plan.model.digest + tokens.digest() + shapes.tobytes()
    return digest("prefix", kind + content).hex()


def _write(
    path: Path,
    shape: tuple[int, int],
    model: AdaptedModel,
    tokens: Tokens,
    parts: Sequence[Part],
    on_progress: OnProgress,
) -> None:
    """Fills a file that only its owner can read. It gets its name when it is complete."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One process has the folder at a time. What one that was killed left would stay for ever.
        for left in path.parent.glob(f"{_PARTIAL}*{_SUFFIX}"):
            left.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=_PARTIAL, suffix=_SUFFIX, delete=False
        ) as file:
            partial = Path(file.name)
        try:
            values: Any = np.lib.format.open_memmap(partial, "w+", dtype=np.float16, shape=shape)
            # Now, where it is an error: a page of the mapped file for which the disk has no room
            # would end the process (SIGBUS).
            with partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
            _fill(values, model, tokens, parts, on_progress)
            values.flush()
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            "the cache of frozen layers cannot be written", file=path, found=error
        ) from error


def _fill(
    values: npt.NDArray[np.float16],
    model: AdaptedModel,
    tokens: Tokens,
    parts: Sequence[Part],
    on_progress: OnProgress,
) -> None:
    """Computes the rows of every record."""
    done = 0
    for part in parts:
        inputs = token_inputs(tokens, part.filled, part.length)
        output = model.frozen_forward(inputs)[: len(part)]
        kept = output.nan_to_num(0.0).clamp(-_LARGEST, _LARGEST).half().cpu()
        if model.frozen_output == "pooled":
            values[part.records] = kept.numpy()
        else:
            rows, mask = tokens.rows(part.records, part.length)
            values[rows[mask == 1]] = kept[torch.from_numpy(mask == 1)].numpy()
        done += len(part)
        on_progress(done, len(tokens))
