"""Counts travel at the end of a masked vector and come back as their sum."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from umbel_common.adapters.site_counts import SiteCounts, counts_of, with_counts
from umbel_common.errors import PlanError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import (
    Aggregation,
    FederatedEvaluation,
    TrainingPlan,
    standard_deviation,
)
from umbel_common.secagg.encoding import add_mean, encode, encoding_of

MakePlan = Callable[..., TrainingPlan]
EVALUATION = FederatedEvaluation(noise_multiplier=2.0, max_records=5000)


def scored(plan: TrainingPlan) -> TrainingPlan:
    return msgspec.structs.replace(plan, evaluation=EVALUATION)


def test_the_sum_of_counts_comes_back(make_plan: MakePlan) -> None:
    plan = scored(make_plan())
    delta = np.linspace(-0.5, 0.5, make_plan().vector_length(1), dtype=np.float32)
    sites = [SiteCounts(812.4, 1003.1), SiteCounts(-2.5, 40.25), SiteCounts(77.0, 99.5)]
    encoding = encoding_of(plan, len(sites))
    vectors = [with_counts(delta, counts, plan) for counts in sites]
    assert all(len(vector) == plan.vector_length(1) == len(delta) + 2 for vector in vectors)
    total = sum(encode(vector, 1, encoding, np.random.default_rng(1).bytes) for vector in vectors)
    mean, shares = np.zeros_like(delta), np.zeros(2, dtype=np.float32)
    add_mean(total, encoding, [mean, shares])
    assert mean == pytest.approx(delta, abs=1e-5)
    found = counts_of(shares, plan.aggregation, EVALUATION, len(sites))
    # A step of 1e-6 of the clip range is 0.005 records at each site.
    assert found.records == pytest.approx(1142.85, abs=0.05)
    assert found.score == pytest.approx(886.9, abs=0.05)
    assert found.mean() == pytest.approx(0.776, abs=1e-3)


def test_more_records_than_the_plan_knows_count_as_so_many(make_plan: MakePlan) -> None:
    plan = scored(make_plan())
    vector = with_counts(np.zeros(3, np.float32), SiteCounts(9000.0, 10_000.0), plan)
    encoding = encoding_of(plan, 2)
    shares = np.zeros(2, dtype=np.float32)
    total = encode(vector, 1, encoding, np.random.default_rng(1).bytes)
    add_mean(total, encoding, [np.zeros(3, np.float32), shares])
    found = counts_of(shares, plan.aggregation, EVALUATION, 1)
    assert found.records == pytest.approx(5000, abs=0.05)


def test_noise_grows_with_the_root_of_the_sites() -> None:
    assert standard_deviation(EVALUATION) == pytest.approx(2 * 2**0.5)
    assert standard_deviation(EVALUATION, 9) == pytest.approx(3 * standard_deviation(EVALUATION))


def test_no_mean_of_noise_alone() -> None:
    assert SiteCounts(1.5, 0.2).mean() is None
    assert SiteCounts(1.5, -3.0).mean() is None


def test_weights_would_weigh_counts(make_plan: MakePlan) -> None:
    aggregation = Aggregation(
        threshold=2, clip_range=1.0, step=1e-6, weights="size-class", max_weight=4
    )
    plan = msgspec.structs.replace(scored(make_plan()), aggregation=aggregation)
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert caught.value.field == "aggregation.weights"
