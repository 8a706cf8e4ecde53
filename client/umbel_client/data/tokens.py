"""Texts as token ids: kept unpadded for each record, padded for each physical batch."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from umbel_common.canonical import digest
from umbel_common.errors import ModelError
from umbel_host.files.model_folder import FileDigests, private_folder, read_texts

_LOADING = threading.Lock()
"""Transformers' lazy imports are not safe in several threads at once."""

AT_ONCE = 1000
"""Texts given to a tokenizer at once: its result takes twenty times the length of the text."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """The token ids of all records, one record after the other."""

    ids: npt.NDArray[np.int32]
    """int32[tokens]."""
    starts: Ints
    """int64[records + 1]: record i has ids[starts[i] : starts[i + 1]]."""
    pad_id: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """int64[records]."""
        return np.diff(self.starts)

    def digest(self) -> bytes:
        """The name of exactly these records in this order, 32 bytes."""
        return digest("tokens", self.starts.tobytes() + self.ids.tobytes())

    def rows(self, indices: Ints, length: int) -> tuple[Ints, Ints]:
        """Positions in `ids` of the chosen records' tokens, padded to `length` tokens.

        Args:
            length: not smaller than the longest of these records.

        Returns:
            Rows int64[n, length], 0 in the padding, and mask int64[n, length], 1 where there is a
            token.
        """
        lengths = self.lengths[indices]
        assert lengths.max(initial=0) <= length
        columns = np.arange(length)
        mask = columns < lengths[:, None]
        rows = np.where(mask, self.starts[indices][:, None] + columns, 0)
        return rows, mask.astype(np.int64)


def tokenise(
    texts: Sequence[str], folder: Path, max_tokens: int, files: FileDigests | None = None
) -> Tokens:
    """Cuts each text into at most `max_tokens` tokens with the fast tokenizer of a model folder.

    Args:
        files: see `load_tokenizer`.

    Raises:
        ModelError: see `load_tokenizer`.
    """
    tokenizer = load_tokenizer(folder, files)
    encoded: list[list[int]] = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    lengths = [len(ids) for ids in encoded]
    pad_id: object = tokenizer.pad_token_id
    return Tokens(
        ids=np.fromiter((id_ for ids in encoded for id_ in ids), np.int32, sum(lengths)),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pad_id=pad_id if isinstance(pad_id, int) else 0,
    )


def load_tokenizer(folder: Path, files: FileDigests | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model folder.

    Args:
        files: digests of the files of the model that it belongs to, which they must still have.

    Raises:
        ModelError: the folder has no fast tokenizer, or it changed since the model was loaded.
    """
    texts = read_texts(folder, files)
    try:
        with _LOADING, private_folder(folder, texts) as place:
            tokenizer = AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the libraries promise no classes of errors
        raise ModelError("a tokenizer cannot be loaded", file=folder, found=error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            "a model folder has no fast tokenizer",
            file=folder,
            found=type(tokenizer).__name__,
            accepted="tokenizer.json",
        )
    return tokenizer
