"""Bugs that end privacy, each put in on purpose and caught: the table in docs/privacy.md."""

import math
import os
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
from support.small_models import one_round, plan_for, save_telling_bert

import umbel_client.training.round
from umbel_client.data.tokens import Tokens
from umbel_client.data.units import Units
from umbel_client.dpsgd.private_step import PrivateOptimizer
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.ledger.ledger import Ledger
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.accounting import DpEvent
from umbel_client.privacy.calibration import SiteNoise, noise_for
from umbel_client.privacy.noise import NoiseSource
from umbel_client.site.policy import Budget
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_client.training.round import LocalTrainer
from umbel_common.canonical import Entropy, digest
from umbel_common.errors import LedgerError
from umbel_common.plans.plan import Classification, LocalPrivacy, TrainingPlan
from umbel_simulations.audit.canaries import Unit, records_of_a_unit, site_records, unit_count
from umbel_simulations.audit.game import step_by_step
from umbel_simulations.audit.one_run import AuditResult, judge, play, share_of
from umbel_simulations.backends.in_process import seeded
from umbel_simulations.inputs.sources import Example

WORDS = [f"w{index}" for index in range(1000)]
UNITS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_telling_bert(tmp_path_factory.mktemp("model"), WORDS)


@pytest.fixture(scope="module")
def plan(folder: Path) -> TrainingPlan:
    """One full batch at epsilon 1."""
    return plan_for(
        folder,
        # Gradients before clipping are as long as the factor on the logits.
        Classification(labels=tuple(f"label {n}" for n in range(20)), logit_scale=1000.0),
        training=one_round(UNITS),
        privacy=LocalPrivacy(epsilon=1.0, delta=1e-5, clip_norm=1.0),
    )


per_unit = pytest.mark.parametrize("unit", get_args(Unit))


def audited(
    plan: TrainingPlan, folder: Path, unit: Unit, *, noise_share: float = 1.0
) -> AuditResult:
    """30 guesses about 300 canaries: enough to refute epsilon 1, and fast."""
    random = np.random.default_rng(0)
    examples = [
        Example(text=" ".join(random.choice(WORDS, 6)), label=plan.task.labels[number % 20])
        for number in range(UNITS * records_of_a_unit(unit))
    ]
    records = site_records(examples, plan.task, unit)
    noise = noise_for(plan, unit_count(records))
    outcome = play(
        step_by_step(plan),
        folder,
        records,
        share_of(noise, noise_share),
        canaries=300,
        seed=2,
        entropy=seeded(3, "audit"),
        physical_batch_size=256,
        on_round=lambda done, rounds: None,
    )
    return judge(outcome, plan, noise, scenario="test", site="site", records=records)


