"""The figures of an adapter, against the definition, on models that really run."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support import warm_python
from support.small_language_model import causal_plan, save_llama
from support.small_models import plan_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from umbel_client.evaluation.answers import Answer, score_answers
from umbel_client.evaluation.metrics import classification_figures, drift, finite, perplexity
from umbel_client.evaluation.score import (
    CausalOptions,
    ClassificationOptions,
    options_for,
    score,
)
from umbel_client.models.adapted_model import AdaptedModel
from umbel_common.adapters.vector import initial_vector, to_bytes
from umbel_common.errors import DataError
from umbel_common.plans.figures import (
    CausalFigures,
    ClassificationFigures,
    Evaluation,
    GroupAccuracy,
)
from umbel_common.plans.plan import Classification, TrainingPlan
from umbel_common.plans.plan_file import plan_to_json
from umbel_common.plans.requests import EvaluationRequest

WriteLines = Callable[..., Path]


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    def write(name: str, *rows: dict[str, object]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def plan(tiny_model: Path) -> TrainingPlan:
    return plan_for(tiny_model, Classification(labels=("a", "b"), max_tokens=16))


def always_b(plan: TrainingPlan) -> np.ndarray:
    """An adapter whose head answers b with log odds of 1, whatever the text is."""
    vector = initial_vector(plan)
    start = 0
    for tensor in plan.lora.tensors:
        if tensor.name == "head.bias":
            vector[start : start + 2] = [0.0, 1.0]
        start += tensor.size
    return vector


def scored(
    plan: TrainingPlan,
    vector: np.ndarray,
    folder: Path,
    holdout: Path,
    options: ClassificationOptions | CausalOptions,
) -> Evaluation:
    model = AdaptedModel.load(folder, plan)
    model.set_vector(vector)
    return score(model, folder, holdout, options)


def test_a_classifications_figures_are_those_of_the_definition(
    plan: TrainingPlan, tiny_model: Path, write_lines: WriteLines
) -> None:
    labels, wards = "aabbb", ("x", "y", "y", "y", None)
    rows = [
        {"text": f"w{number}", "label": label} | ({} if ward is None else {"ward": ward})
        for number, (label, ward) in enumerate(zip(labels, wards, strict=True))
    ]
    options = ClassificationOptions(groups="ward", batch_size=2)
    found = scored(plan, always_b(plan), tiny_model, write_lines("h.jsonl", *rows), options)
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert found.mean_loss == pytest.approx((3 * right + 2 * wrong) / 5)
    assert found.records == 5
    assert found.figures == ClassificationFigures(
        accuracy=3 / 5,
        macro_f1=pytest.approx((0 + 6 / 8) / 2),
        groups=(
            GroupAccuracy(group="(none)", records=1, accuracy=1.0),
            GroupAccuracy(group="x", records=1, accuracy=0.0),
            GroupAccuracy(group="y", records=3, accuracy=pytest.approx(2 / 3)),
        ),
    )


def test_a_groups_accuracy_counts_its_own_records() -> None:
    figures = classification_figures(np.array([0, 1, 1]), np.array([0, 1, 0]), ["m", "f", "f"])
    assert [(group.group, group.accuracy) for group in figures.groups] == [("f", 0.5), ("m", 1.0)]


def test_a_language_models_loss_is_the_one_of_transformers(
    llama: Path, write_lines: WriteLines
) -> None:
    """The answers' tokens, all weighing the same, under a template that Transformers renders."""
    rows = [("w1 w2 w3", "w4"), ("w5", "w6 w7 w8 w9"), ("w2 w2", "w1 w0")]
    holdout = write_lines("h.jsonl", *({"prompt": p, "completion": c} for p, c in rows))
    general = write_lines("g.jsonl", {"text": "w9 w8 w7"}, {"text": "w1 w1 w1 w2 w3"})
    plan = causal_plan(llama)
    options = CausalOptions(general=general, answers=0, batch_size=2)
    found = scored(plan, initial_vector(plan), llama, holdout, options)
    model, tokenizer = (kind.from_pretrained(llama) for kind in _BOTH)

    def losses(text: str, after: str) -> list[float]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        start = len(tokenizer(after)["input_ids"]) if after else 1
        with torch.no_grad():
            logits = model(ids).logits[0].log_softmax(-1)
        return [-float(logits[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])]

    answers = [
        one
        for prompt, completion in rows
        for one in losses(
            f"<user> {prompt} </s> <assistant> {completion} </s>",
            f"<user> {prompt} </s> <assistant>",
        )
    ]
    texts = [one for text in ("w9 w8 w7", "w1 w1 w1 w2 w3") for one in losses(text, "")]
    assert found.mean_loss == pytest.approx(np.mean(answers), rel=1e-5)
    assert isinstance(found.figures, CausalFigures)
    assert found.figures.perplexity == pytest.approx(math.exp(np.mean(answers)), rel=1e-5)
    assert found.figures.general_perplexity == pytest.approx(math.exp(np.mean(texts)), rel=1e-5)
    assert (found.figures.answers, found.figures.exact_match) == (0, None)


