"""The numbers that are proposed for a draft: rules, arithmetic, and a plan that sites accept."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import umbel_client.planning.comparison
from umbel_client.planning.comparison import calibrate_draft
from umbel_client.planning.draft import read_plan
from umbel_client.planning.draft_file import Draft
from umbel_client.planning.proposal import (
    Cohort,
    Outline,
    Shape,
    draft_text,
    proposed,
    read_outline,
    shape_of,
)
from umbel_client.privacy.accounting import DpEvent, calibrate, epsilon
from umbel_client.privacy.attempt_cost import judge_cost
from umbel_client.site.policy import Policy, judge_header, judge_plan
from umbel_common.errors import (
    CalibrationError,
    ConfigError,
    DataError,
    ModelError,
    PlanError,
    PolicyRefusal,
    UmbelError,
)
from umbel_common.plans.plan import Adam, DistributedPrivacy, LocalPrivacy, TrainingPlan
from umbel_common.plans.requests import Bought, Calibration, CalibrationRequest
from umbel_common.plans.server_optimizer import ServerAdam, ServerSgd
from umbel_common.plans.statements import RoundHeader
from umbel_common.toml_values import parse_toml

DRAFT = """\
# What the hospitals agreed on.
federation = "clinics"
job = "triage"

[model]
name = "tiny"
path = "{model}"  # a copy at each site

[task]
task = "classification"
labels = ["a", "b"]

