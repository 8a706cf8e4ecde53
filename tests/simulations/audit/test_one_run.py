"""The audit: its bound is that of the theorem, its game is fair, and its attack wins if it can."""

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_letters

import msgspec
import numpy as np
import pytest
from rich.console import Console
from support.small_models import save_telling_bert
from typer.testing import CliRunner

from umbel_client.data.conversations import Conversation, Passage
from umbel_client.data.records import LmRecords, Record, Records
from umbel_common.errors import ConfigError, VerificationError
from umbel_common.plans.plan import CausalLm, TrainingPlan
from umbel_simulations.audit.bound import chance_of, epsilon_lower_bound
from umbel_simulations.audit.canaries import (
    RECORDS_OF_A_PATIENT,
    first_units,
    make_canaries,
    site_records,
    unit_count,
    with_included,
)
from umbel_simulations.audit.game import flip_coins, log_likelihood_ratios, overlaps_of
from umbel_simulations.audit.one_run import AuditResult, as_table, audit_scenario, check
from umbel_simulations.backends.in_process import seeded
from umbel_simulations.cli.command import app
from umbel_simulations.inputs.sources import Example
from umbel_simulations.scenario.file import find_scenario, override

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


LOCAL = """\
mode = "local"
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0
"""
SHARED = """\
mode = "distributed"
epsilon = {epsilon}
delta = 1e-4
clip_norm = 1.0
sampling_rate = {rate}
honest = 2
least_survivors = 3
spare_attempts = {spare}

[server]
optimizer = "sgd"
adapter_learning_rate = 0.5
"""


def sharing(path: Path, *, epsilon: float, rate: float, spare: int) -> None:
    """Makes the scenario one whose sites share their noise."""
    text = path.read_text()
    rates = "adapter_learning_rate = 1e-2\nhead_learning_rate = 1e-1"
    for before, after in (
        (LOCAL, SHARED.format(epsilon=epsilon, rate=rate, spare=spare)),
        (rates, 'optimizer = "none"'),
        ("local_steps = 2", "local_steps = 1"),
    ):
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)


def scenario_file(folder: Path, model: Path, words: Sequence[str], labels: Sequence[str]) -> Path:
    """The scenario above with 120 texts of some of the model's words."""
    random = np.random.default_rng(1)
    rows = [
        json.dumps(
            {"text": " ".join(random.choice(words, 6)), "label": labels[number % len(labels)]}
        )
        for number in range(120)
    ]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    path = folder / "tiny.toml"
    path.write_text(SCENARIO.format(model=model))
    return path


@pytest.fixture
def scenario(tmp_path: Path, tiny_model: Path) -> Path:
    return scenario_file(tmp_path, tiny_model, [f"w{number}" for number in range(35)], "ab")


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
    """The bound is wrong in at most one of twenty games, and close to epsilon with many guesses."""
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
    each = RECORDS_OF_A_PATIENT
    assert each > 1
    assert canaries.units == tuple(np.repeat(range(4), each))
    # Copies: gradients that point one way are what clipping by the record lets through.
    assert [len(set(canaries.records[n * each : (n + 1) * each])) for n in range(4)] == [1] * 4
    assert len(set(canaries.records)) == 4
    joined = with_included(records, canaries, np.array([False, True, False, True]))
    assert joined.units == (0, 0, 1, 1, 1, 2, *np.repeat([3, 4], each))
    assert joined.records[6:] == canaries.records[each : 2 * each] + canaries.records[3 * each :]


@pytest.mark.parametrize(
    ("most", "kept"), [(6, 6), (5, 5), (4, 3), (3, 3), (2, 2), (1, 2)], ids=lambda n: str(n)
)
def test_the_known_records_are_of_whole_patients(most: int, kept: int) -> None:
    """Patients of 2, 1, 2 and 1 records, in some order of the file."""
    owners = (0, 1, 0, 2, 2, 3)
    first = first_units(some_records(units=owners), most)
    assert len(first) == kept
    for unit in range(unit_count(first)):
        assert first.units.count(unit) == owners.count(unit)
    assert first.unit_column == "patient"


def test_records_that_are_their_own_units_are_cut_anywhere() -> None:
    records = some_records()
    first = first_units(records, 4)
    assert first.records == records.records[:4]
    assert (first.units, unit_count(first), unit_count(records)) == ((), 4, 6)
    assert first_units(records, 100) == records


