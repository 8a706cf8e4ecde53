"""A start that its operator made, and what keeps each kind of start from being planted.

With weights in the millions, an adapter turns the last bit of a record into a whole gradient. A
round can only move an adapter by its clip range, but a start could be anything.
"""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from adversarial.federation import Federation

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.label_names import label_rows
from umbel_common.adapters.start import LABEL_ROWS, start_from_rows
from umbel_common.adapters.vector import (
    Vector,
    adapter_digest,
    start_digest,
    to_bytes,
    unflatten,
)
from umbel_common.plans.plan import TrainingPlan, second_version
from umbel_common.plans.start import LabelNamesStart, ReleasedStart, Start
from umbel_common.plans.statements import Release, with_sum
from umbel_common.protocol.wire import OfferRequest, TrainRequest
from umbel_common.trust.identity import sign

Open = Callable[..., Federation]
SITE = "site-00"
NAMES = ("w1 w2", "w30 w31")
POLICY = {"*": 'starts = ["label-names", "released"]'}
LARGEST = 8.0


@pytest.fixture
def sites(open_federation: Open) -> Federation:
    """Sites that allow each kind of start, but no adapter that they do not have."""
    return open_federation(policies=POLICY)


def named(tensor: bytes) -> LabelNamesStart:
    return LabelNamesStart(tensor=tensor, names=NAMES, scale=1.0, tolerance=0.01)


def honest_rows(federation: Federation) -> Vector:
    plan = second_version(federation.plan, start=named(bytes(32)))
    model = AdaptedModel.load(federation.model, plan)
    return label_rows(model, federation.model, plan, NAMES, scale=1.0)


def from_rows(federation: Federation, rows: Vector) -> tuple[TrainingPlan, Vector]:
    """A plan that starts from a head with these rows, and its start."""
    vector = start_from_rows(federation.plan, rows)
    return second_version(federation.plan, start=named(start_digest(vector))), vector


def offer(federation: Federation, plan: TrainingPlan, *sites: str) -> None:
    federation.plan = plan
    for site in sites or (SITE,):
        federation.ask(site, OfferRequest(plan=sign(federation.operator, plan)))


def train(federation: Federation, vector: Vector, number: int = 1) -> None:
    """Asks a site to train round `number` from an adapter."""
    plan = federation.plan
    digest = adapter_digest(plan.digest(), vector)
    release = Release(
        federation=plan.federation,
        job=plan.job,
        plan=plan.digest(),
        round=number - 1,
        attempt=number - 1,
        context=bytes(32),
        adapter=digest,
        survivors=(),
        total_weight=0,
    )
    header = federation.header(round=number, adapter=digest)
    request = TrainRequest(
        header=sign(federation.operator, header),
        release=sign(federation.operator, with_sum(release, bytes(32))),
        adapter=to_bytes(vector),
    )
    federation.ask(SITE, request)
    assert federation.spent_rounds(SITE) == 1


def test_a_site_trains_from_the_head_that_it_computes_itself(sites: Federation) -> None:
    plan, vector = from_rows(sites, honest_rows(sites))
    offer(sites, plan)
    train(sites, vector)


def test_a_site_computes_the_head_again_after_a_restart(sites: Federation) -> None:
    plan, vector = from_rows(sites, honest_rows(sites))
    offer(sites, plan)
    sites.start(SITE)
    train(sites, vector)


@pytest.mark.attack("adapter-too-far")
def test_a_head_of_other_texts_than_the_plan_says(sites: Federation) -> None:
    plan, vector = from_rows(sites, honest_rows(sites)[::-1])
    offer(sites, plan)
    train(sites, vector)


@pytest.mark.attack("start-norm", "adapter-too-far")
def test_a_head_with_weights_in_the_millions(sites: Federation) -> None:
    plan, vector = from_rows(sites, 1e6 * honest_rows(sites))
    offer(sites, plan)
    train(sites, vector)


@pytest.mark.full
@pytest.mark.attack("initial-adapter", "adapter-too-far")
def test_matrices_below_an_honest_head_that_are_not_the_seeds(sites: Federation) -> None:
    vector = start_from_rows(sites.plan, honest_rows(sites))
    for tensor, values in zip(
        sites.plan.lora.tensors, unflatten(vector, sites.plan.lora.tensors).values(), strict=True
    ):
        if tensor.role == "lora_B":
            values[...] = 50.0
    offer(sites, second_version(sites.plan, start=named(start_digest(vector))))
    train(sites, vector)


