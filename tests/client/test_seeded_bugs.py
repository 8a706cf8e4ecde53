"""Bugs that end privacy, each put in on purpose and caught.

| bug | caught by |
|---|---|
| clip off | the audit; `test_neighbours.py` |
| noise divided by sqrt(sites) in local mode | the noise alone, at 4 sites; the audit, at 100 |
| shuffling instead of Poisson sampling | who is in the batches |
| mean loss over the batch | the largest move in `test_neighbours.py` |
| the same noise twice | the noise alone |
| a second release of a round | the ledger |
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from umbel_client import training
from umbel_client.accounting import Event
from umbel_client.budget import Budget
from umbel_client.data import Record, Records
from umbel_client.ledger import Ledger
from umbel_client.model import AdaptedModel, folder_digest, plan_lora
from umbel_client.noise import NoiseSource
from umbel_client.prepared import PreparedData
from umbel_client.private_step import PrivateOptimizer
from umbel_client.site_job import SiteNoise, noise_for
from umbel_client.tokens import Tokens
from umbel_client.training import train_round
from umbel_common.canonical import Entropy, digest
from umbel_common.errors import LedgerError
from umbel_common.plan import (
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Sgd,
    Training,
    TrainingPlan,
)
from umbel_simulations.audit import AuditResult, judge, play
from umbel_simulations.audit_game import step_by_step
from umbel_simulations.entropy import seeded

WORDS = [f"w{index}" for index in range(1000)]
RECORDS = 20
SGD = Sgd(adapter_learning_rate=1.0, head_learning_rate=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which texts of different words have nearly orthogonal gradients."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("model")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    config = BertConfig(
        hidden_size=64,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(specials) + len(WORDS),
    )
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[: len(specials)] = 0
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(path)
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plan(folder: Path) -> TrainingPlan:
    """One full batch at epsilon 1."""
    # Gradients before clipping are as long as the factor on the logits.
    task = Classification(labels=tuple(f"label {n}" for n in range(20)), logit_scale=1000.0)
    return TrainingPlan(
        federation="f",
        job="j",
        model=BaseModel(name="tiny", digest=folder_digest(folder)),
        task=task,
        lora=plan_lora(
            folder,
            task,
            rank=2,
            alpha=4.0,
            target_modules=("query", "value"),
            layers=None,
            method="both",
            seed=5,
        ),
        training=Training(rounds=1, local_steps=1, expected_batch_size=RECORDS, optimizer=SGD),
        privacy=LocalPrivacy(epsilon=1.0, delta=1e-5, clip_norm=1.0),
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-6),
    )


def audited(plan: TrainingPlan, folder: Path) -> AuditResult:
    """30 guesses about 300 canaries: enough to refute epsilon 1, and fast."""
    random = np.random.default_rng(0)
    records = Records(
        records=tuple(
            Record(text=" ".join(random.choice(WORDS, 6)), label=index) for index in range(RECORDS)
        ),
        source=bytes(32),
    )
    noise = noise_for(plan, RECORDS)
    outcome = play(
        step_by_step(plan),
        folder,
        records,
        noise,
        canaries=300,
        seed=2,
        entropy=seeded(3, "audit"),
        physical_batch_size=256,
        progress=lambda step, steps: None,
    )
    return judge(outcome, plan, noise, scenario="test", site="site", records=records)


class WithoutClipping(PrivateOptimizer):
    """The same noise, and nothing clipped."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise: NoiseSource,
        *,
        noise_multiplier: float,
        clip_norm: float,
        **others: object,
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
            noise: NoiseSource,
            *,
            noise_multiplier: float,
            **others: object,
        ) -> None:
            shared = noise_multiplier / math.sqrt(sites)
            super().__init__(optimizer, noise, noise_multiplier=shared, **others)

    return Shared


def test_an_attack_on_sound_training_stays_below_the_claim(
    plan: TrainingPlan, folder: Path
) -> None:
    result = audited(plan, folder)
    assert result.claimed_epsilon == pytest.approx(1.0, rel=0.01)
    assert result.epsilon_lower_bound < result.claimed_epsilon < result.largest_bound


