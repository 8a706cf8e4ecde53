"""What a language model answers, greedily, and how near that is to the reference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rouge_score.rouge_scorer import RougeScorer

from umbel_client.chat import Chat
from umbel_client.conversations import Conversation, LmRecord
from umbel_client.model import AdaptedModel
from umbel_common.plan import CausalLm


@dataclass(frozen=True)
class Answer:
    """One answer beside its reference."""

    found: str
    wanted: str


@dataclass(frozen=True)
class AnswerScores:
    """How near answers are to their references, on average."""

    exact_match: float
    """Share of those that are the same, but for white space around them."""
    rouge_l: float
    """F-measure of ROUGE-L, over words of any script in lower case."""


def answer(
    model: AdaptedModel, folder: Path, records: Sequence[LmRecord], most: int, longest: int
) -> list[Answer]:
    """Lets the model answer the first conversations, each for itself.

    Args:
        folder: of the base model, for its tokenizer.
        most: conversations that are answered; passages have no question and are passed over, and
            so are conversations that leave no room for an answer in `task.max_tokens`.
        longest: tokens of an answer.
    """
    task = model.plan.task
    assert isinstance(task, CausalLm)  # classifications are not answered
    chat = Chat.load(folder, task)
    conversations = [record for record in records if isinstance(record, Conversation)][:most]
    answers = []
    for record in conversations:
        prompt = chat.tokenizer(
            chat.prompt(record.turns[:-1]),
            # A chat template writes the tokens that begin a text itself.
            add_special_tokens=task.template == "plain",
            return_tensors="pt",
        )["input_ids"]
        if prompt.shape[1] < task.max_tokens:
            found = chat.tokenizer.decode(
                _continue(model, prompt, longest, chat.tokenizer.pad_token_id),
                skip_special_tokens=True,
            )
            answers.append(Answer(str(found), record.turns[-1].content))
    return answers


@torch.no_grad()
def _continue(model: AdaptedModel, prompt: torch.Tensor, longest: int, pad: object) -> torch.Tensor:
    """The likeliest next tokens one by one, int64[n]."""
    ids = prompt.to(model.device)
    output = model.base.generate(  # type: ignore[operator]  # a mixin's method, which torch hides
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,
        # Nothing is padded; without one Transformers warns at each call.
        pad_token_id=pad if isinstance(pad, int) else 0,
    )
    new: torch.Tensor = output[0, ids.shape[1] :]
    return new.cpu()


def score(answers: Sequence[Answer]) -> AnswerScores | None:
    """The mean scores; None without an answer."""
    if not answers:
        return None
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    same = [answer.found.strip() == answer.wanted.strip() for answer in answers]
    near = [scorer.score(answer.wanted, answer.found)["rougeL"].fmeasure for answer in answers]
    return AnswerScores(sum(same) / len(answers), float(sum(near)) / len(answers))


class _Words:
    """The scorer's own tokenizer takes letters outside a to z for spaces."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())