@pytest.mark.attack("initial-adapter")
def test_an_honest_head_that_the_plan_does_not_name(sites: Federation) -> None:
    """Within the tolerance each site could be shown another start: masks would not cancel."""
    rows = honest_rows(sites)
    plan, _ = from_rows(sites, rows)
    offer(sites, plan)
    turned = rows + np.float32(1e-4)
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    train(sites, start_from_rows(sites.plan, turned))


@pytest.mark.full
@pytest.mark.attack("start-not-allowed")
def test_a_kind_of_start_that_no_policy_names(open_federation: Open) -> None:
    federation = open_federation()
    plan, vector = from_rows(federation, honest_rows(federation))
    offer(federation, plan)
    train(federation, vector)


@pytest.mark.full
@pytest.mark.attack("start-scale-too-large")
def test_a_long_head_that_the_plan_admits(sites: Federation) -> None:
    vector = start_from_rows(sites.plan, 1e4 * honest_rows(sites))
    start = msgspec.structs.replace(named(start_digest(vector)), scale=1e4)
    offer(sites, second_version(sites.plan, start=start))
    train(sites, vector)


@pytest.mark.full
@pytest.mark.attack("start-tolerance-too-large")
def test_a_tolerance_that_fits_any_machine(sites: Federation) -> None:
    rows = honest_rows(sites)
    other = rows.copy()
    other[:, 0] += 0.05
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    vector = start_from_rows(sites.plan, other)
    start = msgspec.structs.replace(named(start_digest(vector)), tolerance=0.1)
    offer(sites, second_version(sites.plan, start=start))
    train(sites, vector)


def never_released(federation: Federation, size: float) -> tuple[ReleasedStart, Vector]:
    """An adapter that its operator made up, as if a job had released it."""
    vector = start_from_rows(federation.plan, size * np.ones((2, 16), dtype=np.float32))
    start = ReleasedStart(
        adapter=adapter_digest(bytes(32), vector), plan=bytes(32), round=1, largest_norm=LARGEST
    )
    return start, vector


def planned(federation: Federation, start: Start) -> TrainingPlan:
    return second_version(federation.plan, start=start)


@pytest.mark.attack("start-unknown")
def test_an_earlier_adapter_that_nobody_ever_released(sites: Federation) -> None:
    start, vector = never_released(sites, 0.1)
    offer(sites, planned(sites, start))
    train(sites, vector)


ALLOWING = {"*": f'starts = ["released"]\nmax_unknown_start_norm = {LARGEST}'}


@pytest.mark.attack("start-norm", "adapter-too-far")
def test_an_unknown_adapter_that_is_longer_than_the_plan_says(open_federation: Open) -> None:
    federation = open_federation(policies=ALLOWING)
    start, vector = never_released(federation, 50.0)
    offer(federation, planned(federation, start))
    train(federation, vector)


@pytest.mark.attack("adapter-too-far")
def test_a_site_that_was_left_out_of_round_one_is_shown_anything(open_federation: Open) -> None:
    """It never saw the start, and knows only how long that may have been."""
    federation = open_federation(policies=ALLOWING)
    start, _ = never_released(federation, 0.1)
    offer(federation, planned(federation, start))
    _, vector = never_released(federation, 50.0)
    train(federation, vector, number=2)


def test_what_a_round_leads_to_from_an_unknown_start_is_trained(open_federation: Open) -> None:
    federation = open_federation(policies=ALLOWING)
    start, vector = never_released(federation, 0.1)
    offer(federation, planned(federation, start))
    unflatten(vector, federation.plan.lora.tensors)[LABEL_ROWS][...] += 0.99
    train(federation, vector, number=2)


@pytest.mark.full
@pytest.mark.attack("start-unknown")
def test_an_unknown_adapter_that_is_longer_than_the_policy_says(open_federation: Open) -> None:
    federation = open_federation(policies=ALLOWING)
    start, vector = never_released(federation, 0.1)
    start = msgspec.structs.replace(start, largest_norm=LARGEST + 1)
    offer(federation, planned(federation, start))
    train(federation, vector)
