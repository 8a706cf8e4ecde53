"""The frozen-prefix cache: the output below the first adapted layer, computed once per record.

**It is private data.** Hidden states can be turned back into text. The file stays on the site's
disk, readable by its owner alone, and must be deleted with the data set.

Values are kept as float16. Logits differ from those of a whole forward pass by about a thousandth
of their range. Gradients are those of the rounded records, so the guarantee is the same.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from umbel_client.data.tokens import Ints, Tokens
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.inputs import HiddenInputs, PooledInputs, TokenInputs
from umbel_common.canonical import digest
from umbel_common.errors import StorageError

OnProgress = Callable[[int, int], None]
"""Called after each batch with (records done, records in all)."""


def ignore_progress(done: int, total: int) -> None:
    """The `OnProgress` of a caller that does not follow the work."""


_SUFFIX = ".prefix.npy"
_TOKENS_AT_ONCE = 2048
"""Tokens computed at once: enough for one thread's matrix products, few enough for its cache."""


@dataclass(frozen=True)
class FrozenCache:
    """Outputs of the frozen layers for every record of a data set."""

    values: npt.NDArray[np.float16]
    """float16[tokens, hidden size], or float16[records, hidden size] where it is pooled."""
    pooled: bool

    def inputs(self, tokens: Tokens, indices: Ints) -> HiddenInputs | PooledInputs:
        """The chosen records, padded to the longest of them."""
        if self.pooled:
            return PooledInputs(torch.from_numpy(self.values[indices]).float())
        rows, mask = tokens.rows(indices)
        hidden = torch.from_numpy(self.values[rows]).float()
        present = torch.from_numpy(mask)
        return HiddenInputs(hidden.mul_(present.unsqueeze(-1)), present)


def token_inputs(tokens: Tokens, indices: Ints) -> TokenInputs:
    """Token ids of the chosen records, padded to the longest of them."""
    rows, mask = tokens.rows(indices)
    ids = np.where(mask == 1, tokens.ids[rows], tokens.pad_id).astype(np.int64)
    return TokenInputs(torch.from_numpy(ids), torch.from_numpy(mask))


def frozen_prefix(
    model: AdaptedModel, tokens: Tokens, folder: Path | None, on_progress: OnProgress
) -> FrozenCache | None:
    """Computes the cache, or opens it if this model's outputs for these records are stored.

    Args:
        folder: where the file goes, named by the digests of model and tokens; None: memory only.
        on_progress: called after each batch.

    Returns:
        None if the model allows no cache (`AdaptedModel.frozen_output` is `nothing`), or if its
        hidden states exceed float16. Training then does whole forward passes, with the same result.

    Raises:
        StorageError: the file cannot be written.
    """
    if model.frozen_output == "nothing":
        return None
    pooled = model.frozen_output == "pooled"
    shape = (len(tokens) if pooled else len(tokens.ids), int(model.base.config.hidden_size))
    if folder is None:
        values = np.empty(shape, dtype=np.float16)
        return FrozenCache(values, pooled) if _fill(values, model, tokens, on_progress) else None
    path = folder / (_key(model, tokens) + _SUFFIX)
    if not path.is_file() and not _write(path, shape, model, tokens, on_progress):
        return None
    return FrozenCache(np.load(path, mmap_mode="r", allow_pickle=False), pooled)


def _key(model: AdaptedModel, tokens: Tokens) -> str:
    """The file's name; kind, depth and precision are in it, as a model may serve several plans."""
    kind = f"{model.frozen_output} {model.depth} {model.precision} ".encode()
    return digest("prefix", kind + model.plan.model.digest + tokens.digest()).hex()


def _write(
    path: Path, shape: tuple[int, int], model: AdaptedModel, tokens: Tokens, on_progress: OnProgress
) -> bool:
    """Fills a file that only its owner can read. It gets its name when it is complete."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=_SUFFIX, delete=False) as file:
            partial = Path(file.name)
        try:
            values: Any = np.lib.format.open_memmap(partial, "w+", dtype=np.float16, shape=shape)
            complete = _fill(values, model, tokens, on_progress)
            values.flush()
            if complete:
                partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            "the cache of frozen layers cannot be written", file=path, found=error
        ) from error
    return complete


def _fill(
    values: npt.NDArray[np.float16], model: AdaptedModel, tokens: Tokens, on_progress: OnProgress
) -> bool:
    """Computes the rows of every record; returns False if a value does not fit float16."""
    done = 0
    for indices in _batches(tokens):
        inputs = token_inputs(tokens, indices)
        output = model.frozen_forward(inputs).half().cpu()
        if not torch.isfinite(output).all():
            return False
        if model.frozen_output == "pooled":
            values[indices] = output.numpy()
        else:
            rows, mask = tokens.rows(indices)
            values[rows[mask == 1]] = output[inputs.mask == 1].numpy()
        done += len(indices)
        on_progress(done, len(tokens))
    return True


def _batches(tokens: Tokens) -> Iterator[Ints]:
    """Batches of records of similar length, so that there is little padding."""
    order = np.argsort(tokens.lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(tokens.lengths[order[min(start + 64, len(order)) - 1]]))
        count = max(1, _TOKENS_AT_ONCE // longest)
        yield order[start : start + count]
        start += count