class WithoutClipping(PrivateOptimizer):
    """The same noise, and nothing clipped."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise: StepNoise,
        *,
        noise_multiplier: float,
        clip_norm: float,
        **others: Any,
    ) -> None:
        huge = 1e6
        super().__init__(
            optimizer,
            noise,
            noise_multiplier=noise_multiplier * clip_norm / huge,
            clip_norm=huge,
            **others,
        )


def noise_shared_by(sites: int) -> type[PrivateOptimizer]:
    """What the sum of so many sites would need, as if nobody saw a site alone."""

    class Shared(PrivateOptimizer):
        def __init__(
            self,
            optimizer: torch.optim.Optimizer,
            noise: StepNoise,
            *,
            noise_multiplier: float,
            **others: Any,
        ) -> None:
            shared = noise_multiplier / math.sqrt(sites)
            super().__init__(optimizer, noise, noise_multiplier=shared, **others)

    return Shared


class ClippingRecords(PrivateOptimizer):
    """As if each record were its own unit, while steps sample patients."""

    def accumulate(
        self, records: int, units: object = None, *, rows: int | None = None, copy: int = 0
    ) -> None:
        super().accumulate(records, rows=rows)


@per_unit
def test_an_attack_on_sound_training_stays_below_the_claim(
    plan: TrainingPlan, folder: Path, unit: Unit
) -> None:
    result = audited(plan, folder, unit)
    assert (result.unit, result.units) == (unit, UNITS)
    assert result.claimed_epsilon == pytest.approx(1.0, rel=0.01)
    assert result.epsilon_lower_bound < result.claimed_epsilon < result.largest_bound


@per_unit
def test_the_audit_sees_that_there_is_no_noise(
    plan: TrainingPlan, folder: Path, unit: Unit
) -> None:
    """The negative control: training takes no noise of exactly zero, so next to none."""
    result = audited(plan, folder, unit, noise_share=1e-4)
    assert result.correct == result.guesses
    assert result.epsilon_lower_bound == result.largest_bound > 2 * result.claimed_epsilon


@per_unit
def test_the_audit_sees_that_nothing_is_clipped(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch, unit: Unit
) -> None:
    monkeypatch.setattr(umbel_client.training.round, "PrivateOptimizer", WithoutClipping)
    result = audited(plan, folder, unit)
    assert result.epsilon_lower_bound > 1.5 * result.claimed_epsilon


def test_the_audit_sees_clipping_by_the_record_where_the_claim_is_per_patient(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(umbel_client.training.round, "PrivateOptimizer", ClippingRecords)
    result = audited(plan, folder, "patient")
    assert result.epsilon_lower_bound > 1.5 * result.claimed_epsilon
    # What is clipped is sound where records are the unit: only the claim was wrong.
    result = audited(plan, folder, "record")
    assert result.epsilon_lower_bound < result.claimed_epsilon


@per_unit
def test_the_audit_sees_noise_that_is_shared_by_a_hundred_sites(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch, unit: Unit
) -> None:
    monkeypatch.setattr(umbel_client.training.round, "PrivateOptimizer", noise_shared_by(100))
    result = audited(plan, folder, unit)
    assert result.epsilon_lower_bound > 1.5 * result.claimed_epsilon


def no_records() -> PreparedData:
    tokens = Tokens(ids=np.zeros(0, np.int32), starts=np.zeros(1, np.int64), pad_id=0)
    return PreparedData(tokens, np.zeros(0, np.int64), prefix=None)


def noise_alone(
    plan: TrainingPlan, folder: Path, noise: SiteNoise, rounds: int, entropy: Entropy
) -> np.ndarray:
    """What rounds without any record release, in units of the sum: float64[rounds, elements]."""
    model = AdaptedModel.load(folder, plan)
    start = np.zeros(plan.lora.size, dtype=np.float32)
    trainer = LocalTrainer(model, no_records(), noise, entropy, BatchLimit(8))
    deltas = [trainer.round(1, start).delta for _ in range(rounds)]
    return np.stack(deltas).astype(np.float64) * plan.training.expected_batch_size


def test_noise_that_is_shared_by_four_sites_has_half_the_deviation_that_is_charged(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = noise_for(plan, UNITS)
    sound = noise_alone(plan, folder, noise, 5, os.urandom)
    assert sound.std() == pytest.approx(noise.noise_multiplier, rel=0.05)
    monkeypatch.setattr(umbel_client.training.round, "PrivateOptimizer", noise_shared_by(4))
    shared = noise_alone(plan, folder, noise, 5, os.urandom)
    assert shared.std() == pytest.approx(noise.noise_multiplier / 2, rel=0.05)


def test_the_same_noise_twice_is_correlated_and_cancels(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = noise_for(plan, UNITS)
    first, second = noise_alone(plan, folder, noise, 2, os.urandom)
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(len(first))
    monkeypatch.setattr(
        umbel_client.dpsgd.step_noise, "NoiseSource", lambda entropy: NoiseSource(bytes)
    )
    first, second = noise_alone(plan, folder, noise, 2, os.urandom)
    assert np.array_equal(first, second)


class Shuffled(NoiseSource):
    """Walks through a shuffled data set, batch after batch, as data loaders do."""

    order = np.zeros(0, dtype=np.int64)

    def poisson_batch(self, records: int, rate: float) -> np.ndarray:
        size = round(rate * records)
        if len(self.order) < size:
            self.order = np.argsort(self.normal(records))
        batch, self.order = self.order[:size], self.order[size:]
        return np.sort(batch)


def batches_of(plan: TrainingPlan, folder: Path, owners: Units | None = None) -> list[set[int]]:
    """The records in each of 80 steps at rate 1/4, by what is read from the data."""
    plan = msgspec.structs.replace(plan, training=one_round(5, steps=80))
    lengths = np.full(UNITS, 4)
    tokens = Tokens(
        ids=np.arange(5, 5 + lengths.sum(), dtype=np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pad_id=0,
    )
    batches: list[set[int]] = [set()]
    read = PreparedData.batch

    def noting(self: PreparedData, part: Part) -> object:
        batches[-1] |= set(part.records.tolist())
        return read(self, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedData, "batch", noting)
        LocalTrainer(
            AdaptedModel.load(folder, plan),
            PreparedData(tokens, np.arange(UNITS), prefix=None, units=owners),
            SiteNoise(0.25, 1000.0),
            seeded(1, "batches"),
            BatchLimit(3),
        ).round(
            1,
            np.zeros(plan.lora.size, dtype=np.float32),
            on_step=lambda step, total: batches.append(set()),
        )
    return batches[:-1]


@pytest.fixture(scope="module")
def poisson_batches(plan: TrainingPlan, folder: Path) -> list[set[int]]:
    return batches_of(plan, folder)


@pytest.fixture(scope="module")
def shuffled_batches(plan: TrainingPlan, folder: Path) -> list[set[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(umbel_client.training.round, "NoiseSource", Shuffled)
        return batches_of(plan, folder)


def test_shuffled_batches_are_all_of_one_size_and_poisson_batches_are_not(
    poisson_batches: list[set[int]], shuffled_batches: list[set[int]]
) -> None:
    poisson = np.array([len(batch) for batch in poisson_batches])
    assert poisson.mean() == pytest.approx(UNITS / 4, abs=1.0)
    assert poisson.var() == pytest.approx(UNITS / 4 * (1 - 1 / 4), rel=0.5)
    shuffled = np.array([len(batch) for batch in shuffled_batches])
    assert shuffled.mean() == UNITS / 4
    assert shuffled.var() == 0


def test_a_record_may_be_in_two_poisson_batches_in_a_row_and_never_in_two_of_an_epoch(
    poisson_batches: list[set[int]], shuffled_batches: list[set[int]]
) -> None:
    def together(batches: list[set[int]]) -> int:
        return sum(len(batches[n] & batches[n + 1]) for n in range(0, len(batches), 2))

    # Each of 20 records in both of 40 pairs of steps with probability 1/16.
    assert together(poisson_batches) == pytest.approx(50, abs=30)
    assert together(shuffled_batches) == 0


def test_a_patients_records_are_in_a_batch_together_or_not_at_all(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a patient with many records is in more steps than the accountant charges."""
    patient = set(range(10))
    owners = Units(np.array([0] * 10 + list(range(1, UNITS - 9))))
    seen = [batch & patient for batch in batches_of(plan, folder, owners)]
    assert all(part in (set(), patient) for part in seen)
    # In each of 80 steps with probability 1/4.
    assert sum(map(bool, seen)) == pytest.approx(20, abs=15)
    monkeypatch.setattr(PreparedData, "unit_count", property(len))
    monkeypatch.setattr(PreparedData, "records_of", lambda self, chosen: chosen)
    seen = [batch & patient for batch in batches_of(plan, folder, owners)]
    assert not all(part in (set(), patient) for part in seen)
    # Now with probability 1 - (3/4)^10.
    assert sum(map(bool, seen)) > 60


def releases_of_two_attempts(
    plan: TrainingPlan, folder: Path, path: Path, rounds: int = 2
) -> list[bytes]:
    """The different deltas of one round that the ledger lets a site release."""
    noise = noise_for(plan, UNITS)
    assert noise.noise_multiplier is not None
    event = DpEvent(noise.noise_multiplier, noise.sampling_rate, 1)
    released = []
    with Ledger.open(path, bytes(32)) as ledger:
        ledger.reserve("job", plan.digest(), 1, event, Budget(2.0, 1e-5))
        for delta in noise_alone(plan, folder, noise, rounds, os.urandom):
            name = digest("delta", delta.tobytes())
            try:
                ledger.record_delta("job", 1, name)
            except LedgerError:
                continue
            released.append(name)
    return released


def test_the_ledger_refuses_a_second_release_with_other_noise(
    plan: TrainingPlan, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(releases_of_two_attempts(plan, folder, tmp_path / "ledger.sqlite")) == 1
    monkeypatch.setattr(Ledger, "record_delta", lambda self, job, round_number, delta_digest: None)
    assert len(releases_of_two_attempts(plan, folder, tmp_path / "other.sqlite")) == 2
