"""What a chat template writes around an answer.

A chat template is a Jinja program of the model folder, which the site pinned by its digest;
Transformers runs it in a sandbox. It is asked three times: for the conversation up to the answer,
for the conversation with its answer, and for the conversation with a made-up answer. The last one
shows what the template itself writes before and behind an answer. So what is known of a record
follows from this record alone.

What stands between the prompt and an answer is treated by what it is:

- a header, because the template writes none where it is asked for one, belongs to the prompt;
- what stands before the last answer alone, and an empty block of thoughts, is left out: a prompt
  does not have it either;
- anything else (white space, a channel, the end of thoughts that the prompt opens) counts with the
  answer: the model has to write it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from functools import cached_property
from pathlib import Path

import msgspec
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from umbel_client.data.conversations import Turn
from umbel_common.errors import DataError, ModelError

_ASKED, _SAID = "204682", "713517"
"""A made-up question and its answer: digits, which no template changes by trimming or casing."""
_EMPTY_BLOCK = re.compile(r"\W*(\w+)\W*/\1\W*")
"""An empty block, such as `<think></think>` or `[THINK][/THINK]`."""
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
class Frame:
    """The text around an answer."""

    prompt: str
    """What comes before the answer: what a model is given."""
    opening: str = ""
    """What the template writes between prompt and answer."""
    left_out: bool = False
    """Whether `opening` is left out of records."""
    closing: str | None = None
    """What the template writes behind the answer; None: that is not known."""


class ChatTemplate:
    """The chat template of a model's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        """Takes the tokenizer of a model folder.

        Raises:
            ModelError: it has no chat template, or none for conversations alone.
        """
        self._tokenizer = tokenizer
        self._folder = folder
        template: object = tokenizer.chat_template
        named = sorted(template) if isinstance(template, dict) else ()
        if template is None or (named and "default" not in named):
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

    def written(self, turns: Sequence[Turn], *, asked: bool = False) -> str:
        """A conversation as the template writes it.

        Args:
            asked: whether the header follows under which a model answers.

        Raises:
            DataError: the template cannot render the turns.
        """
        try:
            text: object = self._tokenizer.apply_chat_template(
                [msgspec.to_builtins(turn) for turn in turns],
                tokenize=False,
                add_generation_prompt=asked,
            )
        except Exception as error:
            # A template is a program, and may fail in any way.
            plain = isinstance(error, TemplateError) and str(error)
            raise DataError(
                "a chat template cannot render a conversation",
                file=self._folder,
                field="chat_template",
                found=error if plain else f"{type(error).__name__}: {error}",
            ) from error
        assert isinstance(text, str)  # tokenize=False
        return text

    def frame(self, turns: Sequence[Turn]) -> Frame:
        """What the template writes around the answer to a conversation.

        Raises:
            DataError: the template cannot render these turns.
        """
        prompt = self.written(turns, asked=True)
        answered = (*turns, Turn("assistant", _SAID))
        whole = self.written(answered)
        opening, found, closing = whole.removeprefix(prompt).partition(_SAID)
        if not found or not whole.startswith(prompt):
            # A record with an answer of its own shows what the matter is.
            return Frame(prompt)
        if not opening.strip():
            return Frame(prompt, opening, False, closing)
        if self.written(turns) == prompt:
            return Frame(prompt + opening, "", False, closing)
        left_out = _EMPTY_BLOCK.fullmatch(opening) is not None or self._lacks(prompt, answered)
        return Frame(prompt, opening, left_out, closing)

    def _lacks(self, prompt: str, answered: Sequence[Turn]) -> bool:
        """Whether an answer that is not the last one stands right behind the prompt."""
        try:
            longer = self.written([*answered, Turn("user", _ASKED)])
        except DataError:
            return False
        return longer.startswith(prompt + _SAID)

    @cached_property
    def example(self) -> tuple[Turn, ...]:
        """The shortest made-up conversation, up to its answer, that the template takes.

        Raises:
            ModelError: it takes none.
        """
        question = Turn("user", _ASKED)
        problems = []
        for turns in ((question,), (Turn("system", _ASKED), question)):
            try:
                prompt = self.written(turns, asked=True)
                whole = self.written((*turns, Turn("assistant", _SAID)))
            except DataError as error:
                problems.append(error.found)
                continue
            if _ASKED in prompt and _SAID in whole:
                return turns
            lost = "an answer" if _ASKED in prompt else "a question"
            problems.append(f"a text without {lost}" if whole.strip() else "an empty text")
        raise ModelError(
            "the chat template of a base model cannot be used",
            file=self._folder,
            field="chat_template",
            found=problems[0],
            accepted="a template that renders a question, alone and with its answer",
            remedy="correct the template, use another model, or agree on a plan with"
            ' task.template = "plain"',
        )

    @cached_property
    def made_up(self) -> Frame:
        """What the template writes around the answer to `example`.

        Raises:
            ModelError: the template renders no conversation at all.
        """
        return self.frame(self.example)

    @cached_property
    def header(self) -> str:
        """The text that the template puts before an answer; empty if it marks no answers.

        Raises:
            ModelError: the template renders no conversation at all.
        """
        prompt, without = self.made_up.prompt, self.written(self.example)
        header = prompt.removeprefix(without) if prompt.startswith(without) else ""
        if not header.strip():
            # Some write no header: an answer follows what ends a question.
            header = prompt.rpartition(_ASKED)[2]
        return header if header.strip() else ""
