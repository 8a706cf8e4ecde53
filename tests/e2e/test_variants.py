"""Every kind of plan, from its scenario to an adapter that PEFT loads; and runs that go wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification

from umbel_client.models.adapted_model import AdaptedModel
from umbel_common.adapters.vector import initial_vector
from umbel_common.canonical import decode_canonical
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.trust.identity import Signed
from umbel_host.files.adapter_folder import read_vector


def summary_of(tiny: Any) -> Any:
    return json.loads((tiny.run_folder / "summary.json").read_text())


def plan_of(tiny: Any) -> TrainingPlan:
    signed = decode_canonical((tiny.run_folder / "plan.msgpack").read_bytes(), Signed)
    return decode_canonical(signed.statement, PLAN_VERSIONS)


# In `make test`, client/training/test_round.py holds what each method changes.
@pytest.mark.soak
@pytest.mark.parametrize("method", ["both", "ffa", "alternate"])
def test_each_method_changes_what_it_trains_and_nothing_else(
    tiny: Any, tiny_model: Path, method: str
) -> None:
    tiny.change('method = "both"', f'method = "{method}"')
    result = tiny.run()
    assert result.returncode == 0, result.stderr
    plan = plan_of(tiny)
    after = read_vector(tiny.run_folder / "adapter", plan)
    moved = after != initial_vector(plan)
    start = 0
    for tensor in plan.lora.tensors:
        part = moved[start : start + tensor.size]
        start += tensor.size
        assert part.any() != (method == "ffa" and tensor.role == "lora_A"), tensor.name
    PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), tiny.run_folder / "adapter")


@pytest.mark.soak
def test_every_choice_of_the_optimiser_step_at_once_gives_a_release(tiny: Any) -> None:
    """AUTO-S clipping, DP-AdamBC, averaged steps, and physical batches that each site finds."""
    tiny.change("clip_norm = 1.0", 'clip_norm = 1.0\nclipping = "automatic"')
    tiny.change(
        "local_steps = 1", "local_steps = 3\nunbiased = true\neps = 1e-2\naverage_decay = 0.7"
    )
    tiny.change("[aggregation]", '[compute]\nphysical_batch_size = "auto"\n\n[aggregation]')
    result = tiny.run()
    assert result.returncode == 0, result.stderr
    plan = plan_of(tiny)
    assert plan.privacy.clipping == "automatic"
    assert plan.training.optimizer.unbiased
    assert plan.training.average_decay == 0.7
    written = (tiny.run_folder / "sites" / "hospital-a" / "client.toml").read_text()
    assert 'physical_batch_size = "auto"' in written
    moved = read_vector(tiny.run_folder / "adapter", plan) - initial_vector(plan)
    assert 0 < np.abs(moved).mean() < 1
    assert moved.all()


def test_a_stock_head_travels_inside_the_peft_adapter(tiny: Any, tiny_model: Path) -> None:
    tiny.change("max_tokens = 16", 'max_tokens = 16\nhead = "stock"')
    result = tiny.run("--quiet")
    assert result.stdout == ""
    assert result.returncode == 0, result.stderr
    adapter = tiny.run_folder / "adapter"
    assert not (adapter / "head.safetensors").exists()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    plain = PeftModel.from_pretrained(base, adapter)
    loaded = plain.base_model.model.classifier.modules_to_save["default"].weight.detach().numpy()
    plan = plan_of(tiny)
    model = AdaptedModel.load(tiny_model, plan)
    model.set_vector(read_vector(adapter, plan))
    assert np.array_equal(loaded, model.adapter["base_model.model.classifier.weight"].detach())


@pytest.mark.soak
def test_without_privacy_exact_counts_may_be_the_weights(tiny: Any) -> None:
    tiny.change(
        "threshold = 3", 'threshold = 3\nweights = "examples"\nstep = 1e-5\nclip_range = 0.5'
    )
    refused = tiny.run()
    assert refused.returncode == 13
    assert "aggregation.weights" in refused.stderr
    result = tiny.run("--no-dp")
    assert result.returncode == 0, result.stderr
    summary = summary_of(tiny)
    assert summary["privacy"] == "none"
    assert all(site["epsilon"] is None for site in summary["sites"])
    assert "no differential privacy" in (tiny.run_folder / "report.html").read_text().lower()
    verified = tiny.simulate("verify", tiny.run_folder)
    assert verified.returncode == 0
    releases = (tiny.run_folder / "transcript.jsonl").read_text()
    assert '"total_weight":240' in releases


@pytest.mark.soak
def test_an_insecure_seed_repeats_a_run_and_the_report_says_so(tiny: Any) -> None:
    tiny.change("seed = 3", "seed = 3\ninsecure_test_seed = 1")
    digests = []
    for name in ("one", "two"):
        result = tiny.simulate("run", tiny.path, "--runs", tiny.folder / "runs", "--name", name)
        assert result.returncode == 0, result.stderr
        folder = tiny.folder / "runs" / name
        digests.append(json.loads((folder / "summary.json").read_text())["adapter_digest"])
        assert "insecure" in (folder / "report.html").read_text().lower()
    assert digests[0] == digests[1]


@pytest.mark.soak
def test_one_seed_gives_one_partition_and_initial_adapter_and_fresh_noise(tiny: Any) -> None:
    found = []
    for name in ("one", "two"):
        result = tiny.simulate("run", tiny.path, "--runs", tiny.folder / "runs", "--name", name)
        assert result.returncode == 0, result.stderr
        folder = tiny.folder / "runs" / name
        data = [(folder / "sites" / f"hospital-{x}" / "data.jsonl").read_bytes() for x in "abc"]
        start = json.loads((folder / "transcript.jsonl").read_text().splitlines()[0])
        found.append(
            (
                data,
                start["readable"]["event"]["release"]["adapter"],
                json.loads((folder / "summary.json").read_text())["adapter_digest"],
            )
        )
    assert found[0][:2] == found[1][:2]
    assert found[0][2] != found[1][2]


def test_sites_that_fall_silent_are_recovered_and_said(tiny: Any) -> None:
    tiny.change("count = 3", "count = 5")
    tiny.change("expected_batch_size = 80", "expected_batch_size = 48")
    tiny.change(
        "threshold = 3",
        "threshold = 4\n"
        '[[faults.dropouts]]\nround = 1\nsite = "hospital-b"\nstage = "mask"\n'
        '[[faults.dropouts]]\nround = 2\nsite = "hospital-d"\nstage = "unmask"',
    )
    result = tiny.run()
    assert result.returncode == 0, result.stderr
    events = [
        json.loads(line) for line in (tiny.run_folder / "metrics.jsonl").read_text().splitlines()
    ]
    survivors = [event["survivors"] for event in events if event["event"] == "round-released"]
    assert survivors[0] == ["hospital-a", "hospital-c", "hospital-d", "hospital-e"]
    assert survivors[1] == [f"hospital-{letter}" for letter in "abcde"]


def test_options_replace_what_the_scenario_says_and_json_prints_the_summary(tiny: Any) -> None:
    tiny.change("expected_batch_size = 80", "expected_batch_size = 60")
    result = tiny.run("--sites", 4, "--rounds", 1, "--seed", 9, "--json")
    assert result.returncode == 0, result.stderr
    summary = summary_of(tiny)
    assert json.loads(result.stdout) == summary
    assert (len(summary["sites"]), summary["rounds"], summary["seed"]) == (4, 1, 9)


def test_the_shipped_scenarios_are_listed(simulate: Any) -> None:
    result = simulate("list")
    assert result.returncode == 0
    for name in ("quickstart", "smoke", "dropout"):
        assert name in result.stdout


@pytest.mark.soak
def test_a_run_starts_from_its_labels_names_and_its_verifier_says_what_it_believes(
    tiny: Any,
) -> None:
    tiny.change(
        "[aggregation]",
        '[start]\nstart = "label-names"\nnames = ["w1 w2", "w30 w31"]\n\n[aggregation]',
    )
    tiny.change("baselines = []", 'baselines = ["head-only", "local-only"]')
    result = tiny.run()
    assert result.returncode == 0, result.stderr
    plan = plan_of(tiny)
    assert plan.version == 2
    assert (tiny.run_folder / "start.safetensors").stat().st_size < 1000
    verified = tiny.simulate("verify", tiny.run_folder)
    assert verified.returncode == 0, verified.stderr
    assert "not recomputed: whether the head's rows are the embeddings" in verified.stdout
    planted = bytearray((tiny.run_folder / "start.safetensors").read_bytes())
    planted[-1] ^= 1
    (tiny.run_folder / "start.safetensors").write_bytes(planted)
    refused = tiny.simulate("verify", tiny.run_folder)
    assert refused.returncode == 52
    assert "start.safetensors" in refused.stderr