@pytest.mark.parametrize("whole", [False, True], ids=["questions", "passages"])
def test_a_language_models_canaries_are_made_of_its_words(
    make_plan: Callable[..., TrainingPlan], whole: bool
) -> None:
    examples = [
        Example(text=f"w{n} w{n + 1}", answer="" if whole else f"v{n}")
        for n in range(2 * RECORDS_OF_A_PATIENT)
    ]
    task = CausalLm(loss_on="all")
    records = site_records(examples, task, "patient")
    assert isinstance(records, LmRecords)
    assert unit_count(records) == 2
    canaries = make_canaries(records, make_plan(task=task), 4, seed=1)
    kind = Passage if whole else Conversation
    assert all(isinstance(record, kind) for record in canaries.records)
    assert len(set(canaries.records)) == unit_count(canaries) == 4
    joined = with_included(records, canaries, np.array([False, True, False, True]))
    assert len(joined) == 4 * RECORDS_OF_A_PATIENT


def test_both_levels_audit_the_same_records(make_plan: Callable[..., TrainingPlan]) -> None:
    task, size = make_plan().task, 2 * RECORDS_OF_A_PATIENT + 3
    examples = [Example(text=f"w{n}", label=task.labels[n % 3]) for n in range(size)]
    single, owned = (site_records(examples, task, unit) for unit in ("record", "patient"))
    assert single.records == owned.records
    assert (single.unit_column, single.units) == (None, ())
    assert owned.unit_column == "patient"
    assert np.bincount(owned.units).tolist() == [RECORDS_OF_A_PATIENT] * 2 + [3]


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_evidence_is_the_likelihood_ratio_of_a_sampled_gaussian(rate: float) -> None:
    """Two orthogonal canaries, and 10,000 elements that hold only noise."""
    random = np.random.default_rng(0)
    noisy_sum = random.normal(0, 0.5, 10_002)
    noisy_sum[:2] = (1.4, -0.3)
    deviation = np.median(np.abs(noisy_sum)) / 0.6745
    directions = np.eye(2, 10_002, dtype=np.float32)
    found = log_likelihood_ratios(noisy_sum, directions, overlaps_of(directions), rate)

    def density(value: float, mean: float) -> float:
        return math.exp(-(((value - mean) / deviation) ** 2) / 2)

    for value, ratio in zip((1.4, -0.3), found, strict=True):
        inside = rate * density(value, 1) + (1 - rate) * density(value, 0)
        assert ratio == pytest.approx(math.log(inside / density(value, 0)), abs=0.01)


def test_a_canary_without_a_gradient_is_no_evidence() -> None:
    noisy_sum = np.random.default_rng(0).normal(0, 0.5, 1000)
    directions = np.zeros((2, 1000), dtype=np.float32)
    directions[0, 0] = 1.0
    ratios = log_likelihood_ratios(noisy_sum, directions, overlaps_of(directions), 0.5)
    assert ratios[0] != 0
    assert ratios[1] == pytest.approx(0, abs=1e-12)


