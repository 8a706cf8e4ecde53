"""Scores adapters on the held-out public set, which no site trains on, and asks them questions."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Turn
from umbel_client.data.records import LmRecords, Records, load_records
from umbel_client.evaluation.inference import Sampling, answer_prompts
from umbel_client.evaluation.losses import predicted_labels, record_losses
from umbel_client.models.site_model import load_public
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.adapters.vector import Vector
from umbel_common.plans.plan import CausalLm, TrainingPlan
from umbel_simulations.inputs.partition import write_site_data
from umbel_simulations.inputs.sources import Example
from umbel_simulations.reporting.results import Score
from umbel_simulations.runs.scores import score
from umbel_simulations.scenario.run_folder import write

Losses: TypeAlias = NDArray[np.float64]

BATCH = {"classification": 128, "causal-lm": 16}
"""Number of records in a batch, for each task."""
ANSWER_TOKENS = 48
"""Length of the longest answer."""


class Judge:
    """Scores adapters of one model on one test set. Only one thread may use it at a time."""

    def __init__(
        self,
        plan: TrainingPlan,
        model: Path,
        test: Sequence[Example],
        folder: Path,
        *,
        general: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        """Writes the test set into `folder`, as public data, and prepares it.

        Args:
            device: where it computes, as in a scenario.
            general: texts about something else, which show what a language model forgets.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._model_folder = model
        self._model = load_public(model, plan, device)
        write_site_data(folder, test)
        records = load_records(self.records, plan.task)
        self._labels = np.array(records.labels if isinstance(records, Records) else ())
        self._data = self._prepared(records)
        self._general: PreparedData | None = None
        if isinstance(plan.task, CausalLm) and general:
            rows = [{"text": text} for text in general]
            lines = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
            write(folder / "general.jsonl", lines)
            whole = msgspec.structs.replace(plan.task, loss_on="all", too_long="truncate")
            texts = load_records(folder / "general.jsonl", whole)
            self._general = self._prepared(texts, whole)

        self._known: dict[bytes, Score] = {}
        self._losses: dict[bytes, Losses] = {}

    @property
    def records(self) -> Path:
        """The file of the public records."""
        return self._folder / "data.jsonl"

    def _prepared(self, records: Records | LmRecords, task: CausalLm | None = None) -> PreparedData:
        return prepare(
            self._model,
            self._model_folder,
            records,
            BatchLimit(BATCH["causal-lm"]),
            cache=self._folder / "cache",
            task=task,
        )

    def __call__(self, adapter: Vector) -> Score:
        """The score of an adapter, float32[plan.lora.size]."""
        key = _name(adapter)
        if key not in self._known:
            # The last release is scored twice: when it comes, and for the comparison.
            self._known[key] = self._score(adapter)
        return self._known[key]

    def losses(self, adapter: Vector) -> Losses:
        """A language model's loss on each test record, float64[records]."""
        key = _name(adapter)
        if key not in self._losses:
            self._model.set_vector(adapter)
            self._losses[key] = record_losses(
                self._model, self._data, BatchLimit(BATCH["causal-lm"])
            )
        return self._losses[key]

    def _score(self, adapter: Vector) -> Score:
        self._model.set_vector(adapter)
        if not isinstance(self._model.plan.task, CausalLm):
            predicted = predicted_labels(
                self._model, self._data, BatchLimit(BATCH["classification"])
            )
            return score(self._labels, predicted)
        losses = self.losses(adapter)
        perplexity = math.exp(losses.mean())
        general = None
        if self._general is not None:
            found = record_losses(self._model, self._general, BatchLimit(BATCH["causal-lm"]))
            general = math.exp(found.mean())
        return Score(
            perplexity=perplexity,
            perplexity_error=perplexity * float(losses.std()) / math.sqrt(len(losses)),
            general_perplexity=general,
        )

    def answer(self, adapter: Vector, questions: Sequence[Sequence[Turn]]) -> list[str]:
        """A language model's answer to each question; each token is the most likely one.

        Args:
            questions: the turns before each answer.
        """
        task = self._model.plan.task
        assert isinstance(task, CausalLm)  # a classifier is asked no questions
        self._model.set_vector(adapter)
        sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
        chat = Chat.load(self._model_folder, task, self._model.files)
        return list(answer_prompts(self._model, chat, questions, sampling))


def _name(adapter: Vector) -> bytes:
    return hashlib.sha256(adapter.tobytes()).digest()