[lora]
rank = 2
alpha = 4.0
target_modules = ["query"]
method = "ffa"
"""

LANGUAGE = DRAFT.replace('"classification"\nlabels = ["a", "b"]', '"causal-lm"')


@pytest.fixture
def draft(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "draft.toml"
    path.write_text(DRAFT.format(model=tiny_model))
    return path


def calibrated(draft: Path, *sizes: int, **parts: Any) -> Calibration:
    request = {"draft": str(draft), "sizes": sizes, "epsilons": (3.0,), **parts}
    return calibrate_draft(msgspec.convert(request, CalibrationRequest))


def row_of(found: Calibration, mode: str, honest: int) -> Bought:
    (row,) = (one for one in found.rows if (one.mode, one.honest) == (mode, honest))
    return row


def outlined(text: str = DRAFT) -> Outline:
    return read_outline(text.format(model="model"), "draft.toml")


@pytest.mark.parametrize(
    ("sites", "colluding", "threshold", "dropouts"),
    [(2, 1, 2, 0), (3, 1, 3, 0), (4, 1, 3, 1), (5, 1, 4, 1), (10, 1, 6, 2), (10, 3, 7, 2)],
)
def test_a_cohort_tolerates_one_dropout_in_five(
    sites: int, colluding: int, threshold: int, dropouts: int
) -> None:
    cohort = Cohort((1000,) * sites, colluding)
    assert (cohort.threshold, cohort.usual_dropouts) == (threshold, dropouts)
    # What sites demand of a threshold, and none below it would do.
    assert 2 * threshold > sites + colluding
    assert threshold == 3 or 2 * (threshold - 1) <= sites + colluding
    shape = shape_of(CalibrationRequest("draft", cohort.sizes, colluding), cohort)
    honest = sites - dropouts - colluding
    assert shape == Shape("distributed" if honest > 1 else "local", dropouts)


@pytest.mark.parametrize(
    ("claim", "rounds", "head"),
    [(1.0, 30, 3.33), (3.0, 30, 10.0), (8.0, 30, 10.0), (8.0, 100, 3.0)],
)
def test_a_head_learns_as_it_was_measured(claim: float, rounds: int, head: float) -> None:
    cohort = Cohort((300, 1000, 3000, 10_000), 1)
    made = proposed(outlined(), cohort, Shape("distributed", 1), (claim, 1e-6), rounds)
    assert isinstance(made.server, ServerSgd)
    assert (made.server.head_learning_rate, made.server.momentum) == (head, 0.9)
    assert made.server.schedule.factor(rounds, rounds) == 0.1
    # Of unequal sites, each record joins a batch with the same probability.
    assert made.training.expected_batch_size == 1430


def test_a_language_model_has_adam_whose_rate_follows_the_noise() -> None:
    rates = []
    for claim in (1.0, 3.0, 8.0, 80.0):
        cohort = Cohort((400,) * 3, 1)
        made = proposed(outlined(LANGUAGE), cohort, Shape("distributed", 0), (claim, 1e-5))
        assert isinstance(made.server, ServerAdam)
        assert (made.privacy.clipping, made.training.rounds) == ("automatic", 20)  # type: ignore[union-attr]  # of distributed mode
        rates.append(made.server.adapter_learning_rate)
    assert rates == [0.02, 0.0288, 0.04, 0.04]
    alone = proposed(outlined(LANGUAGE), Cohort((400,) * 3, 1), Shape("local", 0), (8.0, 1e-5))
    assert alone.training.optimizer == Adam(adapter_learning_rate=0.04)


def test_the_figures_follow_from_their_own_formulas(draft: Path) -> None:
    found = calibrated(draft, 400, 400, 400, 2800)
    sites, batch, rate, delta = 4, 400, 0.1, 1e-5
    assert (found.mode, found.records, found.batch) == ("distributed", 4000, batch)
    attempts = 33
    sigma = calibrate(3.0, delta, rate, attempts)
    for honest in (2, 3):
        row = row_of(found, "distributed", honest)
        assert (row.most_attempts, row.steps) == (attempts, 30)
        assert row.dropouts == sites - 1 - honest
        assert row.noise_multiplier == pytest.approx(sigma, rel=0.001)
        # Each of four sites adds sigma / sqrt(h); rounding costs about a hundredth more.
        mean = sigma * math.sqrt(sites / honest) / batch
        assert mean <= (row.noise_of_mean or 0) < 1.02 * mean
        alone = epsilon([DpEvent(sigma / math.sqrt(honest), rate, attempts)], delta)
        assert row.epsilon_everybody == pytest.approx(alone, rel=0.01)
        assert 2.99 < (row.epsilon_readers or 0) <= 3.0
    local = row_of(found, "local", 1)
    # 100 records a step at each site: one in ten of 1,000.
    noises = [calibrate(3.0, delta, 100 / size, 30) for size in (400, 400, 400, 2800)]
    assert local.noise_multiplier == max(noises)
    mean = math.sqrt(sum(noise**2 for noise in noises)) / (sites * 100)
    assert local.noise_of_mean == pytest.approx(mean)
    assert (local.epsilon_readers, local.epsilon_everybody, local.most_attempts) == (3.0, 3.0, None)
    assert [row.proposed for row in found.rows] == [False, False, True]


POLICY = {"models": (), "tasks": ("classification",), "labels": ("a", "b")}


def accepts(plan: TrainingPlan, sites: int, values: dict[str, float]) -> None:
    """A site with these values in its policy judges the plan and an attempt by all sites.

    Raises:
        PolicyRefusal: it refuses.
    """
    fields: dict[str, Any] = {**POLICY, **values, "models": (plan.model.digest.hex(),)}
    policy = msgspec.convert(fields, Policy, strict=False)
    judge_plan(policy, plan)
    judge_cost(policy, plan)
    header = RoundHeader(
        plan=plan.digest(),
        roster=bytes(32),
        federation=plan.federation,
        job=plan.job,
        round=1,
        attempt=1,
        adapter=bytes(32),
        cohort=tuple(f"site-{number:02d}" for number in range(sites)),
    )
    judge_header(policy, plan, header)


def test_a_site_accepts_the_written_draft_with_the_policy_that_is_named_and_no_less(
    draft: Path,
) -> None:
    found = calibrated(draft, 500, 500, 500, 500, 500, mode="distributed")
    new = draft.with_name("new.toml")
    new.write_text(found.draft)
    plan = read_plan(new)
    assert isinstance(plan.privacy, DistributedPrivacy)
    assert (plan.privacy.honest, plan.privacy.least_survivors, plan.aggregation.threshold) == (
        *(3, 4),
        4,
    )
    accepts(plan, 5, found.policy)
    row = row_of(found, "distributed", 3)
    assert row.bytes_sent == 4 * (1 + sum(tensor.size for tensor in plan.trained_tensors(1)))
    less = {
        "max_epsilon": 0.99,
        "max_shared_epsilon": 0.99,
        "max_delta": 0.99,
        "max_rounds": 0.97,
        "max_clip_range": 0.99,
    }
    for field, factor in less.items():
        value = found.policy[field] * factor
        values = {**found.policy, field: int(value) if value > 20 else value}
        with pytest.raises(PolicyRefusal) as caught:
            accepts(plan, 5, values)
        assert caught.value.field == f"policy.{field}"
    for field in ("colluding_sites", "minimum_cohort"):
        with pytest.raises(PolicyRefusal):
            accepts(plan, 5, {**found.policy, field: found.policy[field] + 1})


def test_the_longest_step_has_the_noise_that_few_records_need(draft: Path) -> None:
    """One site's noise over a batch of 10 records is more than the clip norm."""
    draft.write_text(draft.read_text() + "\n[privacy]\nepsilon = 0.02\n")
    found = calibrated(draft, *(26,) * 4, mode="distributed", epsilons=(0.02,), rounds=4)
    new = draft.with_name("new.toml")
    new.write_text(found.draft)
    plan = read_plan(new)
    privacy: Any = plan.privacy
    noise = 2.0**privacy.noise_bits * plan.aggregation.step
    assert noise > 1.5 * plan.training.expected_batch_size * privacy.clip_norm
    accepts(plan, 4, found.policy)
    with pytest.raises(PolicyRefusal, match="clip range too large"):
        accepts(plan, 4, {**found.policy, "max_clip_range": found.policy["max_clip_range"] / 1.5})


