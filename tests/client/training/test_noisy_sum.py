"""A site's attempt in distributed mode: its exact sum, its share of the noise, and nothing else."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.shared_noise_plans import NOISE_BITS, shared_noise_plan
from support.small_models import one_round, plan_for

from umbel_client.data.tokens import Tokens
from umbel_client.data.units import Units
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.privacy.accounting import calibrate
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.privacy.discrete_gaussian import DiscreteGaussian
from umbel_client.privacy.noise import NoiseSource
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training import round as round_module
from umbel_client.training.round import LocalTrainer
from umbel_common.errors import PlanError
from umbel_common.plans.plan import Classification, LocalPrivacy, TrainingPlan, levels

torch.set_num_threads(1)

Sums = npt.NDArray[np.int64]
OWNERS = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6])
"""The unit of each of twelve records."""
HUGE = 1000.0


class Keys:
    """Entropy that is the same for the same name, and keeps the keys that it gave."""

    def __init__(self, name: str) -> None:
        self.given: list[bytes] = []
        self._name = name

    def __call__(self, size: int) -> bytes:
        self.given.append(
            hashlib.shake_256(f"{self._name} {len(self.given)}".encode()).digest(size)
        )
        return self.given[-1]


def plan_of(
    folder: Path, *, clip_range: float = HUGE, rank: int = 2, **settings: Any
) -> TrainingPlan:
    """A plan whose batches have every record, unless it says another sampling rate."""
    task = Classification(labels=("a", "b", "c"))
    plan = shared_noise_plan(
        plan_for(folder, task, {"rank": rank}, training=one_round(8)),
        **{"sampling_rate": 1.0, "attempts": 4, **settings},
    )
    aggregation = msgspec.structs.replace(plan.aggregation, clip_range=clip_range)
    return msgspec.structs.replace(plan, aggregation=aggregation)


@pytest.fixture(scope="module")
def plan(tiny_model: Path) -> TrainingPlan:
    return plan_of(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model: Path, plan: TrainingPlan) -> AdaptedModel:
    return AdaptedModel.load(tiny_model, plan)


def at_rate(plan: TrainingPlan, rate: float) -> TrainingPlan:
    """The same noise at another sampling rate, whatever that promises."""
    privacy = msgspec.structs.replace(plan.privacy, sampling_rate=rate)
    return msgspec.structs.replace(plan, privacy=privacy)


def start_of(plan: TrainingPlan) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 0.3, plan.lora.size).astype(np.float32)


def records_of(chosen: npt.NDArray[np.int64], *, owners: bool = False) -> PreparedData:
    """Some of twelve records of several lengths; with `owners`, each is of a unit."""
    random = np.random.default_rng(1)
    texts = [random.integers(5, 40, 2 + number % 5) for number in range(len(OWNERS))]
    labels = random.integers(0, 3, len(OWNERS))
    parts = [texts[number] for number in chosen]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    ids = np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int32)
    units = Units(np.unique(OWNERS[chosen], return_inverse=True)[1]) if owners else None
    return PreparedData(
        Tokens(ids, starts.astype(np.int64), pad_id=0), labels[chosen], prefix=None, units=units
    )


def trainer_of(
    model: AdaptedModel,
    plan: TrainingPlan,
    data: PreparedData,
    entropy: Callable[[int], bytes],
    *,
    noise: SiteNoise | None = None,
) -> LocalTrainer:
    model.follow(plan)
    return LocalTrainer(model, data, noise or SiteNoise(1.0, 1.0), entropy, BatchLimit(4))


def parts_of(
    model: AdaptedModel, plan: TrainingPlan, data: PreparedData, name: str
) -> tuple[Sums, Sums]:
    """What a site sends, without its noise, and the noise: its second key draws it."""
    entropy = Keys(name)
    sent = trainer_of(model, plan, data, entropy).noisy_sum(1, start_of(plan))
    batch_key, noise_key = entropy.given
    assert batch_key != noise_key
    source = NoiseSource(lambda size: noise_key)
    noise = DiscreteGaussian(source, plan.privacy.noise_bits).draw(sent.size)
    return sent - noise, noise


EVERY = np.arange(len(OWNERS))


@pytest.mark.parametrize("owners", [False, True], ids=["records", "units"])
def test_the_sums_of_sites_are_the_sum_of_one_site_with_all_their_records(
    model: AdaptedModel, plan: TrainingPlan, owners: bool
) -> None:
    whole, _ = parts_of(model, plan, records_of(EVERY, owners=owners), "one")
    # All records of a unit are at one site.
    shares = [np.flatnonzero(np.isin(OWNERS, own)) for own in ((0, 3), (1, 5, 6), (2, 4))]
    sites = [
        parts_of(model, plan, records_of(share, owners=owners), f"site {number}")[0]
        for number, share in enumerate(shares)
    ]
    assert np.array_equal(sum(sites), whole)
    assert np.abs(whole).max() > 1000
    # A mean over a unit's records is not the sum over them.
    if owners:
        assert not np.array_equal(whole, parts_of(model, plan, records_of(EVERY), "other")[0])


def test_the_noise_of_a_sum_is_that_of_central_training_with_the_claimed_multiplier(
    tiny_model: Path,
) -> None:
    plan = plan_of(tiny_model, rank=16)
    model = AdaptedModel.load(tiny_model, plan)
    survivors, honest = 4, plan.privacy.honest
    nobody = records_of(EVERY[:0])
    drawn = []
    for attempt in range(30):
        start = start_of(plan)
        sites = [
            trainer_of(model, plan, nobody, Keys(f"{site} {attempt}")).noisy_sum(1, start)
            for site in range(survivors)
        ]
        drawn.append(sum(sites))
    found = np.concatenate(drawn).astype(np.float64)
    assert found.size > 60_000
    deviation = math.sqrt(np.mean(found**2))
    assert deviation == pytest.approx(2.0**NOISE_BITS * math.sqrt(survivors), rel=0.01)
    multiplier = calibrate(plan.privacy.epsilon, plan.privacy.delta, 1.0, 4)
    claimed = multiplier * plan.privacy.clip_norm * math.sqrt(survivors / honest)
    assert deviation * plan.aggregation.step == pytest.approx(claimed, rel=0.01)


def test_coordinates_are_clipped_before_the_noise_and_never_after(
    model: AdaptedModel, plan: TrainingPlan, tiny_model: Path
) -> None:
    """A clipped noisy value tells how far the sum was beyond it; and what the noise brought past
    the range is what hides the rest."""
    narrow = plan_of(tiny_model, clip_range=0.05)
    most = levels(0.05, narrow.aggregation.step)
    data = records_of(EVERY)
    wide, _ = parts_of(model, plan, data, "same")
    found, noise = parts_of(model, narrow, data, "same")
    assert np.array_equal(found, np.clip(wide, -most, most))
    assert (np.abs(wide) > most).any()
    assert (np.abs(found + noise) > most).mean() > 0.5


def test_a_batch_is_drawn_at_the_plans_rate_whatever_size_a_site_states(
    model: AdaptedModel, plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = at_rate(plan, 0.3)
    asked = []
    draw = NoiseSource.poisson_batch

    def noting(self: NoiseSource, records: int, rate: float) -> npt.NDArray[np.int64]:
        asked.append((records, rate))
        return draw(self, records, rate)

    monkeypatch.setattr(NoiseSource, "poisson_batch", noting)
    sent = [
        trainer_of(
            model, plan, records_of(EVERY), Keys("same"), noise=SiteNoise(stated, 1.0)
        ).noisy_sum(1, start_of(plan))
        for stated in (0.03, 0.3, 1.0)
    ]
    assert asked == [(len(OWNERS), 0.3)] * 3
    assert np.array_equal(sent[0], sent[1])
    assert np.array_equal(sent[1], sent[2])


def test_another_attempt_draws_another_batch_and_other_noise(
    model: AdaptedModel, plan: TrainingPlan
) -> None:
    plan = at_rate(plan, 0.5)
    entropy = Keys("one process")
    trainer = trainer_of(model, plan, records_of(EVERY), entropy)
    for _ in range(2):
        trainer.noisy_sum(1, start_of(plan))
    assert len(entropy.given) == len(set(entropy.given)) == 4
    batches = [
        NoiseSource(lambda size, key=key: key).poisson_batch(len(OWNERS), 0.5)
        for key in entropy.given[::2]
    ]
    assert not np.array_equal(*batches)


def test_an_empty_batch_is_noise_alone(model: AdaptedModel, plan: TrainingPlan) -> None:
    found, noise = parts_of(model, plan, records_of(EVERY[:0]), "nobody")
    assert not found.any()
    assert noise.any()


def test_a_plan_of_local_mode_sends_no_sum(model: AdaptedModel, tiny_model: Path) -> None:
    plan = msgspec.structs.replace(
        plan_of(tiny_model), privacy=LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0)
    )
    with pytest.raises(PlanError, match="do not share their noise"):
        trainer_of(model, plan, records_of(EVERY), Keys("local")).noisy_sum(1, start_of(plan))


@pytest.mark.parametrize("held", [True, False], ids=["clipped before", "clipped after"])
def test_noise_that_is_clipped_shows_what_the_range_cuts(
    model: AdaptedModel, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """The attack on a site that clips its noisy vector as local mode clips its delta."""
    narrow = plan_of(tiny_model, clip_range=0.05)
    most = levels(0.05, narrow.aggregation.step)
    if not held:
        clip = np.clip

        class Clipped(DiscreteGaussian):
            def draw(self, size: int) -> Sums:
                return clip(super().draw(size), -most, most)

        monkeypatch.setattr(round_module, "DiscreteGaussian", Clipped)
    nobody = trainer_of(model, narrow, records_of(EVERY[:0]), Keys("x"))
    sent = nobody.noisy_sum(1, start_of(narrow)).astype(np.float64)
    deviation = math.sqrt(np.mean(sent**2)) / 2.0**NOISE_BITS
    assert (deviation > 0.9) == held
