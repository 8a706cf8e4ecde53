"""Texts as token ids: kept unpadded for each record, padded for each physical batch."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from umbel_client.data.records import Misfit, Records
from umbel_common.canonical import digest
from umbel_common.errors import DataError, ModelError
from umbel_host.files.model_folder import FileDigests, private_folder, read_texts
from umbel_host.processes.log import make_printable

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

    @classmethod
    def of(
        cls, ids: Sequence[npt.NDArray[np.int32]], tokenizer: PreTrainedTokenizerFast
    ) -> "Tokens":
        """The token ids of records, int32[n] each."""
        pad: object = tokenizer.pad_token_id
        lengths = [len(part) for part in ids]
        return cls(
            ids=np.concatenate([np.zeros(0, np.int32), *ids]),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            pad_id=pad if isinstance(pad, int) else 0,
        )

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
        DataError: the tokenizer fails on a text; names its row, counted from 1.
    """
    tokenizer = load_tokenizer(folder, files)
    encoded = list(_encoded(tokenizer, texts, range(1, len(texts) + 1), max_tokens))
    return Tokens.of([_sound(ids) for ids in encoded], tokenizer)


def fitting_texts(
    records: Records,
    folder: Path,
    max_tokens: int,
    files: FileDigests | None = None,
    *,
    vocabulary: int,
    on_misfit: Misfit,
) -> tuple[list[int], Tokens]:
    """As `tokenise`, without the texts that do not fit.

    Whether one does depends on this text alone: the tokenizer fails on it, or gives a token that
    the model does not know.

    Args:
        folder: the base model's.
        files: see `load_tokenizer`.
        vocabulary: number of tokens that the model knows.
        on_misfit: called with each record that does not fit.

    Returns:
        The indices of the records that fit, and their tokens.

    Raises:
        ModelError: see `load_tokenizer`.
    """
    tokenizer = load_tokenizer(folder, files)
    rows = [records.row(index) for index in range(len(records))]
    kept, ids = [], []
    encoded = _encoded(tokenizer, records.texts, rows, max_tokens)
    for index, found in enumerate(encoded):
        try:
            these = _sound(found)
            require_known(these, vocabulary, rows[index])
        except DataError as error:
            error.file = records.path
            on_misfit(error)
        else:
            kept.append(index)
            ids.append(these)
    return kept, Tokens.of(ids, tokenizer)


def require_known(ids: npt.NDArray[np.int32], vocabulary: int | None, row: int) -> None:
    """Refuses a record with a token that the model has no row for in its embedding.

    Args:
        ids: int32[n].
        vocabulary: number of rows; None: this is not asked.
        row: the record's row in the file, for the error.

    Raises:
        DataError: names the row.
    """
    if vocabulary is not None and ids.max(initial=0) >= vocabulary:
        raise DataError(
            f"row {row} holds a token that the model does not know",
            field=f"row {row}",
            found=f"token {ids.max()}",
            accepted=f"tokens 0 to {vocabulary - 1}",
            remedy="the tokenizer has more tokens than the model: resize the model's embeddings,"
            " or use the tokenizer that belongs to it",
        )


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Turns a panic of the tokenizer's Rust code into an error.

    A panic is no `Exception`. It would end the trainer and leave the round open, and a
    `tokenizer.json` can be made that panics on one character: that the site ends would tell that a
    record has it.

    Raises:
        RuntimeError: the code panicked.
    """
    try:
        yield
    except BaseException as error:
        # The class cannot be imported.
        if type(error).__name__ == "PanicException":
            raise RuntimeError("the tokenizer panicked") from error
        raise


def unreadable(row: int, error: Exception) -> DataError:
    """What is wrong with a record on which the tokenizer failed."""
    return DataError(
        f"row {row} cannot be read by the model's tokenizer",
        field=f"row {row}",
        found=type(error).__name__,
    )


def _encoded(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], rows: Sequence[int], max_tokens: int
) -> Iterator[npt.NDArray[np.int32] | DataError]:
    """Yields the token ids of each text, int32[n], or why the tokenizer fails on it."""

    def encode(part: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        with panics_are_errors():
            encoded: list[list[int]] = tokenizer(
                list(part),
                truncation=True,
                max_length=max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    for start in range(0, len(texts), AT_ONCE):
        part = texts[start : start + AT_ONCE]
        try:
            yield from encode(part)
        except Exception:
            # It fails on one of them; the others are what they are without it.
            for text, row in zip(part, rows[start : start + AT_ONCE], strict=True):
                try:
                    (found,) = encode([text])
                except Exception as error:
                    yield unreadable(row, error)
                else:
                    yield found


def _sound(found: npt.NDArray[np.int32] | DataError) -> npt.NDArray[np.int32]:
    if isinstance(found, DataError):
        raise found
    return found


def load_tokenizer(folder: Path, files: FileDigests | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model folder.

    Args:
        files: digests of the files of the model that it belongs to, which they must still have.

    Raises:
        ModelError: the folder has no fast tokenizer, or it changed since the model was loaded.
    """
    texts = read_texts(folder, files)
    # Its warnings quote the folder's files.
    make_printable("transformers")
    try:
        with _LOADING, panics_are_errors(), private_folder(folder, texts) as place:
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
