"""The number of tokens of a site's records, counted by the tokenizer of a base model, uncut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from umbel_client.curation.examples import Examples
from umbel_client.data.chat import Chat, fitting_answers
from umbel_client.data.conversations import Conversation
from umbel_client.data.records import LmRecords, Records, refuse
from umbel_client.data.tokens import AT_ONCE, Ints, fitting_texts, load_tokenizer
from umbel_client.models.base.architecture import require_context, vocabulary_of
from umbel_client.models.base.skeleton import quietly, skeleton
from umbel_common.errors import DataError
from umbel_common.plans.plan import CausalLm, Task

_MANY = 131_072
"""The largest number of tokens that a plan may allow; longer records are counted in full too."""
_PAIR = ["user", "assistant"]
_SHOWN = 10


@dataclass(frozen=True)
class Lengths:
    """Tokens of each record, with those that a template or a tokenizer adds."""

    prompt: Ints
    """int64[records]: tokens before the answer; 0 where all of a text counts."""
    whole: Ints
    """int64[records]: tokens of the whole record."""

    def unanswered(self, max_tokens: int) -> npt.NDArray[np.bool_]:
        """bool[records]: whether a cut at `max_tokens` leaves nothing of the answer to predict.

        A model never predicts the first token.
        """
        left = np.minimum(self.whole, max_tokens)
        answerless: npt.NDArray[np.bool_] = np.maximum(self.prompt, 1) >= left
        return answerless


def ignore_progress(done: int, whole: int) -> None:
    """For a caller that does not follow the work."""


def count_tokens(
    examples: Examples,
    folder: Path,
    task: Task | None = None,
    on_progress: Callable[[int, int], None] = ignore_progress,
) -> Lengths:
    """Counts the tokens of every record.

    Args:
        folder: the base model's, for its tokenizer.
        task: a plan's; None: a language model's records are rendered by the chat template. If the
            tokenizer has no template and each record is a prompt with its answer, they are rendered
            without one.
        on_progress: called with the number of records that are counted, and of all.

    Raises:
        ModelError: the folder has no fast tokenizer, or lacks the chat template that is needed.
        DataError: names the row that the template cannot render.
    """
    if isinstance(examples.records, Records):
        whole = _text_lengths(examples.records.texts, folder, on_progress)
        return Lengths(np.zeros_like(whole), whole)
    rendered_as = task if isinstance(task, CausalLm) else _rendering(examples, folder)
    chat = Chat.load(folder, rendered_as)
    records, rows = examples.records.records, examples.records.rows
    found = []
    try:
        for start in range(0, len(records), AT_ONCE):
            part, numbers = records[start : start + AT_ONCE], rows[start : start + AT_ONCE]
            rendered = [chat.render(*pair) for pair in zip(part, numbers, strict=True)]
            with quietly():
                found.append(chat.lengths(rendered, numbers))
            on_progress(start + len(part), len(records))
    except DataError as error:
        error.file = examples.path
        raise
    both = np.concatenate(found)
    return Lengths(both[:, 0], both[:, 1])


def _text_lengths(
    texts: Sequence[str], folder: Path, on_progress: Callable[[int, int], None]
) -> Ints:
    tokenizer = load_tokenizer(folder)
    lengths: list[int] = []
    with quietly():
        for start in range(0, len(texts), AT_ONCE):
            encoded = tokenizer(
                list(texts[start : start + AT_ONCE]),
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            lengths += map(len, encoded["input_ids"])
            on_progress(len(lengths), len(texts))
    return np.array(lengths, dtype=np.int64)


def _rendering(examples: Examples, folder: Path) -> CausalLm:
    records = examples.records.records
    pairs = all(
        isinstance(record, Conversation) and [turn.role for turn in record.turns] == _PAIR
        for record in records
    )
    passages = not isinstance(records[0], Conversation)
    plain = (pairs or passages) and load_tokenizer(folder).chat_template is None
    return CausalLm(
        max_tokens=_MANY,
        template="plain" if plain else "chat",
        loss_on="all" if passages else "answer",
    )


def require_fit(examples: Examples, lengths: Lengths, folder: Path, task: Task) -> int:
    """Refuses records that a plan does not take, and a plan that the model does not take.

    Returns:
        Number of records that the plan would cut.

    Raises:
        ModelError: the model cannot read as many tokens as the plan allows.
        DataError: names the rows that are too long, or have nothing left of their answer; or the
            first that does not fit for another reason.
    """
    base = skeleton(folder, task)
    require_context(folder, base, task)
    longer = lengths.whole > task.max_tokens
    if isinstance(task, CausalLm):
        if task.too_long == "refuse":
            _refuse(
                examples,
                lengths,
                longer,
                "longer than the plan allows",
                f"at most task.max_tokens = {task.max_tokens}",
                'shorten them, or agree on a plan with task.too_long = "truncate"',
            )
        _refuse(
            examples,
            lengths,
            lengths.unanswered(task.max_tokens),
            "left with nothing of an answer",
            f"prompts of fewer than task.max_tokens = {task.max_tokens} tokens, and an answer",
            "shorten the prompts, or agree on a plan with more tokens",
        )
    # What else could be wrong with a record is asked as a round asks it.
    records, known = examples.records, vocabulary_of(base)
    if isinstance(task, CausalLm):
        assert isinstance(records, LmRecords)  # read_examples reads what the task is about
        fitting_answers(records, folder, task, vocabulary=known)
    elif isinstance(records, Records):
        fitting_texts(records, folder, task.max_tokens, vocabulary=known, on_misfit=refuse)
    return int(longer.sum())


def _refuse(
    examples: Examples,
    lengths: Lengths,
    wrong: npt.NDArray[np.bool_],
    what: str,
    accepted: str,
    remedy: str,
) -> None:
    if not wrong.any():
        return
    rows = [examples.records.rows[index] for index in np.flatnonzero(wrong)]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    raise DataError(
        f"{len(rows)} records are {what}" if len(rows) > 1 else f"row {rows[0]} is {what}",
        file=examples.path,
        field=f"rows {', '.join(map(str, rows[:_SHOWN]))}{more}",
        found=f"up to {int(lengths.whole[wrong].max())} tokens",
        accepted=accepted,
        remedy=remedy,
    )
