"""How good an adapter is on records that nobody has to protect, or that are the caller's own.

The operator runs it on a public holdout after each release (`umbel_client.evaluating`), a site on
what it likes: nothing here is sent anywhere.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from umbel_client.data.chat import IGNORED, tokenise_answers
from umbel_client.data.records import Columns, LmRecords, Records, load_records, require_columns
from umbel_client.data.tables import read_table
from umbel_client.data.tokens import Ints, tokenise
from umbel_client.evaluation import answers as greedy
from umbel_client.evaluation.metrics import classification_figures, drift, finite, perplexity
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.precision import Precision
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.task import CausalLmTask, ClassificationTask
from umbel_common.adapters.vector import Vector
from umbel_common.errors import DataError
from umbel_common.plans.figures import CausalFigures, ClassificationFigures, Evaluation
from umbel_common.plans.plan import CausalLm, Classification, TrainingPlan


def evaluate_adapter(
    plan: TrainingPlan,
    vector: Vector,
    model_folder: Path,
    holdout: Path,
    general: Path | None = None,
    groups: str | None = None,
    *,
    columns: Columns | None = None,
    before: Vector | None = None,
    answers: int = 50,
    answer_tokens: int = 64,
    batch_size: int = 32,
    device: str = "cpu",
    precision: Precision = "float32",
) -> Evaluation:
    """Scores one adapter.

    Args:
        vector: the adapter, float32[plan.lora.size].
        model_folder: of the base model that the plan names.
        holdout: records of the plan's task: .jsonl, .csv, .parquet, or a folder of `save_to_disk`.
        general: texts that are not of the domain, in a column `text`; of a language model only.
        groups: the holdout's column that says which group a record is of; of a classification only.
        columns: where in the holdout the records are.
        before: the adapter that this one came from, float32[plan.lora.size].
        answers: records that a language model is let answer, from the beginning of the file.
        answer_tokens: the longest answer.
        batch_size: records computed at once: sets memory and speed, not the result.

    Raises:
        DataError: a file does not fit the plan, or an option not the task.
        ModelError: the model is not the plan's, or cannot be used.
    """
    task = plan.task
    _check_options(task, general, groups)
    model = AdaptedModel.load(model_folder, plan, device=device, precision=precision)
    model.set_vector(vector)
    figures: ClassificationFigures | CausalFigures
    if isinstance(task, Classification):
        records = load_records(holdout, task, **(columns or {}))
        loss, predicted = _classify(model, model_folder, records, batch_size)
        of_record = _groups(holdout, records, groups)
        figures = classification_figures(np.array(records.labels), predicted, of_record)
        count = len(records)
    else:
        texts = load_records(holdout, task, **(columns or {}))
        loss = _token_loss(model, model_folder, texts, task, batch_size)
        found = greedy.generate_answers(model, model_folder, texts.records, answers, answer_tokens)
        scores = greedy.score(found)
        figures = CausalFigures(
            perplexity=perplexity(finite(loss)),
            general_perplexity=perplexity(
                finite(_general_loss(model, model_folder, general, task, batch_size))
            ),
            answers=len(found),
            exact_match=None if scores is None else scores.exact_match,
            rouge_l=None if scores is None else scores.rouge_l,
        )
        count = len(texts)
    return Evaluation(
        records=count,
        mean_loss=finite(loss),
        figures=figures,
        drift=None if before is None else drift(before, vector),
    )


def _check_options(
    task: Classification | CausalLm, general: Path | None, groups: str | None
) -> None:
    if isinstance(task, Classification) and general is not None:
        raise DataError(
            "general text tells what a language model forgets; this plan is a classification",
            field="general",
            found=general,
            accepted="none",
        )
    if isinstance(task, CausalLm) and groups is not None:
        raise DataError(
            "groups have an accuracy each; this plan trains a language model, which has none",
            field="groups",
            found=groups,
            accepted="none",
        )


@torch.no_grad()
def _classify(
    model: AdaptedModel, folder: Path, records: Records, batch_size: int
) -> tuple[float, Ints]:
    """Mean cross entropy, and the likeliest label index of each record, int64[records]."""
    labels = np.array(records.labels, dtype=np.int64)
    tokens = tokenise(records.texts, folder, model.plan.task.max_tokens)
    # The model runs once over each record: there is nothing to cache.
    data = PreparedData(tokens, labels, prefix=None)
    task = ClassificationTask()
    predicted = np.empty(len(data), dtype=np.int64)
    total = 0.0
    for part in data.physical_batches(np.arange(len(data)), batch_size):
        batch = task.batch(data, part)
        logits = model.logits(batch.inputs)
        total += float(cross_entropy(logits, batch.labels.to(logits.device), reduction="sum"))
        predicted[part] = logits.argmax(-1).cpu().numpy()
    return total / len(data), predicted


@torch.no_grad()
def _token_loss(
    model: AdaptedModel, folder: Path, records: LmRecords, task: CausalLm, batch_size: int
) -> float:
    """Mean cross entropy over all tokens that count."""
    tokens, labels = tokenise_answers(records, folder, task)
    data = PreparedData(tokens, labels, prefix=None)
    of_task = CausalLmTask()
    total, count = 0.0, 0
    for part in data.physical_batches(np.arange(len(data)), batch_size):
        batch = of_task.batch(data, part)
        counted = (batch.labels[:, 1:] != IGNORED).sum(1)
        losses = of_task.losses(model, batch).double().cpu()
        total += float((losses * counted).sum())
        count += int(counted.sum())
    return total / count


def _general_loss(
    model: AdaptedModel, folder: Path, general: Path | None, task: CausalLm, batch_size: int
) -> float:
    """Mean cross entropy over all tokens of passages; not a number if there are none."""
    if general is None:
        return float("nan")
    whole = msgspec.structs.replace(task, loss_on="all", too_long="truncate")
    records = load_records(general, whole, record_format="text")
    return _token_loss(model, folder, records, whole, batch_size)


def _groups(path: Path, records: Records, column: str | None) -> Sequence[str]:
    """The group of each record; empty without a column."""
    if column is None:
        return ()
    table = read_table(path)
    require_columns(path, table, column)
    # A record without an entry is of the group of those.
    entries = [table.rows[row - 1].get(column) for row in records.rows]
    return ["(none)" if entry in (None, "") else str(entry) for entry in entries]