def test_the_command_audits_records_and_patients(scenario: Path) -> None:
    result = CliRunner().invoke(app, ["audit", str(scenario), "--canaries", "40", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["unit"] for row in rows] == ["record", "patient"]
    for row in rows:
        assert 7.9 < row["claimed_epsilon"] <= 8.0
        assert 0 <= row["epsilon_lower_bound"] <= row["largest_bound"] < 8.0
        assert row["canaries"] == 40
        assert 0 < row["included"] < 40
        assert row["correct"] <= row["guesses"] == 4
        assert (row["steps"], row["records"]) == (4, 40)
    # 16 records of 40 in a batch; of 4 patients with 10 records each, one.
    assert [row["units"] for row in rows] == [40, 4]
    assert [row["sampling_rate"] for row in rows] == [16 / 40, 1 / 4]


@pytest.mark.parametrize("share", [1.0, 1e-4])
def test_the_audit_of_a_scenario_can_refute_both_claims(tmp_path: Path, share: float) -> None:
    """The negative control: with next to no noise both claims of epsilon 1 are refuted.

    Twenty labels: the first step moves the head alone, which must hold 300 canaries apart.
    """
    words = [f"w{number}" for number in range(1000)]
    model = save_telling_bert(tmp_path / "model", words)
    scenario = find_scenario(str(scenario_file(tmp_path, model, words, ascii_letters[:20])))
    replace = msgspec.structs.replace
    scenario = replace(
        scenario,
        task=replace(scenario.task, logit_scale=1000.0),
        training=replace(scenario.training, rounds=1, local_steps=1, expected_batch_size=40),
        privacy=replace(scenario.privacy, epsilon=1.0),
    )
    results = audit_scenario(scenario, 300, seeded(1, "audit"), lambda *_: None, noise_share=share)
    assert all(0.99 < result.claimed_epsilon <= 1 for result in results)
    if share == 1:
        check(results)
    for result in results if share < 1 else ():
        assert result.epsilon_lower_bound > 1.5
        with pytest.raises(VerificationError, match="an attack refutes the claimed privacy"):
            check([result])


def test_the_command_audits_both_claims_of_sites_that_share_their_noise(scenario: Path) -> None:
    sharing(scenario, epsilon=8.0, rate=0.4, spare=2)
    result = CliRunner().invoke(app, ["audit", str(scenario), "--canaries", "40", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    shown = io.StringIO()
    Console(width=80, file=shown).print(as_table(msgspec.convert(rows, list[AuditResult])))
    assert "4 attempts" in shown.getvalue()
    assert "record    readers" in shown.getvalue()
    assert [(row["unit"], row["against"]) for row in rows] == [
        *(("record", "readers"), ("record", "everybody")),
        *(("patient", "readers"), ("patient", "everybody")),
    ]
    for row in rows:
        readers = row["against"] == "readers"
        assert (7.9 < row["claimed_epsilon"] <= 8.0) == readers
        assert 0 <= row["epsilon_lower_bound"] <= row["largest_bound"] < row["claimed_epsilon"]
        # Two rounds and two attempts more, with the plan's sampling rate for either unit.
        assert (row["steps"], row["sampling_rate"]) == (4, 0.4)
        assert row["correct"] <= row["guesses"] == 4
    readers, everybody = rows[0], rows[1]
    ratio = readers["noise_multiplier"] / everybody["noise_multiplier"]
    assert ratio == pytest.approx(math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize("share", [pytest.param(1.0, marks=pytest.mark.full), 1e-4])
def test_the_audit_of_sums_can_refute_every_claim(tmp_path: Path, share: float) -> None:
    """With next to no noise, all four claims are refuted."""
    words = [f"w{number}" for number in range(1000)]
    model = save_telling_bert(tmp_path / "model", words)
    path = scenario_file(tmp_path, model, words, ascii_letters[:20])
    sharing(path, epsilon=1.0, rate=1.0, spare=0)
    scenario = find_scenario(str(path))
    task = msgspec.structs.replace(scenario.task, logit_scale=1000.0)
    training = msgspec.structs.replace(scenario.training, rounds=1)
    results = audit_scenario(
        msgspec.structs.replace(scenario, task=task, training=training),
        200,
        seeded(1, "audit"),
        lambda *_: None,
        noise_share=share,
    )
    assert len(results) == 4
    for result in results:
        refuted = result.epsilon_lower_bound > result.claimed_epsilon
        assert refuted == (share < 1)
        assert result.claimed_epsilon < result.largest_bound
    if share < 1:
        with pytest.raises(VerificationError, match="an attack refutes the claimed privacy") as one:
            check(results)
        assert "per record, against readers" in str(one.value)


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ("least_survivors = 3", "least_survivors = 4", "privacy.least_survivors"),
        ("honest = 2", "honest = 3", "privacy.honest"),
    ],
)
def test_a_claim_that_no_sum_of_the_sites_could_keep_is_not_audited(
    scenario: Path, before: str, after: str, field: str
) -> None:
    sharing(scenario, epsilon=8.0, rate=0.4, spare=2)
    scenario.write_text(scenario.read_text().replace(before, after))
    with pytest.raises(ConfigError) as caught:
        find_scenario(str(scenario))
    assert caught.value.field == field


def test_a_scenario_that_claims_nothing_is_not_audited(scenario: Path) -> None:
    chosen = override(find_scenario(str(scenario)), no_dp=True)
    with pytest.raises(ConfigError, match=r"privacy\.mode"):
        audit_scenario(chosen, 40, seeded(1, "audit"), lambda *_: None)


def result_with(bound: float, unit: str = "record") -> AuditResult:
    return AuditResult(
        scenario="tiny",
        site="hospital-a",
        unit=unit,
        records=40,
        units=40,
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


def test_a_bound_above_any_claim_is_an_error() -> None:
    check([result_with(2.0), result_with(1.0, "patient")])
    with pytest.raises(VerificationError, match="an attack refutes the claimed privacy") as raised:
        check([result_with(2.0), result_with(2.1, "patient")])
    assert raised.value.exit_code == 52
    assert "epsilon per patient" in str(raised.value)


def test_people_read_claim_and_bound_side_by_side() -> None:
    shown = io.StringIO()
    Console(width=80, file=shown).print(as_table([result_with(1.25), result_with(0.5, "patient")]))
    lines = [line.split() for line in shown.getvalue().splitlines()]
    heading, rows = lines[2], [line for line in lines if line[:1] in (["record"], ["patient"])]
    assert " ".join(heading) == "per against claim attack right canaries at most"
    assert "95% confidence" in " ".join(shown.getvalue().split())
    assert "readers" not in shown.getvalue()
    assert rows == [
        [unit, "everybody", "2.000", bound, "99", "of", "100", "1,000", "3.000"]
        for unit, bound in (("record", "1.250"), ("patient", "0.500"))
    ]
