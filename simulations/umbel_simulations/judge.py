"""Scores adapters on the held-out public set, which no site trains on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from umbel_client.data import load_records
from umbel_client.model import AdaptedModel
from umbel_client.precision import fastest_precision
from umbel_client.prepared import prepare
from umbel_client.training import evaluate
from umbel_common.adapter import Vector
from umbel_common.plan import Classification, TrainingPlan
from umbel_simulations.population import write_site_data
from umbel_simulations.results import Score
from umbel_simulations.scores import score
from umbel_simulations.sources import Example

BATCH = 128


class Judge:
    """One model and one test set; used by one thread at a time."""

    def __init__(
        self, plan: TrainingPlan, model: Path, test: Sequence[Example], folder: Path
    ) -> None:
        """Writes the test set into `folder`, as public data, and prepares it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_site_data(folder, test)
        assert isinstance(plan.task, Classification)  # scenarios have no other task
        records = load_records(folder / "data.jsonl", plan.task)
        self._labels = np.array(records.labels)
        self._model = AdaptedModel.load(model, plan, precision=fastest_precision())
        self._data = prepare(
            self._model, model, records, cache=folder / "cache", progress=lambda done, total: None
        )

    def __call__(self, adapter: Vector) -> Score:
        """The score of an adapter, float32[plan.lora.size]."""
        self._model.set_vector(adapter)
        predicted = evaluate(self._model, self._data, BATCH)
        return score(self._labels, predicted)
