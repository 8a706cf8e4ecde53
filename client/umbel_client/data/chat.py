"""Conversations as token ids, and which of them count: those of the answer and of its end.

This is the one definition of an answer, for training, scoring and generating. An answer is the text
between the prompt and what the template writes behind it (`umbel_client.data.template`); with a
plain template, it is all that follows the prompt. It ends at the first token that the template
writes behind an answer, or where the template writes none, at the token that ends a text. That end
counts: a model has to write it. What comes after it does not. An answer that has its end already is
not ended twice, and one with more text behind its end is refused: no model is asked for that.

A record begins with exactly the token ids that a model is given when it answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from umbel_client.data.answer_end import AnswerEnds
from umbel_client.data.conversations import (
    Conversation,
    LmRecord,
    Passage,
    Question,
    check_template,
)
from umbel_client.data.records import LmRecords, Misfit, refuse
from umbel_client.data.template import ChatTemplate, Frame
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
        ModelError: the folder holds no fast tokenizer, or no chat template of use where one is
            needed.
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
    for index, found in zip(rendered, encoded, strict=True):
        try:
            these, counted = chat.counted(found, records.row(index), vocabulary)
        except DataError as error:
            leave_out(error)
        else:
            kept.append(index)
            ids.append(these)
            labels.append(counted)
    tokens = Tokens.of(ids, chat.tokenizer)
    return kept, tokens, np.concatenate([np.zeros(0, np.int64), *labels])


@dataclass(frozen=True)
class Rendered:
    """A record's text."""

    prompt: str
    """What comes before the answer."""
    answer: str
    """The answer, its end, and what the template writes after that."""
    counts: int
    """Number of characters of `answer` that count: those of the answer and of its end."""
    end: int | None
    """The token that ends the answer; None: none does, or the whole text counts."""
    follows: bool
    """Whether the token that ends a text follows."""


@dataclass(frozen=True)
class Encoded:
    """A text's tokens, uncut."""

    ids: list[int]
    first: int
    """Number of tokens before the first that counts."""
    last: int
    """Number of tokens up to the last that counts."""
    has_more: bool = False
    """Whether more text of the answer follows its end."""


