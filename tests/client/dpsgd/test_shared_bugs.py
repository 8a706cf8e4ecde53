"""Bugs that end the privacy of distributed mode, each put in on purpose and caught."""

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from support.shared_noise_plans import shared_noise_plan
from support.small_models import one_round, plan_for, save_telling_bert

import umbel_client.training.round
from umbel_client.privacy.discrete_gaussian import DiscreteGaussian
from umbel_client.privacy.noise import NoiseSource
from umbel_common.plans.plan import Classification, TrainingPlan
from umbel_simulations.audit.canaries import site_records
from umbel_simulations.audit.one_run import AuditResult, claimed_noise, judge, play_shared
from umbel_simulations.backends.in_process import seeded
from umbel_simulations.inputs.sources import Example

WORDS = [f"w{index}" for index in range(1000)]
RECORDS = 20
HONEST = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_telling_bert(tmp_path_factory.mktemp("model"), WORDS)


def plan_of(
    folder: Path, *, honest: int, rate: float, attempts: int, rank: int = 2
) -> TrainingPlan:
    """A claim of epsilon 1 against readers of the sums."""
    plan = plan_for(
        folder,
        # Gradients before clipping are as long as the factor on the logits.
        Classification(labels=tuple(f"label {n}" for n in range(20)), logit_scale=1000.0),
        {"rank": rank},
        training=one_round(RECORDS),
    )
    plan = shared_noise_plan(
        plan,
        honest=honest,
        least_survivors=honest,
        sampling_rate=rate,
        attempts=attempts,
    )
    aggregation = msgspec.structs.replace(plan.aggregation, clip_range=1000.0)
    return msgspec.structs.replace(plan, aggregation=aggregation)


def audited(
    folder: Path,
    plan: TrainingPlan,
    *,
    vectors: int | None = None,
    canaries: int = 300,
    share_of_guesses: float = 0.1,
    of_the_mean: bool = False,
) -> AuditResult:
    """What an attack on the sums shows, with the noise of so many sites in each: the plan's
    `honest`, unless the test says another number."""
    random = np.random.default_rng(0)
    examples = [
        Example(text=" ".join(random.choice(WORDS, 6)), label=plan.task.labels[number % 20])
        for number in range(RECORDS)
    ]
    records = site_records(examples, plan.task, "record")
    privacy: Any = plan.privacy
    outcome = play_shared(
        plan,
        folder,
        records,
        vectors=vectors or privacy.honest,
        canaries=canaries,
        seed=2,
        entropy=seeded(3, "audit"),
        physical_batch_size=256,
        on_round=lambda done, attempts: None,
        of_the_mean=of_the_mean,
    )
    return judge(
        outcome,
        plan,
        claimed_noise(plan),
        scenario="test",
        site="site",
        records=records,
        share_of_guesses=share_of_guesses,
    )


@pytest.fixture(scope="module")
def plan(folder: Path) -> TrainingPlan:
    return plan_of(folder, honest=HONEST, rate=1.0, attempts=2)


def test_an_attack_on_the_sums_of_honest_sites_stays_below_the_claim(
    folder: Path, plan: TrainingPlan
) -> None:
    result = audited(folder, plan)
    assert result.claimed_epsilon == pytest.approx(1.0, rel=0.01)
    assert result.epsilon_lower_bound < result.claimed_epsilon < result.largest_bound


def test_the_audit_sees_sums_below_the_floor(folder: Path, plan: TrainingPlan) -> None:
    """The server opened a sum in which one site's noise is left of 64 that were promised."""
    result = audited(folder, plan, vectors=1)
    assert result.epsilon_lower_bound > 1.2 * result.claimed_epsilon


def with_fewer_bits(fewer: int) -> Any:
    return lambda source, bits: DiscreteGaussian(source, bits - fewer)


def test_the_audit_sees_noise_that_is_shared_by_more_sites_than_are_honest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 128 sites adds an eighth of the noise that two honest ones need."""
    monkeypatch.setattr(umbel_client.training.round, "DiscreteGaussian", with_fewer_bits(3))
    result = audited(folder, plan_of(folder, honest=2, rate=1.0, attempts=2))
    assert result.epsilon_lower_bound > 1.2 * result.claimed_epsilon


class Silent(DiscreteGaussian):
    """Noise of a site that adds none."""

    def draw(self, size: int) -> npt.NDArray[np.int64]:
        return np.zeros(size, dtype=np.int64)


def test_the_audit_sees_a_site_that_adds_no_noise_where_no_other_is_honest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two honest sites one still hides much: the deviation of the sum tells (below)."""
    monkeypatch.setattr(umbel_client.training.round, "DiscreteGaussian", Silent)
    result = audited(folder, plan_of(folder, honest=1, rate=1.0, attempts=2))
    assert result.correct == result.guesses
    assert result.epsilon_lower_bound == result.largest_bound > 2 * result.claimed_epsilon


class KeptBatch(NoiseSource):
    """Draws a batch once for each data set, and new noise for each attempt."""

    kept: dict[int, npt.NDArray[np.int64]]

    def poisson_batch(self, records: int, rate: float) -> npt.NDArray[np.int64]:
        if records not in self.kept:
            self.kept[records] = super().poisson_batch(records, rate)
        return self.kept[records]


@pytest.mark.full
@pytest.mark.parametrize("kept", [False, True], ids=["drawn", "kept"])
def test_the_audit_of_the_mean_sees_a_batch_that_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Its noise averages out, and those in the batch show."""
    if kept:
        monkeypatch.setattr(KeptBatch, "kept", {}, raising=False)
        monkeypatch.setattr(umbel_client.training.round, "NoiseSource", KeptBatch)
    plan = plan_of(folder, honest=2, rate=0.04, attempts=100, rank=16)
    result = audited(folder, plan, canaries=1500, share_of_guesses=0.018, of_the_mean=True)
    assert result.claimed_epsilon == pytest.approx(1.0, rel=0.01)
    assert (result.epsilon_lower_bound > 1.2 * result.claimed_epsilon) == kept


@pytest.mark.parametrize(
    ("silent", "vectors", "fewer"),
    [(0, 4, 0), (1, 4, 0), (0, 3, 0), (0, 4, 1)],
    ids=["sound", "one is silent", "below the floor", "half of the noise"],
)
def test_the_deviation_of_a_sum_without_records_is_that_of_the_claim(
    silent: int, vectors: int, fewer: int
) -> None:
    """What an audit cannot show, for one site of four, the noise alone does."""
    bits, count = 12, 60_000
    source = NoiseSource(seeded(1, "sum"))
    sites = [DiscreteGaussian(source, bits - fewer) for _ in range(vectors)]
    total = np.sum([site.draw(count) for site in sites[silent:]], axis=0)
    found = math.sqrt(np.mean(total.astype(np.float64) ** 2)) / (2.0**bits * math.sqrt(4))
    assert (found == pytest.approx(1.0, rel=0.01)) == ((silent, vectors, fewer) == (0, 4, 0))
