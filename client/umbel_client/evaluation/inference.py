"""An adapter's answers: labels of texts, or texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Turn
from umbel_client.data.tokens import Tokens
from umbel_client.models.adapted_model import AdaptedModel
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
    model: AdaptedModel, chat: Chat, prompts: Sequence[Sequence[Turn]], sampling: Sampling
) -> Iterator[str]:
    """Yields the model's answer to each conversation, without the tokens that end it.

    An answer that reaches the end of the model's context ends there.

    Args:
        prompts: the turns of each conversation up to the answer.

    Raises:
        DataError: the template cannot render a prompt, or a prompt leaves no room for an answer.
    """
    for start in range(0, len(prompts), BATCH):
        texts = [chat.prompt(turns) for turns in prompts[start : start + BATCH]]
        yield from _answers(model, chat, texts, sampling, start)


def _answers(
    model: AdaptedModel, chat: Chat, texts: list[str], sampling: Sampling, first: int
) -> Iterator[str]:
    """Yields the answers to a few prompts, which end where the model's context ends.

    Args:
        first: number of the prompts before these.
    """
    inputs = _left_padded(model, chat, texts, first)
    room, most = sampling.max_new_tokens, model.positions
    if most is not None:
        room = min(room, most - inputs.ids.shape[1])
    if room < sampling.max_new_tokens and len(texts) > 1:
        # The longest prompt is not to shorten the answers to the others.
        for number, text in enumerate(texts):
            yield from _answers(model, chat, [text], sampling, first + number)
        return
    torch.manual_seed(sampling.seed + first)
    sampled = sampling.temperature > 0
    with computing(model.precision, model.device):
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
            eos_token_id=chat.tokenizer.eos_token_id,
        )
    for row in output[:, inputs.ids.shape[1] :].tolist():
        yield str(chat.tokenizer.decode(row, skip_special_tokens=True)).strip()


def _left_padded(model: AdaptedModel, chat: Chat, texts: list[str], first: int) -> TokenInputs:
    """Prompts padded on the left: a model continues from the last token."""
    encoded = [chat.prompt_ids(text) for text in texts]
    longest = max(map(len, encoded))
    positions = model.positions
    if positions is not None and longest >= positions:
        row = first + max(range(len(encoded)), key=lambda index: len(encoded[index])) + 1
        raise DataError(
            f"prompt {row} leaves no room for an answer",
            field=f"prompt {row}",
            found=f"{longest} tokens",
            accepted=f"fewer than {positions}",
        )
    padding = chat.tokenizer.pad_token_id
    ids = torch.full((len(texts), longest), padding if isinstance(padding, int) else 0)
    mask = torch.zeros_like(ids)
    for row, found in enumerate(encoded):
        ids[row, longest - len(found) :] = torch.tensor(found)
        mask[row, longest - len(found) :] = 1
    return TokenInputs(ids, mask)