class Chat:
    """Renders and tokenises the records of one plan."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        task: CausalLm,
        folder: Path,
        files: FileDigests | None = None,
    ) -> None:
        """Use `load`."""
        self.tokenizer = tokenizer
        self._task = task
        self._folder = folder
        self._ends = AnswerEnds(tokenizer, folder, files)
        self._everything = task.loss_on == "all"
        self._template = ChatTemplate(tokenizer, folder) if task.template == "chat" else None

    @classmethod
    def load(cls, folder: Path, task: CausalLm, files: FileDigests | None = None) -> "Chat":
        """Uses the fast tokenizer of a model folder.

        Args:
            files: see `umbel_client.data.tokens.load_tokenizer`.

        Raises:
            ModelError: the folder has no fast tokenizer, the plan asks for a chat template and the
                tokenizer has none, or no token ends a text and the plan needs one.
        """
        chat = cls(load_tokenizer(folder, files), task, folder, files)
        if task.template == "plain" and chat._ends.of_text is None:
            raise chat._ends.missing()
        return chat

    def frame(self, question: Question, row: int = 1) -> Frame:
        """What comes before and behind the answer to a question.

        Args:
            row: the question's row in the file, for errors.

        Raises:
            ModelError: the chat template cannot be used at all.
            DataError: the template cannot render the question, or does not take it.
        """
        if isinstance(question, Passage):
            if self._everything or self._template is None:
                return Frame(question.text)
            self.require_usable()
            made_up = self._template.made_up
            prompt = self._up_to_answer(question.text, row)
            return Frame(prompt, made_up.opening, made_up.left_out, made_up.closing)
        if self._template is None:
            return Frame(question[-1].content, closing="")
        self.require_usable()
        return self._template.frame(question)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt, as a record begins with them.

        A chat template itself writes those that begin a text.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*self._begin, *ids]

    @cached_property
    def _begin(self) -> list[int]:
        """The tokens that the tokenizer puts before each text, if no template writes them."""
        if self._template is not None:
            return []
        bare, whole = (
            self.tokenizer("x", add_special_tokens=added)["input_ids"] for added in (False, True)
        )
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return list(whole[:start])
        return []

    def render(self, record: LmRecord, row: int) -> Rendered:
        """A record's text, and where its answer begins and ends.

        Args:
            row: the record's row in the file, for errors.

        Raises:
            ModelError: the chat template cannot be used at all.
            DataError: the template cannot render the record, or its answer has no beginning.
        """
        check_template(record, self._task, row)
        if not isinstance(record, Conversation):
            if self._everything:
                length = len(record.text)
                return Rendered("", record.text, length, None, self._template is None)
            frame = self.frame(record, row)
            return self._rendered(frame, record.text[len(frame.prompt) :])
        if self._template is None:
            return self._rendered(self.frame(record.turns[:-1]), record.turns[-1].content)
        try:
            frame = self.frame(record.turns[:-1])
            whole = self._template.written(record.turns)
        except DataError as error:
            raise _row_error(
                row,
                "cannot be rendered by the chat template",
                error.found,
                remedy=f"the template is that of the tokenizer in {self._folder}",
            ) from error
        if not whole.startswith(frame.prompt):
            raise _row_error(
                row,
                "is rendered to another prompt with its answer than without",
                "a chat template that changes earlier turns, or that opens thoughts in the prompt"
                " alone",
            )
        return self._rendered(frame, whole[len(frame.prompt) :])

    def _rendered(self, frame: Frame, rest: str) -> Rendered:
        """A record, from the prompt and from what follows it."""
        if frame.left_out:
            rest = rest.removeprefix(frame.opening)
        counts = len(rest)
        end = self._ends.behind(frame.closing or "")
        if frame.closing is not None and not end.text:
            rest = rest.removesuffix(frame.closing)
            token = self._ends.of_text
            return Rendered(frame.prompt, rest, len(rest), token, token is not None)
        if frame.closing is not None and rest.endswith(frame.closing):
            counts += len(end.text) - len(frame.closing)
        elif rest.rstrip().endswith(end.text):
            # A rendered text may lack the line feed at its end.
            counts = len(rest.rstrip())
        return Rendered(frame.prompt, rest, counts, end.token, False)

    def reference(self, record: Conversation) -> str:
        """The answer of a record, as `answer` reads it of a model that writes exactly this.

        Raises:
            ModelError, DataError: see `render`; or the tokenizer fails on it.
        """
        (found,) = self.encoded([self.render(record, 1)], [1])
        if isinstance(found, DataError):
            raise found
        frame = self.frame(record.turns[:-1])
        return self.answer(frame, found.ids[len(self.prompt_ids(frame.prompt)) :])

    def answer(self, frame: Frame, ids: Sequence[int]) -> str:
        """The answer that a model wrote, without what a template adds to it.

        Args:
            frame: of the question.
            ids: the tokens after the prompt; the answer ends at the first of `ends`.
        """
        ends, end = self.ends(frame), self._ends.behind(frame.closing or "")
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text, written = self.text(ids[:length]), self.end_text(frame)
        if written is not None:
            text = text.partition(written)[0]
        opening = frame.opening.strip()
        return text.strip().removeprefix(opening).removesuffix(end.before).strip()

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, of all of them and as it is."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def ends(self, frame: Frame) -> frozenset[int]:
        """The tokens at which an answer ends: those of the template, tokenizer and model."""
        token = self._ends.behind(frame.closing or "").token
        return self._ends.of_model if token is None else self._ends.of_model | {token}

    def end_text(self, frame: Frame) -> str | None:
        """The text at which an answer ends where the template has no token of its own for it."""
        end = self._ends.behind(frame.closing or "")
        return end.text.strip() or None if end.token is None else None

    def require_usable(self) -> None:
        """Refuses a model whose chat template is of no use, or whose answers nothing ends.

        Raises:
            ModelError: says what is wrong.
        """
        if self._template is None:
            return  # `load` asks for the end of a plain one
        closing = self._template.made_up.closing
        endless = closing is not None and not self._ends.behind(closing).text
        if endless and self._ends.of_text is None and not self._everything:
            raise self._ends.missing()

    def require_one_prompt(self) -> None:
        """Refuses a template that writes another prompt with an answer than without, whatever the
        turns are: no conversation could be trained on.

        Raises:
            ModelError: says so.
        """
        self.require_usable()
        if self._template and self._template.made_up.closing is None:
            raise ModelError(
                "the chat template of a base model is of no use to train on answers",
                file=self._folder,
                field="chat_template",
                found="another prompt with an answer than without, such as one that opens thoughts",
                accepted="a template that writes a prompt alone as it writes it before an answer",
                remedy='use another model, or agree on a plan with task.template = "plain"',
            )

    def counted(
        self, found: "Encoded | DataError", row: int, vocabulary: int | None = None
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
        if found.has_more:
            raise _row_error(
                row,
                "has text behind the end of its answer",
                f"{self.text(found.ids[found.last - 1 : found.last])!r} inside the answer",
                accepted="an answer without its end, or with it at the very end",
                remedy="leave the end out of the answer: Umbel puts it behind each answer",
            )
        these = np.array(self._cut(found.ids, row), dtype=np.int32)
        require_known(these, vocabulary, row)
        places = np.arange(len(these))
        counts = (places >= found.first) & (places < found.last)
        if not counts[1:].any():
            raise _row_error(
                row,
                "has nothing left of its answer",
                f"a prompt of {found.first} tokens",
                accepted=f"less than task.max_tokens = {self._task.max_tokens}",
            )
        return these, np.where(counts, these, IGNORED).astype(np.int64)

    def lengths(self, rendered: Sequence[Rendered], rows: Sequence[int]) -> Ints:
        """Tokens before the answer and of the whole record, uncut: int64[records, 2].

        Raises:
            DataError: names the row on which the tokenizer fails.
        """
        lengths = np.zeros((len(rendered), 2), dtype=np.int64)
        for index, found in enumerate(self.encoded(rendered, rows)):
            if isinstance(found, DataError):
                raise found
            lengths[index] = found.first, len(found.ids)
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
        with panics_are_errors():
            prompts = [self.prompt_ids(text.prompt) for text in part]
            wholes = self._with_starts([text.prompt + text.answer for text in part])
            found = []
            for text, prompt, (ids, starts) in zip(part, prompts, wholes, strict=True):
                ids, past = [*self._begin, *ids], len(text.prompt) + text.counts
                if ids[: len(prompt)] == prompt:
                    starts = starts[len(prompt) - len(self._begin) :]
                else:
                    # A token would stand for characters of both: a model that answers has none.
                    ((behind, starts),) = self._with_starts([text.answer])
                    ids, past = [*prompt, *behind], text.counts
                last = len(prompt) + sum(start < past for start in starts)
                if text.follows:
                    assert self._ends.of_text is not None  # `render` asks
                    ids, last = [*ids, self._ends.of_text], len(ids) + 1
                if self._everything:
                    found.append(Encoded(ids, 0, len(ids)))
                else:
                    found.append(self._ended(ids, len(prompt), last, text.end))
        return found

    def _ended(self, ids: list[int], first: int, last: int, end: int | None) -> Encoded:
        """A text's tokens, of which those up to the first end count."""
        ends = {end, *self._ends.in_records}
        stop = next((place + 1 for place in range(first, last) if ids[place] in ends), last)
        behind = self.text([token for token in ids[stop:last] if token not in ends])
        return Encoded(ids, first, stop, bool(behind.strip()))

    def _with_starts(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids of texts, and the position in the text where each token starts."""
        # A chat template itself writes the tokens that begin and end a text.
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        return [
            (ids, [start for start, _ in offsets])
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

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
        assert self._template is not None  # a plain template takes no such text
        header = self._template.header
        start = text.rfind(header) if header else -1
        if start < 0:
            raise _row_error(
                row,
                "has no answer",
                "a text without the chat template's header of an answer",
                accepted=repr(header) if header else "another format than text",
            )
        return text[: start + len(header)]


def _row_error(
    row: int, what: str, found: object, *, accepted: str | None = None, remedy: str | None = None
) -> DataError:
    return DataError(
        f"row {row} {what}", field=f"row {row}", found=found, accepted=accepted, remedy=remedy
    )