_BOTH = (AutoModelForCausalLM, AutoTokenizer)


def test_what_the_model_answers_itself_matches_exactly(
    llama: Path, write_lines: WriteLines
) -> None:
    plan = causal_plan(llama)
    model, tokenizer = (kind.from_pretrained(llama) for kind in _BOTH)
    prompt = tokenizer("<user> w3 w4 </s> <assistant>", return_tensors="pt")["input_ids"]
    said = tokenizer.decode(
        model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :],
        skip_special_tokens=True,
    )
    holdout = write_lines(
        "h.jsonl",
        {"prompt": "w3 w4", "completion": said},
        {"prompt": "w3 w4", "completion": said + " w19"},
        {"prompt": "w3 w4", "completion": "w0"},
    )
    options = CausalOptions(answers=2, answer_tokens=5)
    found = scored(plan, initial_vector(plan), llama, holdout, options).figures
    assert isinstance(found, CausalFigures)
    assert (found.answers, found.exact_match) == (2, 0.5)
    words = len(said.split())
    assert found.rouge_l == pytest.approx((1 + 2 * words / (2 * words + 1)) / 2)


def test_rouge_reads_words_of_any_script() -> None:
    scores = score_answers([Answer("Süßer Käse", "süßer käse"), Answer("лёд и снег", "лёд снег")])
    assert scores is not None
    assert (scores.exact_match, scores.rouge_l) == (0.0, pytest.approx((1 + 4 / 5) / 2))


def test_drift_is_the_relative_norm_of_the_change() -> None:
    before, after = np.float32([3, 4]), np.float32([3, 5])
    assert drift(before, after) == pytest.approx(1 / 5)
    assert drift(np.zeros(2, np.float32), after) is None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_no_finite_number_is_none(value: float) -> None:
    assert finite(value) is None
    assert perplexity(finite(value)) is None
    assert perplexity(1e5) is None


def test_an_option_that_does_not_fit_the_task_is_refused(
    plan: TrainingPlan, tiny_model: Path, llama: Path, write_lines: WriteLines
) -> None:
    holdout = write_lines("h.jsonl", {"text": "w1", "label": "a"})
    with pytest.raises(DataError, match="general"):
        options_for(plan.task, columns={}, general=holdout)
    causal = causal_plan(llama)
    with pytest.raises(DataError, match="groups"):
        options_for(causal.task, columns={}, groups="ward")
    options = options_for(plan.task, columns={}, groups="ward")
    with pytest.raises(DataError, match="ward"):
        scored(plan, always_b(plan), tiny_model, holdout, options)


def ask(request: bytes) -> "subprocess.CompletedProcess[str]":
    return warm_python.run("-m", "umbel_client.evaluating", input=request.decode())


def test_the_process_prints_the_figures_and_nothing_else(
    plan: TrainingPlan, tiny_model: Path, write_lines: WriteLines, tmp_path: Path
) -> None:
    holdout = write_lines("h.jsonl", {"note": "w1", "label": "a"}, {"note": "w2", "label": "b"})
    (tmp_path / "adapter").write_bytes(to_bytes(always_b(plan)))
    (tmp_path / "before").write_bytes(to_bytes(initial_vector(plan)))
    request = {
        "plan": plan_to_json(plan),
        "adapter": str(tmp_path / "adapter"),
        "before": str(tmp_path / "before"),
        "model": str(tiny_model),
        "holdout": str(holdout),
        "columns": {"text_column": "note"},
    }
    msgspec.convert(request, EvaluationRequest)
    done = ask(msgspec.json.encode(request))
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=Evaluation)
    assert found.figures == ClassificationFigures(accuracy=0.5, macro_f1=pytest.approx(1 / 3))
    assert found.drift == pytest.approx(1 / np.linalg.norm(initial_vector(plan)))

    gone = ask(msgspec.json.encode(request | {"holdout": "/nowhere.jsonl"}))
    assert (gone.returncode, gone.stdout) == (11, "")
    assert "error: the data file does not exist" in gone.stderr
    assert ask(b"{}").returncode == 10
