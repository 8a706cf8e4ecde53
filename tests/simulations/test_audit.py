"""The audit: its bound is the theorem's, its game is fair, and its attack wins where it may."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from umbel_client.data import Record, Records
from umbel_common.errors import ConfigError, VerificationError
from umbel_common.plan import TrainingPlan
from umbel_simulations.audit import AuditResult, as_text, audit_scenario, check
from umbel_simulations.audit_bound import chance_of, epsilon_lower_bound
from umbel_simulations.audit_game import (
    RECORDS_OF_A_UNIT,
    flip_coins,
    log_likelihood_ratios,
    make_canaries,
    with_included,
)
from umbel_simulations.cli import app
from umbel_simulations.entropy import seeded
from umbel_simulations.scenario import find_scenario, override

SCENARIO = """\
name = "tiny"
description = "seconds, for tests"
seed = 3
baselines = []

[model]
path = "{model}"
name = "tiny"

[data]
source = "files"
train = "train.jsonl"
test = "train.jsonl"

[sites]
count = 3
partition = "iid"

[lora]
rank = 2
alpha = 4
target_modules = ["query", "value"]
method = "both"

[training]
rounds = 2
local_steps = 2
expected_batch_size = 16
adapter_learning_rate = 1e-2
head_learning_rate = 1e-1

[privacy]
mode = "local"
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0

