"""Conversations as token ids, and which of them count: those of the answer.

The chat template of the model's tokenizer renders a conversation twice: whole, and without its
answer but with the header under which a model answers. The text by which the first is longer is the
answer. Templates are Jinja programs of the model folder, which the site pinned by its digest;
Transformers runs them in a sandbox.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from umbel_client.data.conversations import Conversation, LmRecord, Turn, check_template
from umbel_client.data.records import LmRecords, Misfit, refuse
from umbel_client.data.tokens import (
    AT_ONCE,
    Ints,
    Tokens,
    load_tokenizer,
    panics_are_errors,
    require_known,
    unreadable,
)
from umbel_common.errors import DataError, ModelError
from umbel_common.plans.plan import CausalLm
from umbel_host.files.model_folder import FileDigests

IGNORED = -100
"""Label of a token that does not count, as in Transformers and torch."""


def tokenise_answers(
    records: LmRecords, folder: Path, task: CausalLm, files: FileDigests | None = None
) -> tuple[Tokens, Ints]:
    """Token ids of all records, and which of them count.

    Args:
        folder: the base model's, for its tokenizer.
        files: see `umbel_client.data.tokens.load_tokenizer`.

    Returns:
        The tokens, and labels int64[tokens]: the id of a token that counts, else `IGNORED`.

    Raises:
        ModelError: the folder holds no fast tokenizer, or lacks the chat template that is needed.
        DataError: names the row of a record that does not fit (`fitting_answers`).
    """
    _, tokens, labels = fitting_answers(records, folder, task, files)
    return tokens, labels


def fitting_answers(
    records: LmRecords,
    folder: Path,
    task: CausalLm,
    files: FileDigests | None = None,
    *,
    vocabulary: int | None = None,
    on_misfit: Misfit = refuse,
) -> tuple[list[int], Tokens, Ints]:
    """Tokenises the records that fit. Whether one does depends on this record alone.

    A record does not fit if the template does not take it or fails on it, if it is longer than the
    plan allows (unless the plan cuts it), if nothing is left of its answer, if the tokenizer fails
    on it, or if it has a token that the model does not know.

    Args:
        folder: the base model's, for its tokenizer.
        files: see `umbel_client.data.tokens.load_tokenizer`.
        vocabulary: number of tokens that the model knows; None: this is not asked.
        on_misfit: called with each record that does not fit.

    Returns:
        The indices of the records that fit, and tokens and labels as `tokenise_answers` does.

    Raises:
        ModelError: as `tokenise_answers`.
    """
    chat = Chat.load(folder, task, files)

    def leave_out(misfit: DataError) -> None:
        misfit.file = records.path
        on_misfit(misfit)

    rendered: dict[int, Rendered] = {}
    for index, record in enumerate(records.records):
        try:
            rendered[index] = chat.render(record, records.row(index))
        except DataError as error:
            leave_out(error)
    kept: list[int] = []
    ids: list[npt.NDArray[np.int32]] = []
    labels: list[Ints] = []
    encoded = chat.encoded(list(rendered.values()), [records.row(index) for index in rendered])
    for (index, text), found in zip(rendered.items(), encoded, strict=True):
        try:
            these, counted = chat.counted(text, found, records.row(index), vocabulary)
        except DataError as error:
            leave_out(error)
        else:
            kept.append(index)
            ids.append(these)
            labels.append(counted)
    tokens = Tokens.of(ids, chat.tokenizer)
    return kept, tokens, np.concatenate([np.zeros(0, np.int64), *labels])


_STARTED = datetime.now()


class _OneMoment(datetime):
    """The clock that templates read (`strftime_now`), which stands still.

    A template may take its time over one record, and write the time into those that follow: then
    one record would change the tokens of others.
    """

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_OneMoment":
        return cls.fromtimestamp(_STARTED.timestamp(), tz)


chat_template_utils.datetime = _OneMoment  # type: ignore[attr-defined]  # imported there


@dataclass(frozen=True)
class Rendered:
    """A record's text."""

    prompt: str
    """What comes before the answer; empty where everything counts."""
    whole: str
    """Prompt and answer."""


