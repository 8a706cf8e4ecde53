"""A language model's greedy answers, and how near they are to the references."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Conversation, LmRecord
from umbel_client.evaluation.inference import Sampling, answer_prompts
from umbel_client.models.adapted_model import AdaptedModel
from umbel_common.plans.plan import CausalLm


@dataclass(frozen=True)
class Answer:
    """One answer beside its reference."""

    found: str
    wanted: str
    """The record's, as the chat template writes it."""


@dataclass(frozen=True)
class AnswerScores:
    """How near answers are to their references, on average."""

    exact_match: float
    """Share of the answers that are the same as the reference, but for white space around them."""
    rouge_l: float
    """Mean F-measure of ROUGE-L (Lin 2004), over words of any script in lower case."""


def generate_answers(
    model: AdaptedModel, folder: Path, records: Sequence[LmRecord], most: int, longest: int
) -> list[Answer]:
    """Lets the model answer the first conversations, one by one.

    Passages have no question and are left out. So are those of the first conversations that leave
    no room for an answer in `task.max_tokens`.

    Args:
        folder: the base model's, for its tokenizer.
        most: number of conversations, from the beginning.
        longest: number of tokens of the longest answer.
    """
    task = model.plan.task
    assert isinstance(task, CausalLm)  # classifications are not answered
    chat = Chat.load(folder, task, model.files)
    asked = []
    for record in [one for one in records if isinstance(one, Conversation)][:most]:
        prompt = chat.frame(record.turns[:-1]).prompt
        if len(chat.prompt_ids(prompt)) < task.max_tokens:
            asked.append(record)
    turns = [record.turns[:-1] for record in asked]
    found = answer_prompts(model, chat, turns, Sampling(max_new_tokens=longest))
    return [Answer(one, chat.reference(record)) for one, record in zip(found, asked, strict=True)]


def score_answers(given: Sequence[Answer]) -> AnswerScores | None:
    """The mean scores; None if there are no answers."""
    if not given:
        return None
    # Imported here: it brings NLTK, which only answers need.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    same = [answer.found.strip() == answer.wanted.strip() for answer in given]
    near = [scorer.score(answer.wanted, answer.found)["rougeL"].fmeasure for answer in given]
    return AnswerScores(sum(same) / len(given), float(sum(near)) / len(given))


class _Words:
    """A tokenizer for any script: the scorer's own takes letters outside a to z for spaces."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())
