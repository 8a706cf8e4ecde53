from collections.abc import Callable

import msgspec
import pytest

from umbel_common.canonical import decode_canonical, encode
from umbel_common.errors import PlanError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import (
    PLAN_VERSIONS,
    Adam,
    Aggregation,
    Classification,
    LocalPrivacy,
    Lora,
    NoPrivacy,
    Sgd,
    Training,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.server_optimizer import Schedule, ServerSgd

MakePlan = Callable[..., TrainingPlan]


def test_a_plan_survives_its_encoding(make_plan: MakePlan) -> None:
    plan = make_plan(privacy=NoPrivacy())
    assert decode_canonical(encode(plan), PLAN_VERSIONS) == plan
    assert msgspec.json.decode(msgspec.json.encode(plan), type=TrainingPlan) == plan


def test_any_change_changes_the_digest(make_plan: MakePlan) -> None:
    assert make_plan().digest() == make_plan().digest()
    assert make_plan().digest() != make_plan(job="other").digest()
    assert make_plan().digest() != make_plan(privacy=NoPrivacy()).digest()


def test_an_unknown_field_is_refused(make_plan: MakePlan) -> None:
    fields = msgspec.to_builtins(make_plan())
    fields["surprise"] = 1
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.convert(fields, TrainingPlan)


@pytest.mark.parametrize("weights", ["equal", "size-class"])
def test_public_weights_go_with_privacy(make_plan: MakePlan, weights: str) -> None:
    aggregation = Aggregation(threshold=2, clip_range=1.0, step=1e-6, weights=weights)  # type: ignore[arg-type]  # parametrised
    check_plan(make_plan(aggregation=aggregation))


def test_exact_counts_are_refused_with_privacy_and_allowed_without(make_plan: MakePlan) -> None:
    aggregation = Aggregation(
        threshold=2, clip_range=1.0, step=1e-3, weights="examples", max_weight=1000
    )
    with pytest.raises(PlanError, match=r"aggregation\.weights"):
        check_plan(make_plan(aggregation=aggregation))
    check_plan(make_plan(aggregation=aggregation, privacy=NoPrivacy()))


def test_equal_weights_are_one(make_plan: MakePlan) -> None:
    aggregation = Aggregation(threshold=2, clip_range=1.0, step=1e-6, max_weight=2)
    with pytest.raises(PlanError, match="max_weight"):
        check_plan(make_plan(aggregation=aggregation))


def test_noise_is_subtracted_from_adams_moments_only_where_there_is_some(
    make_plan: MakePlan,
) -> None:
    def with_adam(unbiased: bool) -> Training:
        adam = Adam(adapter_learning_rate=1e-3, head_learning_rate=1e-2, unbiased=unbiased)
        return msgspec.structs.replace(make_plan().training, optimizer=adam)

    check_plan(make_plan(training=with_adam(True)))
    check_plan(make_plan(training=with_adam(False), privacy=NoPrivacy()))
    with pytest.raises(PlanError) as caught:
        check_plan(make_plan(training=with_adam(True), privacy=NoPrivacy()))
    assert caught.value.field == "training.optimizer.unbiased"


def test_what_is_new_in_a_plan_is_off_unless_it_is_asked_for(make_plan: MakePlan) -> None:
    plan = make_plan()
    assert isinstance(plan.privacy, LocalPrivacy)
    assert isinstance(plan.training.optimizer, Adam)
    assert plan.privacy.clipping == "flat"
    assert not plan.training.optimizer.unbiased
    assert plan.training.average_decay is None


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("privacy", "clipping", "ghost"),
        ("training", "average_decay", 1.0),
        ("training", "average_decay", 0.0),
        ("training", "average_decay", -0.5),
    ],
)
def test_a_value_that_a_plan_cannot_have_is_refused(
    make_plan: MakePlan, part: str, field: str, value: object
) -> None:
    fields = msgspec.to_builtins(make_plan())
    fields[part][field] = value
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert(fields, TrainingPlan)


def test_tensors_are_named_once(make_plan: MakePlan) -> None:
    lora = make_plan().lora
    fields = {name: getattr(lora, name) for name in lora.__struct_fields__}
    for tensors in ((), (lora.tensors[0], lora.tensors[0])):
        with pytest.raises(PlanError, match=r"lora\.tensors"):
            check_plan(make_plan(lora=Lora(**{**fields, "tensors": tensors})))


@pytest.mark.parametrize(
    ("method", "role"), [("ffa", "lora_A"), ("alternate", "lora_A"), ("alternate", "lora_B")]
)
def test_each_round_trains_something(make_plan2: MakePlan, method: str, role: str) -> None:
    """A sum of no coordinates has no bound: its logarithm would end a check as a crash."""
    plan = make_plan2(method=method)
    check_plan(plan)
    tensors = tuple(tensor for tensor in plan.lora.tensors if tensor.role == role)
    plan = msgspec.structs.replace(plan, lora=msgspec.structs.replace(plan.lora, tensors=tensors))
    with pytest.raises(PlanError, match="a round trains nothing"):
        check_plan(plan)


def test_labels_are_at_least_two_different_ones() -> None:
    for labels in (("a",), ("a", "a")):
        with pytest.raises(ValueError, match="labels"):
            Classification(labels=labels)


def test_learning_rates_fall_linearly_over_the_whole_job() -> None:
    training = Training(
        rounds=2,
        local_steps=3,
        expected_batch_size=1,
        optimizer=Sgd(adapter_learning_rate=1.0, head_learning_rate=1.0),
        final_learning_rate=0.5,
    )
    factors = [training.learning_rate_factor(step) for step in range(training.steps)]
    assert factors == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])


def test_a_warm_up_ends_before_the_job(make_plan2: MakePlan) -> None:
    def plan(warmup: int) -> TrainingPlan:
        schedule = Schedule(warmup_rounds=warmup)
        return make_plan2(server=ServerSgd(adapter_learning_rate=0.1, schedule=schedule))

    check_plan(plan(2))
    with pytest.raises(PlanError, match=r"server\.schedule\.warmup_rounds"):
        check_plan(plan(3))


def test_the_first_version_of_a_plan_names_nothing_of_the_second(make_plan: MakePlan) -> None:
    lora = msgspec.structs.replace(make_plan().lora, method="fedsvd")
    plan = make_plan(lora=lora)
    with pytest.raises(PlanError, match=r"lora\.method"):
        check_plan(plan)
    check_plan(second_version(plan))


def test_the_second_version_keeps_every_part(make_plan: MakePlan) -> None:
    plan = make_plan()
    later = second_version(plan)
    assert later.digest() != plan.digest()
    assert (later.start, later.server) == (plan.start, plan.server)
    assert decode_canonical(encode(later), PLAN_VERSIONS) == later
    first = msgspec.to_builtins(plan) | {"version": 2}
    found = msgspec.to_builtins(later)
    assert found.pop("start") == {"start": "seed"}
    assert found.pop("server") == {"optimizer": "average"}
    assert found["lora"].pop("adapter") == "lora"
    assert found == first
