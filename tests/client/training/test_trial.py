"""What is measured of a plan's steps, where memory runs out while they are tried."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.small_models import plan_for

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.site.config import ClientConfig
from umbel_client.training import trial
from umbel_common.plans.plan import Classification, TrainingPlan


def test_the_time_is_that_of_as_many_records_as_fit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny_model, Classification(labels=("a", "b"), max_tokens=16))
    parts = 0

    def small_memory(_layer: object, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal parts
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError
        parts += 1

    def loaded(_config: object, plan: TrainingPlan, **_: object) -> AdaptedModel:
        model = AdaptedModel.load(tiny_model, plan)
        layer: Any = model.base.encoder.layer[0]  # type: ignore[union-attr, index]  # BERT
        layer.register_forward_pre_hook(small_memory)
        return model

    monkeypatch.setattr(trial, "load_site_model", loaded)
    # Time passes with each part that is computed.
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: parts))
    settings = SimpleNamespace(
        threads=1,
        model=None,
        physical_batch_size=8,
        data=SimpleNamespace(unit_column=None, max_records_per_unit=32),
    )
    found = trial.try_plan(cast("ClientConfig", settings), plan, entropy=os.urandom)
    assert (found.rows, found.seconds) == (2, 1.0)
