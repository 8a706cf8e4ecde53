"""Records that do not fit are left out of what is trained on, and move nothing of the others."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.small_models import plan_for, save_bert, save_decoder
from torch import nn
from transformers import AutoTokenizer

from umbel_client.data.records import load_records
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.largest_record import largest_record_test
from umbel_common.errors import DataError
from umbel_common.plans.plan import CausalLm, Classification

TASK = Classification(labels=("a", "b"), max_tokens=16)
FITTING = [
    {"text": f"w{number} w2", "label": "ab"[number % 2], "patient": f"p{number // 2}"}
    for number in range(6)
]
UNKNOWN = {"text": "w1 more", "label": "a", "patient": "p9"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose tokenizer has one token more than the model."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    words = [f"w{number}" for number in range(10)]
    folder = save_bert(tmp_path_factory.mktemp("bert"), words, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    return folder


def prepared(
    folder: Path, path: Path, rows: list[dict[str, str]], told: list[DataError] | None = None
) -> PreparedData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = AdaptedModel.load(folder, plan_for(folder, TASK))
    records = load_records(path, TASK, unit_column="patient")
    if told is None:
        return prepare(model, folder, records, BatchLimit(8), cache=None)
    return prepare(model, folder, records, BatchLimit(8), cache=None, on_misfit=told.append)


def test_an_unknown_token_leaves_its_record_out_and_the_others_as_they_are(
    tmp_path: Path, folder: Path
) -> None:
    path, told = tmp_path / "a.jsonl", list[DataError]()
    # One unit loses a record of two, another all that it has.
    rows = [UNKNOWN, *FITTING[:3], {**UNKNOWN, "patient": "p0"}, *FITTING[3:]]
    data = prepared(folder, path, rows, told)
    alone = prepared(folder, path, FITTING)
    assert [error.field for error in told] == ["row 1", "row 5"]
    assert data.tokens.digest() == alone.tokens.digest()
    assert data.labels.tolist() == alone.labels.tolist()
    assert data.units is not None
    assert alone.units is not None
    assert data.units.of_record.tolist() == alone.units.of_record.tolist()
    with pytest.raises(DataError, match="row 1 holds a token that the model does not know"):
        prepared(folder, path, rows)


def test_nothing_at_all_can_be_prepared(tmp_path: Path, folder: Path) -> None:
    data = prepared(folder, tmp_path / "a.jsonl", [UNKNOWN], [])
    assert (len(data), data.unit_count) == (0, 0)
    assert list(data.physical_batches(np.zeros(0, np.int64), 4)) == []


def test_the_longest_record_of_the_last_token_is_tried_before_any_round(
    tmp_path: Path, folder: Path
) -> None:
    """A model with fewer positions than it says, as RoBERTa's relatives once were taken to have."""
    model = AdaptedModel.load(folder, plan_for(folder, TASK))
    largest_record_test(model)
    body = model.base.get_submodule("embeddings")
    body.position_embeddings = nn.Embedding(15, 16)
    with pytest.raises((IndexError, RuntimeError)):
        largest_record_test(model)
    decoder = save_decoder(tmp_path / "llama")
    task = CausalLm(max_tokens=64)
    language = AdaptedModel.load(decoder, plan_for(decoder, task))
    largest_record_test(language)
    assert language.vocabulary == language.base.config.vocab_size