@dataclass(frozen=True)
class Encoded:
    """A text's tokens, uncut."""

    ids: list[int]
    ends: list[int]
    """The position in the text where each token ends."""


class Chat:
    """Renders and tokenises the records of one plan."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, task: CausalLm, folder: Path) -> None:
        """Use `load`."""
        self.tokenizer = tokenizer
        self._task = task
        self._folder = folder

    @classmethod
    def load(cls, folder: Path, task: CausalLm, files: FileDigests | None = None) -> "Chat":
        """Uses the fast tokenizer of a model folder.

        Args:
            files: see `umbel_client.data.tokens.load_tokenizer`.

        Raises:
            ModelError: the folder has no fast tokenizer, or the plan asks for a chat template and
                the tokenizer has none.
        """
        tokenizer = load_tokenizer(folder, files)
        template: object = tokenizer.chat_template
        named = sorted(template) if isinstance(template, dict) else ()
        if task.template == "chat" and (template is None or (named and "default" not in named)):
            raise ModelError(
                "the base model's tokenizer has no chat template"
                + (" for conversations alone" if named else ""),
                file=folder,
                field="chat_template",
                found=f"the templates {', '.join(named)}" if named else "none",
                accepted="a chat_template.jinja, or one in tokenizer_config.json"
                + (" that is named default" if named else ""),
                remedy='use a model with one, or agree on a plan with task.template = "plain"',
            )
        if task.template == "plain" and tokenizer.eos_token_id is None:
            raise ModelError(
                "the base model's tokenizer has no token that ends a text",
                file=folder,
                field="eos_token",
            )
        return cls(tokenizer, task, folder)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text that a model is given to answer.

        Raises:
            DataError: the template cannot render the turns.
        """
        if self._task.template == "plain":
            return turns[-1].content
        return self._apply(turns, True)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt; a chat template itself writes those that begin a text."""
        encoded = self.tokenizer(text, add_special_tokens=self._task.template == "plain")
        ids: list[int] = encoded["input_ids"]
        return ids

    def render(self, record: LmRecord, row: int) -> Rendered:
        """A record's text, and where its answer begins.

        Args:
            row: the record's row in the file, for errors.

        Raises:
            DataError: the template cannot render the record, or its answer has no beginning.
        """
        check_template(record, self._task, row)
        everything = self._task.loss_on == "all"
        if not isinstance(record, Conversation):
            if everything:
                return Rendered("", record.text)
            return Rendered(self._up_to_answer(record.text, row), record.text)
        try:
            prompt = self.prompt(record.turns[:-1])
            if self._task.template == "plain":
                whole = prompt + record.turns[-1].content
            else:
                whole = self._apply(record.turns, False)
        except DataError as error:
            raise _row_error(row, "cannot be rendered by the chat template", error.found) from error
        if not whole.startswith(prompt):
            raise _row_error(
                row,
                "is rendered to another prompt with its answer than without",
                "a chat template that changes earlier turns",
            )
        return Rendered("" if everything else prompt, whole)

    def counted(
        self, text: Rendered, found: "Encoded | DataError", row: int, vocabulary: int | None = None
    ) -> tuple[npt.NDArray[np.int32], Ints]:
        """Token ids of a record, int32[n], and its labels, int64[n].

        Args:
            found: what `encoded` yields for it.
            row: the record's row in the file, for errors.
            vocabulary: number of tokens that the model knows; None: this is not asked.

        Raises:
            DataError: the record does not fit (`fitting_answers`).
        """
        if isinstance(found, DataError):
            raise found
        these = np.array(self._cut(found.ids, row), dtype=np.int32)
        require_known(these, vocabulary, row)
        counts = np.array(found.ends[: len(these)]) > len(text.prompt)
        if not counts[1:].any():
            raise _row_error(
                row,
                "has nothing left of its answer",
                f"a prompt of {int((~counts).sum())} tokens",
                accepted=f"less than task.max_tokens = {self._task.max_tokens}",
            )
        return these, np.where(counts, these, IGNORED).astype(np.int64)

    def lengths(self, rendered: Sequence[Rendered], rows: Sequence[int]) -> Ints:
        """Tokens before the answer and of the whole record, uncut: int64[records, 2].

        Raises:
            DataError: names the row on which the tokenizer fails.
        """
        lengths = np.zeros((len(rendered), 2), dtype=np.int64)
        encoded = self.encoded(rendered, rows)
        for index, (text, found) in enumerate(zip(rendered, encoded, strict=True)):
            if isinstance(found, DataError):
                raise found
            lengths[index] = sum(end <= len(text.prompt) for end in found.ends), len(found.ids)
        return lengths

    def encoded(
        self, rendered: Sequence[Rendered], rows: Sequence[int]
    ) -> Iterator["Encoded | DataError"]:
        """Yields each text's tokens, uncut, or why the tokenizer fails on it.

        Args:
            rows: the records' rows in the file, for errors.
        """
        for start in range(0, len(rendered), AT_ONCE):
            part = rendered[start : start + AT_ONCE]
            try:
                yield from self._encode(part)
            except Exception:
                # The tokenizer fails on one of them; the others are what they are without it.
                for text, row in zip(part, rows[start : start + AT_ONCE], strict=True):
                    try:
                        (found,) = self._encode([text])
                    except Exception as error:
                        yield unreadable(row, error)
                    else:
                        yield found

    def _encode(self, part: Sequence[Rendered]) -> list["Encoded"]:
        plain = self._task.template == "plain"
        # A chat template itself writes the tokens that begin and end a text.
        with panics_are_errors():
            encoded = self.tokenizer(
                [text.whole for text in part],
                add_special_tokens=plain,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
        found = []
        for text, ids, offsets in zip(
            part, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            ends = [end for _, end in offsets]
            if plain:
                ids, ends = [*ids, self.tokenizer.eos_token_id], [*ends, len(text.whole) + 1]
            found.append(Encoded(ids, ends))
        return found

    def _cut(self, ids: list[int], row: int) -> list[int]:
        most = self._task.max_tokens
        if len(ids) > most and self._task.too_long == "refuse":
            raise _row_error(
                row,
                "is longer than the plan allows",
                f"{len(ids)} tokens",
                accepted=f"at most task.max_tokens = {most}",
                remedy='shorten it, or agree on a plan with task.too_long = "truncate"',
            )
        return ids[:most]

    def _up_to_answer(self, text: str, row: int) -> str:
        """The part of an already rendered text before its last answer."""
        header = self._header
        start = text.rfind(header) if header else -1
        if start < 0:
            raise _row_error(
                row,
                "has no answer",
                "a text without the chat template's header of an answer",
                accepted=repr(header) if header else "another format than text",
            )
        return text[: start + len(header)]

    @cached_property
    def _header(self) -> str:
        """The text that the template puts before an answer; empty if it marks no answers."""
        turns = [Turn("user", "x")]
        try:
            without, with_header = self._apply(turns, False), self._apply(turns, True)
        except DataError as error:
            raise ModelError(
                "the chat template of a base model cannot be used",
                file=self._folder,
                found=error.found,
            ) from error
        return with_header.removeprefix(without)

    def _apply(self, turns: Sequence[Turn], header: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [msgspec.to_builtins(turn) for turn in turns],
                tokenize=False,
                add_generation_prompt=header,
            )
        except Exception as error:
            # A template is a program, and may fail in any way.
            plain = isinstance(error, TemplateError)
            raise DataError(
                "a chat template cannot render a conversation",
                file=self._folder,
                field="chat_template",
                found=error if plain else f"{type(error).__name__}: {error}",
            ) from error
        assert isinstance(text, str)  # tokenize=False
        return text


def _row_error(
    row: int, what: str, found: object, *, accepted: str | None = None, remedy: str | None = None
) -> DataError:
    return DataError(
        f"row {row} {what}", field=f"row {row}", found=found, accepted=accepted, remedy=remedy
    )