def test_the_local_draft_is_a_plan_too_in_both_rings(draft: Path) -> None:
    draft.write_text(draft.read_text() + "\n[aggregation]\nring_bits = 16\n")
    found = calibrated(draft, *(300,) * 5, mode="local")
    new = draft.with_name("new.toml")
    new.write_text(found.draft)
    plan = read_plan(new)
    assert isinstance(plan.privacy, LocalPrivacy)
    assert (plan.aggregation.ring_bits, plan.training.steps) == (16, 30)
    accepts(plan, 5, found.policy)
    assert {row.bytes_sent for row in found.rows} == {
        2 * (1 + sum(tensor.size for tensor in plan.trained_tensors(1)))
    }


def test_the_draft_keeps_its_text_its_promise_and_nothing_of_its_numbers(
    draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(umbel_client.planning.comparison, "_can_account", lambda: False)
    before = draft.read_text()
    old = '\n[training]\nrounds = 5\n\n[training.optimizer]\noptimizer = "sgd"\n'
    promise = "\n[privacy]\nepsilon = 2.0\ndelta = 2e-6\nclip_norm = 9.0\n"
    draft.write_text(before + promise + old)
    found = calibrated(draft, *(1000,) * 3)
    assert found.draft.startswith(before)
    new = parse_toml(found.draft, Draft, draft)
    assert (new.privacy.epsilon, new.privacy.delta) == (2.0, 2e-6)  # type: ignore[union-attr]  # with privacy
    assert "9.0" not in found.draft
    assert "# Proposed for 3 sites" in found.draft
    # Its own claim is compared beside those that were asked for.
    assert {row.epsilon for row in found.rows} == {2.0, 3.0}
    for text in ("training = { rounds = 5 }\n", "privacy.epsilon = 2.0\n"):
        inline = text + before
        with pytest.raises(ConfigError, match="cannot be replaced"):
            draft_text(inline, new, "why", draft)


@pytest.mark.parametrize(
    ("sizes", "parts", "kind", "field"),
    [
        ((1000,), {}, ConfigError, "--public-size or --sites"),
        ((1000, 1000), {"colluding": 2}, ConfigError, "--public-size or --sites"),
        ((1000,) * 4, {"dropouts": 2}, ConfigError, "--dropouts"),
        ((20,) * 4, {}, DataError, "public sizes"),
        ((1000, 1000, 15), {"mode": "local"}, DataError, "public sizes"),
        pytest.param(
            (1000,) * 4,
            {"epsilons": (1e-6,)},
            CalibrationError,
            "privacy.epsilon",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_cohort_that_makes_no_plan_is_one_clear_error(
    draft: Path, sizes: tuple[int, ...], parts: dict[str, Any], kind: type[UmbelError], field: str
) -> None:
    with pytest.raises(kind) as caught:
        calibrated(draft, *sizes, **parts)
    assert (type(caught.value), caught.value.field) == (kind, field)


@pytest.mark.parametrize(
    ("old", "new", "kind", "field"),
    [
        ("rank = 2", "rnak = 2", ConfigError, "lora.rnak"),
        ("rank = 2", "rank = 2\nuse_dora = true", PlanError, "lora.use_dora"),
        ('["a", "b"]', '["a", "a "]', PlanError, None),
        ('["query"]', '["quarry"]', ModelError, None),
        ("# What", "privacy = { delta = 0.1 }\n# What", PlanError, "privacy.delta"),
        ("# What", "privacy = { epsilon = -1 }\n# What", ConfigError, "privacy.epsilon"),
    ],
)
def test_a_draft_that_no_plan_can_have_is_one_clear_error(
    draft: Path, old: str, new: str, kind: type[UmbelError], field: str | None
) -> None:
    text = draft.read_text()
    assert old in text
    draft.write_text(text.replace(old, new))
    with pytest.raises(kind) as caught:
        calibrated(draft, *(1000,) * 4)
    assert type(caught.value) is kind
    assert field in (None, caught.value.field)


WITHOUT = """
import io, runpy, sys
for name in ("torch", "transformers", "peft", "opacus", "datasets", "pyarrow"):
    sys.modules[name] = None
request, draft = sys.argv[1:]
sys.stdin = io.TextIOWrapper(io.BytesIO(request.encode()))
try:
    runpy.run_module("umbel_client.calibrating", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
sys.argv = ["drafting", draft]
runpy.run_module("umbel_client.drafting", run_name="__main__")
"""


def test_without_the_packages_the_rules_alone_propose(draft: Path) -> None:
    """Noise is not computed then, and a plan that has the noise in it is made elsewhere."""
    expected = calibrated(draft, *(500,) * 4)
    new = draft.with_name("new.toml")
    new.write_text(expected.draft)
    request = CalibrationRequest(str(draft), (500,) * 4, epsilons=(3.0,))
    words = [sys.executable, "-c", WITHOUT, msgspec.json.encode(request).decode(), str(new)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = msgspec.json.decode(done.stdout, type=Calibration)
    assert (found.accounted, found.draft) == (False, expected.draft)
    assert {row.noise_of_mean for row in found.rows} == {None}
    assert [row.bytes_sent for row in found.rows] == [row.bytes_sent for row in expected.rows]
    assert found.policy["max_clip_range"] == expected.policy["max_clip_range"]
    assert done.returncode == 13
    assert "evaluation.python" in done.stderr
    assert json.loads(done.stdout)["mode"] == "distributed"
