"""Conversations as token ids, and which of them count: those of the answer.

The chat template of the model's tokenizer renders a conversation twice: whole, and without its
answer but with the header under which a model answers. The text by which the first is longer is the
answer. Templates are Jinja programs of the model folder, which the site pinned by its digest;
Transformers runs them in a sandbox.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from umbel_client.data.conversations import Conversation, LmRecord, Turn
from umbel_client.data.records import LmRecords
from umbel_client.data.tokens import AT_ONCE, Ints, Tokens, load_tokenizer
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
        ModelError: the folder holds no fast tokenizer, or its chat template is missing or marks no
            answers.
        DataError: names the row that the template cannot render, or that is too long for the plan.
    """
    chat = Chat.load(folder, task, files)
    rows = records.rows or tuple(range(1, len(records) + 1))
    try:
        rendered = [
            chat.render(record, row) for record, row in zip(records.records, rows, strict=True)
        ]
        return chat.tokens(rendered, rows)
    except DataError as error:
        error.file = records.path
        raise


@dataclass(frozen=True)
class Rendered:
    """A record's text."""

    prompt: str
    """What comes before the answer; empty where everything counts."""
    whole: str
    """Prompt and answer."""


class Chat:
    """Renders and tokenises the records of one plan."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, task: CausalLm, folder: Path) -> None:
        """Use `load`."""
        self.tokenizer = tokenizer
        self._task = task
        self._folder = folder
        self._header = self._answer_header() if task.template == "chat" else ""

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
        if task.template == "chat" and tokenizer.chat_template is None:
            raise ModelError(
                "the base model's tokenizer has no chat template",
                file=folder,
                field="chat_template",
                found="none",
                accepted="a chat_template.jinja, or one in tokenizer_config.json",
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
        except TemplateError as error:
            raise _row_error(row, "cannot be rendered by the chat template", error) from None
        if not whole.startswith(prompt):
            raise _row_error(
                row,
                "is rendered to another prompt with its answer than without",
                "a chat template that changes earlier turns",
            )
        return Rendered("" if everything else prompt, whole)

    def tokens(self, rendered: Sequence[Rendered], rows: Sequence[int]) -> tuple[Tokens, Ints]:
        """Token ids and labels; see `tokenise_answers`.

        Raises:
            DataError: a record is too long for the plan.
        """
        ids: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for text, row, (found, ends) in zip(rendered, rows, self._encoded(rendered), strict=True):
            these = np.array(self._cut(found, row), dtype=np.int32)
            counts = np.array(ends[: len(these)]) > len(text.prompt)
            if not counts[1:].any():
                raise _row_error(
                    row,
                    "has nothing left of its answer",
                    f"a prompt of {int((~counts).sum())} tokens",
                    accepted=f"less than task.max_tokens = {self._task.max_tokens}",
                )
            ids.append(these)
            labels.append(np.where(counts, these, IGNORED).astype(np.int64))
        lengths = [len(part) for part in ids]
        pad = self.tokenizer.pad_token_id
        tokens = Tokens(
            ids=np.concatenate(ids),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            pad_id=pad if isinstance(pad, int) else 0,
        )
        return tokens, np.concatenate(labels)

    def lengths(self, rendered: Sequence[Rendered]) -> Ints:
        """Tokens before the answer and of the whole record, uncut: int64[records, 2]."""
        return np.array(
            [
                (sum(end <= len(text.prompt) for end in ends), len(ids))
                for text, (ids, ends) in zip(rendered, self._encoded(rendered), strict=True)
            ],
            dtype=np.int64,
        )

    def _encoded(self, rendered: Sequence[Rendered]) -> Iterator[tuple[list[int], list[int]]]:
        """The token ids of each text, uncut, and the position in it where each token ends."""
        plain = self._task.template == "plain"
        for start in range(0, len(rendered), AT_ONCE):
            part = rendered[start : start + AT_ONCE]
            # A chat template itself writes the tokens that begin and end a text.
            encoded = self.tokenizer(
                [text.whole for text in part],
                add_special_tokens=plain,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            for text, ids, offsets in zip(
                part, encoded["input_ids"], encoded["offset_mapping"], strict=True
            ):
                ends = [end for _, end in offsets]
                if plain:
                    ids, ends = [*ids, self.tokenizer.eos_token_id], [*ends, len(text.whole) + 1]
                yield ids, ends

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
        start = text.rfind(self._header) if self._header else -1
        if start < 0:
            raise _row_error(
                row,
                "has no answer",
                "a text without the chat template's header of an answer",
                accepted=repr(self._header) if self._header else "another format than text",
            )
        return text[: start + len(self._header)]

    def _answer_header(self) -> str:
        """The text that the template puts before an answer; empty if it marks no answers."""
        turns = [Turn("user", "x")]
        try:
            without, with_header = self._apply(turns, False), self._apply(turns, True)
        except TemplateError as error:
            raise ModelError(
                "the chat template of a base model cannot be used", file=self._folder, found=error
            ) from None
        return with_header.removeprefix(without)

    def _apply(self, turns: Sequence[Turn], header: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [msgspec.to_builtins(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=header,
        )
        assert isinstance(text, str)  # tokenize=False
        return text


def _row_error(
    row: int, what: str, found: object, *, accepted: str | None = None, remedy: str | None = None
) -> DataError:
    return DataError(
        f"row {row} {what}", field=f"row {row}", found=found, accepted=accepted, remedy=remedy
    )
