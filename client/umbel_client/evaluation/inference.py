"""An adapter's answers: labels of texts, or texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import StoppingCriteriaList

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Question
from umbel_client.data.template import Frame
from umbel_client.data.tokens import Tokens, panics_are_errors
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.architecture import naming_architecture
from umbel_client.models.base.precision import computing
from umbel_client.models.inputs import TokenInputs
from umbel_client.tasks.frozen_cache import token_inputs
from umbel_common.errors import DataError

BATCH = 8
"""Texts computed at once."""


@dataclass(frozen=True)
class Prediction:
    """What a classification says of one text."""

    label: str
    probability: float


@torch.no_grad()
def classify_texts(model: AdaptedModel, tokens: Tokens) -> Iterator[Prediction]:
    """Yields the most likely label of each text.

    Args:
        tokens: of all texts, by the tokenizer of the base model.
    """
    labels = model.plan.task.labels  # type: ignore[union-attr]  # a classification's model
    for start in range(0, len(tokens), BATCH):
        indices = np.arange(start, min(start + BATCH, len(tokens)))
        length = int(tokens.lengths[indices].max())
        probabilities = model.logits(token_inputs(tokens, indices, length)).softmax(-1)
        best = probabilities.max(-1)
        for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            yield Prediction(labels[index], value)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0: always the most likely token; else the softmax of logits / temperature is sampled."""
    seed: int = 0


@torch.no_grad()
def answer_prompts(
    model: AdaptedModel, chat: Chat, questions: Sequence[Question], sampling: Sampling
) -> Iterator[str]:
    """Yields the model's answer to each question (`umbel_client.data.chat`).

    An answer that reaches the end of the model's context ends there, also where positions are
    rotations and could be continued: the model was never trained behind it.

    Raises:
        ModelError: the chat template cannot be used at all, or the architecture fails.
        DataError: the template or the tokenizer does not take a question, or it leaves no room for
            an answer.
    """
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        prompts = [_prompt(chat, one, number) for number, one in enumerate(part, start=start + 1)]
        yield from _answers(model, chat, prompts, sampling, start)


@dataclass(frozen=True)
class _Prompt:
    """A question as a model is given it."""

    frame: Frame
    ids: list[int]


def _prompt(chat: Chat, question: Question, number: int) -> _Prompt:
    try:
        frame = chat.frame(question, number)
    except DataError as error:
        raise DataError(
            f"prompt {number} cannot be rendered by the chat template",
            file=error.file,
            field=f"prompt {number}",
            found=error.found,
            accepted=error.accepted,
            remedy="if the template wants other turns, give them as messages in a file",
        ) from error
    try:
        with panics_are_errors():
            ids = chat.prompt_ids(frame.prompt)
    except Exception as error:
        raise DataError(
            f"prompt {number} cannot be read by the model's tokenizer",
            field=f"prompt {number}",
            found=type(error).__name__,
        ) from error
    if not ids:
        raise DataError(
            f"prompt {number} has no token", field=f"prompt {number}", accepted="a text"
        )
    return _Prompt(frame, ids)


def _answers(
    model: AdaptedModel, chat: Chat, prompts: Sequence[_Prompt], sampling: Sampling, first: int
) -> Iterator[str]:
    """Yields the answers to a few prompts, which end where the model's context ends.

    Args:
        first: number of the prompts before these.
    """
    inputs = _left_padded(model, chat, prompts, first)
    room, most = sampling.max_new_tokens, model.positions
    if most is not None:
        room = min(room, most - inputs.ids.shape[1])
    if room < sampling.max_new_tokens and len(prompts) > 1:
        # The longest prompt is not to shorten the answers to the others.
        for number, prompt in enumerate(prompts):
            yield from _answers(model, chat, [prompt], sampling, first + number)
        return
    torch.manual_seed(sampling.seed + first)
    sampled = sampling.temperature > 0
    ends = frozenset[int]().union(*(chat.ends(prompt.frame) for prompt in prompts))
    texts = [chat.end_text(prompt.frame) for prompt in prompts]
    stop = _EndText(chat, texts, inputs.ids.shape[1])
    with naming_architecture(model.base), computing(model.precision, model.device):
        output = model.base.generate(  # type: ignore[operator]  # a causal language model's
            input_ids=inputs.ids.to(model.device),
            attention_mask=inputs.mask.to(model.device),
            max_new_tokens=room,
            do_sample=sampled,
            temperature=sampling.temperature if sampled else None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=chat.tokenizer.pad_token_id or 0,
            eos_token_id=sorted(ends) or None,
            stopping_criteria=StoppingCriteriaList([stop] if any(texts) else []),
        )
    for prompt, row in zip(prompts, output[:, inputs.ids.shape[1] :].tolist(), strict=True):
        yield chat.answer(prompt.frame, row)


class _EndText:
    """Ends each answer at the text that ends it, where the template has no token for that."""

    def __init__(self, chat: Chat, texts: Sequence[str | None], start: int) -> None:
        """Takes the text for each row, and the number of tokens before the answers."""
        self._chat = chat
        self._texts = texts
        self._start = start

    def __call__(
        self, input_ids: torch.Tensor, _scores: object, **_options: object
    ) -> torch.Tensor:
        """Whether each row has ended, bool[rows]."""
        said = (self._chat.text(row[self._start :].tolist()) for row in input_ids)
        ended = [
            text is not None and text in one for text, one in zip(self._texts, said, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)


def _left_padded(
    model: AdaptedModel, chat: Chat, prompts: Sequence[_Prompt], first: int
) -> TokenInputs:
    """Prompts padded on the left: a model continues from the last token."""
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = max(lengths)
    positions = model.positions
    if positions is not None and longest >= positions:
        row = first + lengths.index(longest) + 1
        raise DataError(
            f"prompt {row} leaves no room for an answer",
            field=f"prompt {row}",
            found=f"{longest} tokens",
            accepted=f"fewer than {positions}, the model's context",
        )
    padding = chat.tokenizer.pad_token_id
    ids = torch.full((len(prompts), longest), padding if isinstance(padding, int) else 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, longest - len(prompt.ids) :] = 1
    return TokenInputs(ids, mask)
