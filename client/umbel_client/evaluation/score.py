"""How good an adapter is, on records that are public or the caller's own.

The operator runs it on a public holdout after each release (`umbel_client.evaluating`), a site on
its own records. Nothing here is sent anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from umbel_client.data.chat import tokenise_answers
from umbel_client.data.records import Columns, LmRecords, Records, load_records
from umbel_client.data.tables import read_table, require_columns
from umbel_client.data.tokens import tokenise
from umbel_client.evaluation.answers import generate_answers, score_answers
from umbel_client.evaluation.losses import losses_and_labels, mean_token_loss
from umbel_client.evaluation.metrics import classification_figures, drift, finite, perplexity
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.adapters.vector import Vector
from umbel_common.errors import DataError
from umbel_common.plans.figures import CausalFigures, Evaluation
from umbel_common.plans.plan import CausalLm, Classification, Task


@dataclass(frozen=True)
class ClassificationOptions:
    """How a classification is scored."""

    columns: Columns = field(default_factory=Columns)
    """The holdout's columns with text and label."""
    groups: str | None = None
    """The holdout's column that says which group a record is of; None: there are no groups."""
    batch_size: int = 32
    """Records computed at once: sets memory and speed, not the result."""


@dataclass(frozen=True)
class CausalOptions:
    """How a causal language model is scored."""

    columns: Columns = field(default_factory=Columns)
    """The format of the holdout's records."""
    general: Path | None = None
    """File of texts from outside the domain, in a column `text`; None: there are no such texts."""
    answers: int = 50
    """Number of records that the model answers, from the beginning of the holdout."""
    answer_tokens: int = 64
    """Number of tokens of the longest answer."""
    batch_size: int = 32
    """Records computed at once: sets memory and speed, not the result."""


def options_for(
    task: Task,
    *,
    columns: Columns,
    general: Path | None = None,
    groups: str | None = None,
    answers: int = 50,
    answer_tokens: int = 64,
    batch_size: int = 32,
) -> ClassificationOptions | CausalOptions:
    """The options of a task, from what a command or a request may name for either task.

    Raises:
        DataError: `general` or `groups` is given for the other task.
    """
    if isinstance(task, Classification):
        if general is not None:
            raise DataError(
                "general text tells what a language model forgets; this plan is a classification",
                field="general",
                found=general,
                accepted="none",
            )
        return ClassificationOptions(columns, groups, batch_size)
    if groups is not None:
        raise DataError(
            "groups have an accuracy each; this plan trains a language model, which has none",
            field="groups",
            found=groups,
            accepted="none",
        )
    return CausalOptions(columns, general, answers, answer_tokens, batch_size)


def score(
    model: AdaptedModel,
    model_folder: Path,
    holdout: Path,
    options: ClassificationOptions | CausalOptions,
    *,
    before: Vector | None = None,
) -> Evaluation:
    """Scores the adapter that the model holds.

    Args:
        model_folder: of the base model, for its tokenizer.
        holdout: records of the plan's task: .jsonl, .csv, .parquet, or a folder of `save_to_disk`.
        options: those of the plan's task.
        before: the adapter that this one came from, float32[plan.lora.size].

    Returns:
        The figures; losses are in nats.

    Raises:
        DataError: a file does not fit the plan.
        ModelError: the folder holds no tokenizer that the task can use.
    """
    if isinstance(options, ClassificationOptions):
        found = _score_classification(model, model_folder, holdout, options)
    else:
        found = _score_causal(model, model_folder, holdout, options)
    if before is None:
        return found
    return msgspec.structs.replace(found, drift=drift(before, model.vector()))


def _score_classification(
    model: AdaptedModel, folder: Path, holdout: Path, options: ClassificationOptions
) -> Evaluation:
    task = model.plan.task
    assert isinstance(task, Classification)  # as the options are
    records = load_records(holdout, task, **options.columns)
    labels = np.array(records.labels, dtype=np.int64)
    tokens = tokenise(records.texts, folder, task.max_tokens, model.files)
    # The model runs once over each record: there is nothing to cache.
    data = PreparedData(tokens, labels, prefix=None, longest=task.max_tokens)
    losses, predicted = losses_and_labels(model, data, BatchLimit(options.batch_size))
    groups = _groups(holdout, records, options.groups)
    return Evaluation(
        records=len(records),
        mean_loss=finite(float(losses.mean())),
        figures=classification_figures(labels, predicted, groups),
    )


def _score_causal(
    model: AdaptedModel, folder: Path, holdout: Path, options: CausalOptions
) -> Evaluation:
    task = model.plan.task
    assert isinstance(task, CausalLm)  # as the options are
    texts = load_records(holdout, task, **options.columns)
    loss = finite(_token_loss(model, folder, texts, task, options.batch_size))
    found = generate_answers(model, folder, texts.records, options.answers, options.answer_tokens)
    scores = score_answers(found)
    general = None
    if options.general is not None:
        whole = msgspec.structs.replace(task, loss_on="all", too_long="truncate")
        passages = load_records(options.general, whole, record_format="text")
        general = finite(_token_loss(model, folder, passages, whole, options.batch_size))
    figures = CausalFigures(
        perplexity=perplexity(loss),
        general_perplexity=perplexity(general),
        answers=len(found),
        exact_match=None if scores is None else scores.exact_match,
        rouge_l=None if scores is None else scores.rouge_l,
    )
    return Evaluation(records=len(texts), mean_loss=loss, figures=figures)


def _token_loss(
    model: AdaptedModel, folder: Path, records: LmRecords, task: CausalLm, batch_size: int
) -> float:
    tokens, labels = tokenise_answers(records, folder, task, model.files)
    data = PreparedData(tokens, labels, prefix=None, longest=task.max_tokens)
    return mean_token_loss(model, data, BatchLimit(batch_size))


def _groups(path: Path, records: Records, column: str | None) -> Sequence[str]:
    """The group of each record; empty without a column."""
    if column is None:
        return ()
    table = read_table(path)
    require_columns(path, table, column)
    # Records without an entry form a group of their own.
    of_row = dict(table.numbered())
    entries = [of_row[row].get(column) for row in records.rows]
    return ["(none)" if entry in (None, "") else str(entry) for entry in entries]