[aggregation]
threshold = 3
"""


@pytest.fixture
def scenario(tmp_path: Path, tiny_model: Path) -> Path:
    random = np.random.default_rng(1)
    rows = [
        json.dumps(
            {
                "text": " ".join(f"w{word}" for word in random.integers(0, 35, 6)),
                "label": "ab"[number % 2],
            }
        )
        for number in range(120)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    path = tmp_path / "tiny.toml"
    path.write_text(SCENARIO.format(model=tiny_model))
    return path


def test_guesses_no_better_than_coins_show_nothing() -> None:
    assert epsilon_lower_bound(100, 100, 50, 0.0, 0.95) == 0
    assert epsilon_lower_bound(100, 100, 0, 1e-5, 0.95) == 0


def test_perfect_guesses_show_what_a_coin_of_that_accuracy_would_hardly_do() -> None:
    """accuracy ** 100 = 0.05."""
    accuracy = 0.05**0.01
    wanted = math.log(accuracy / (1 - accuracy))
    assert wanted == pytest.approx(3.493, abs=1e-3)
    assert epsilon_lower_bound(100, 100, 100, 0.0, 0.95) == pytest.approx(wanted, abs=1e-5)


def test_the_chance_of_few_guesses_is_that_of_the_theorem_by_hand() -> None:
    """Two canaries: with accuracy a, both right a², one 2 a (1 - a), none (1 - a)²."""
    epsilon, delta = 1.3, 0.01
    a = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert chance_of(2, 2, 2, epsilon, 0.0) == pytest.approx(a**2)
    assert chance_of(2, 2, 1, epsilon, 0.0) == pytest.approx(1 - (1 - a) ** 2)
    # delta's term: 2 m delta times the largest of P[v > W >= v - i] / i.
    both = a**2 + 4 * delta * max(2 * a * (1 - a), (1 - a**2) / 2)
    assert chance_of(2, 2, 2, epsilon, delta) == pytest.approx(both)
    one_guess = a + 4 * delta * (1 - a)
    assert chance_of(2, 1, 1, epsilon, delta) == pytest.approx(one_guess)


def test_delta_and_abstained_canaries_lower_the_bound() -> None:
    pure = epsilon_lower_bound(1000, 100, 90, 0.0, 0.95)
    approximate = epsilon_lower_bound(1000, 100, 90, 1e-5, 0.95)
    more = epsilon_lower_bound(2000, 100, 90, 1e-5, 0.95)
    assert pure > approximate > more > 0


def test_the_bound_holds_for_randomised_response_which_is_the_worst_case() -> None:
    """It must be wrong in at most one of twenty games, and near epsilon with many guesses."""
    epsilon, games = 2.0, 400
    correct = np.random.default_rng(0).binomial(500, 1 / (1 + math.exp(-epsilon)), games)
    bound_of = {v: epsilon_lower_bound(500, 500, v, 0.0, 0.95) for v in set(correct.tolist())}
    bounds = np.array([bound_of[v] for v in correct.tolist()])
    assert 0.01 < (bounds > epsilon).mean() < 0.075
    assert 1.5 < np.median(bounds) < epsilon


def test_coins_are_fair_and_their_own() -> None:
    coins = flip_coins(10_000, seeded(1, "coins"))
    assert coins.mean() == pytest.approx(0.5, abs=0.02)
    assert (coins[1:] & coins[:-1]).mean() == pytest.approx(0.25, abs=0.02)
    assert (coins != flip_coins(10_000, seeded(2, "coins"))).mean() == pytest.approx(0.5, abs=0.02)


def some_records(units: tuple[int, ...] = ()) -> Records:
    return Records(
        records=tuple(Record(text=f"w{n} w{n + 1}", label=n % 2) for n in range(6)),
        source=bytes(32),
        units=units,
        unit_column="patient" if units else None,
    )


def test_exactly_the_included_canaries_join_the_data(
    make_plan: Callable[..., TrainingPlan],
) -> None:
    records = some_records()
    canaries = make_canaries(records, make_plan(), 5, seed=1)
    included = np.array([True, False, False, True, True])
    joined = with_included(records, canaries, included)
    assert joined.records[:6] == records.records
    assert joined.records[6:] == tuple(canaries.records[n] for n in (0, 3, 4))
    words = {word for text in records.texts for word in text.split()}
    assert {word for text in canaries.texts for word in text.split()} <= words


def test_where_units_are_patients_a_canary_is_a_patient_with_several_records(
    make_plan: Callable[..., TrainingPlan],
) -> None:
    records = some_records(units=(0, 0, 1, 1, 1, 2))
    canaries = make_canaries(records, make_plan(), 4, seed=1)
    assert len(canaries) == 4 * RECORDS_OF_A_UNIT
    joined = with_included(records, canaries, np.array([False, True, False, True]))
    patients = np.repeat([3, 4], RECORDS_OF_A_UNIT)
    assert joined.units == (0, 0, 1, 1, 1, 2, *patients)
    each = RECORDS_OF_A_UNIT
    assert joined.records[6:] == canaries.records[each : 2 * each] + canaries.records[3 * each :]


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_evidence_is_the_likelihood_ratio_of_a_sampled_gaussian(rate: float) -> None:
    """Two orthogonal canaries beside 10,000 elements that hold nothing but noise."""
    random = np.random.default_rng(0)
    noisy_sum = random.normal(0, 0.5, 10_002)
    noisy_sum[:2] = (1.4, -0.3)
    deviation = np.median(np.abs(noisy_sum)) / 0.6745
    directions = np.eye(2, 10_002, dtype=np.float32)
    found = log_likelihood_ratios(noisy_sum, directions, rate)

    def density(value: float, mean: float) -> float:
        return math.exp(-(((value - mean) / deviation) ** 2) / 2)

    for value, ratio in zip((1.4, -0.3), found, strict=True):
        inside = rate * density(value, 1) + (1 - rate) * density(value, 0)
        assert ratio == pytest.approx(math.log(inside / density(value, 0)), abs=0.01)


def test_a_canary_without_a_gradient_is_no_evidence() -> None:
    noisy_sum = np.random.default_rng(0).normal(0, 0.5, 1000)
    directions = np.zeros((2, 1000), dtype=np.float32)
    directions[0, 0] = 1.0
    ratios = log_likelihood_ratios(noisy_sum, directions, 0.5)
    assert ratios[0] != 0
    assert ratios[1] == pytest.approx(0, abs=1e-12)


def test_the_command_audits_a_scenario_and_prints_claim_and_bound(scenario: Path) -> None:
    result = CliRunner().invoke(app, ["audit", str(scenario), "--canaries", "40", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert 7.9 < found["claimed_epsilon"] <= 8.0
    assert 0 <= found["epsilon_lower_bound"] <= found["largest_bound"] < 8.0
    assert found["canaries"] == 40
    assert 0 < found["included"] < 40
    assert found["correct"] <= found["guesses"] == 4
    assert (found["steps"], found["unit"], found["records"]) == (4, "record", 40)


def test_a_scenario_that_claims_nothing_is_not_audited(scenario: Path) -> None:
    chosen = override(find_scenario(str(scenario)), no_dp=True)
    with pytest.raises(ConfigError, match=r"privacy\.mode"):
        audit_scenario(chosen, 40, seeded(1, "audit"), lambda step, steps: None)


def result_with(bound: float) -> AuditResult:
    return AuditResult(
        scenario="tiny",
        site="hospital-a",
        unit="record",
        records=40,
        steps=4,
        sampling_rate=0.4,
        noise_multiplier=1.0,
        claimed_epsilon=2.0,
        delta=1e-5,
        canaries=1000,
        included=500,
        guesses=100,
        correct=99,
        confidence=0.95,
        epsilon_lower_bound=bound,
        largest_bound=3.0,
    )


def test_a_bound_above_the_claim_is_an_error() -> None:
    check(result_with(2.0))
    with pytest.raises(VerificationError, match="an attack refutes the privacy") as raised:
        check(result_with(2.1))
    assert raised.value.exit_code == 52


def test_people_read_claim_and_bound_side_by_side() -> None:
    text = as_text(result_with(1.25))
    assert "epsilon 2.000 at delta 1e-05" in text
    assert "epsilon above 1.250, 95% confidence: 99 of 100 guesses right" in text