def test_the_audit_sees_that_nothing_is_clipped(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PrivateOptimizer", WithoutClipping)
    result = audited(plan, folder)
    assert result.epsilon_lower_bound > 2 * result.claimed_epsilon


def test_the_audit_sees_noise_that_is_shared_by_a_hundred_sites(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PrivateOptimizer", noise_shared_by(100))
    result = audited(plan, folder)
    assert result.epsilon_lower_bound > 2 * result.claimed_epsilon


def no_records() -> PreparedData:
    tokens = Tokens(ids=np.zeros(0, np.int32), starts=np.zeros(1, np.int64), pad_id=0)
    return PreparedData(tokens, np.zeros(0, np.int64), prefix=None)


def noise_alone(
    plan: TrainingPlan, folder: Path, noise: SiteNoise, rounds: int, entropy: Entropy
) -> np.ndarray:
    """What rounds without any record release, in units of the sum: float64[rounds, elements]."""
    model = AdaptedModel.load(folder, plan)
    start = np.zeros(plan.lora.size, dtype=np.float32)
    deltas = [
        train_round(
            model,
            no_records(),
            plan,
            1,
            start,
            noise.sampling_rate,
            noise.noise_multiplier,
            None,
            entropy=entropy,
            physical_batch_size=8,
            on_step=lambda step, steps: None,
        ).delta
        for _ in range(rounds)
    ]
    return np.stack(deltas).astype(np.float64) * plan.training.expected_batch_size


def test_noise_that_is_shared_by_four_sites_has_half_the_deviation_that_is_charged(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = noise_for(plan, RECORDS)
    sound = noise_alone(plan, folder, noise, 5, os.urandom)
    assert sound.std() == pytest.approx(noise.noise_multiplier, rel=0.05)
    monkeypatch.setattr(training, "PrivateOptimizer", noise_shared_by(4))
    shared = noise_alone(plan, folder, noise, 5, os.urandom)
    assert shared.std() == pytest.approx(noise.noise_multiplier / 2, rel=0.05)


def test_the_same_noise_twice_is_correlated_and_cancels(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = noise_for(plan, RECORDS)
    first, second = noise_alone(plan, folder, noise, 2, os.urandom)
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(len(first))
    monkeypatch.setattr(training, "NoiseSource", lambda entropy: NoiseSource(bytes))
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


def batches_of(plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The records in each of 80 steps at rate 1/4, by what is read from the data."""
    steps = 80
    longer = Training(rounds=1, local_steps=steps, expected_batch_size=5, optimizer=SGD)
    plan = TrainingPlan(
        **{**{name: getattr(plan, name) for name in plan.__struct_fields__}, "training": longer}
    )
    lengths = np.full(RECORDS, 4)
    tokens = Tokens(
        ids=np.arange(5, 5 + lengths.sum(), dtype=np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pad_id=0,
    )
    batches: list[set[int]] = [set()]
    read = PreparedData.batch

    def noting(self: PreparedData, indices: np.ndarray) -> object:
        batches[-1] |= set(indices.tolist())
        return read(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(PreparedData, "batch", noting)
        train_round(
            AdaptedModel.load(folder, plan),
            PreparedData(tokens, np.arange(RECORDS), prefix=None),
            plan,
            1,
            np.zeros(plan.lora.size, dtype=np.float32),
            0.25,
            1000.0,
            None,
            entropy=seeded(1, "batches"),
            physical_batch_size=3,
            on_step=lambda step, total: batches.append(set()),
        )
    return batches[:-1]


def test_shuffled_batches_are_all_of_one_size_and_poisson_batches_are_not(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisson = np.array([len(batch) for batch in batches_of(plan, folder, monkeypatch)])
    assert poisson.mean() == pytest.approx(RECORDS / 4, abs=1.0)
    assert poisson.var() == pytest.approx(RECORDS / 4 * (1 - 1 / 4), rel=0.5)
    monkeypatch.setattr(training, "NoiseSource", Shuffled)
    shuffled = np.array([len(batch) for batch in batches_of(plan, folder, monkeypatch)])
    assert shuffled.mean() == RECORDS / 4
    assert shuffled.var() == 0


def test_a_record_may_be_in_two_poisson_batches_in_a_row_and_never_in_two_of_an_epoch(
    plan: TrainingPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def together(batches: list[set[int]]) -> int:
        return sum(len(batches[n] & batches[n + 1]) for n in range(0, len(batches), 2))

    poisson = together(batches_of(plan, folder, monkeypatch))
    # Each of 20 records in both of 40 pairs of steps with probability 1/16.
    assert poisson == pytest.approx(50, abs=30)
    monkeypatch.setattr(training, "NoiseSource", Shuffled)
    assert together(batches_of(plan, folder, monkeypatch)) == 0


def releases_of_two_attempts(
    plan: TrainingPlan, folder: Path, path: Path, rounds: int = 2
) -> list[bytes]:
    """The different deltas of one round that the ledger lets a site release."""
    noise = noise_for(plan, RECORDS)
    assert noise.noise_multiplier is not None
    event = Event(noise.noise_multiplier, noise.sampling_rate, 1)
    released = []
    with Ledger.open(path, bytes(32)) as ledger:
        ledger.reserve("job", plan.digest(), 1, event, Budget(2.0, 1e-5))
        for delta in noise_alone(plan, folder, noise, rounds, os.urandom):
            name = digest("delta", delta.tobytes())
            try:
                ledger.computed("job", 1, name)
            except LedgerError:
                continue
            released.append(name)
    return released


def test_the_ledger_refuses_a_second_release_with_other_noise(
    plan: TrainingPlan, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(releases_of_two_attempts(plan, folder, tmp_path / "ledger.sqlite")) == 1
    monkeypatch.setattr(Ledger, "computed", lambda self, job, round_number, delta_digest: None)
    assert len(releases_of_two_attempts(plan, folder, tmp_path / "other.sqlite")) == 2
