"""A plan's file: people read what is signed."""

import os
from collections.abc import Callable

import msgspec
import pytest

from umbel_common.errors import PlanError, RemoteProtocolError
from umbel_common.plans.plan import Classification, NoPrivacy, ReleaseGate, Sgd, TrainingPlan
from umbel_common.plans.plan_file import plan_from_json, plan_lines, plan_to_json
from umbel_common.trust.identity import Identity, open_signed, sign

MakePlan = Callable[..., TrainingPlan]
OPERATOR = Identity.generate(os.urandom)


def test_a_plan_comes_back_from_its_file(make_plan: MakePlan) -> None:
    gate = ReleaseGate(holdout=bytes(range(32)), max_loss_increase=0.25)
    for plan in (make_plan(), make_plan(privacy=NoPrivacy()), make_plan(release_gate=gate)):
        assert plan_from_json(plan_to_json(plan), "plan.json") == (plan, None)


def test_a_signature_holds_over_what_stands_in_the_file(make_plan: MakePlan) -> None:
    plan = make_plan()
    text = plan_to_json(plan, sign(OPERATOR, plan).signature)
    read, signed = plan_from_json(text, "plan.json")
    assert signed is not None
    assert open_signed(signed, TrainingPlan, OPERATOR.public_key) == read == plan


def test_no_change_to_the_text_keeps_the_signature(make_plan: MakePlan) -> None:
    plan = make_plan()
    document = msgspec.json.decode(plan_to_json(plan, sign(OPERATOR, plan).signature))
    document["plan"]["training"]["rounds"] += 1
    changed, signed = plan_from_json(msgspec.json.encode(document).decode(), "plan.json")
    assert changed != plan
    assert signed is not None
    with pytest.raises(RemoteProtocolError) as caught:
        open_signed(signed, TrainingPlan, OPERATOR.public_key)
    assert caught.value.check == "pinned-signature"


def test_a_digest_is_readable(make_plan: MakePlan) -> None:
    assert f'"digest": "{"00" * 32}"' in plan_to_json(make_plan())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"digest": "', '"digest": "zz'),
        ('"rounds"', '"runds"'),
        ('"rank": 2', '"rank": 0'),
        ('"rank": 2', '"rank": 3'),
        ("{", "["),
        ('"plan"', '"plans"'),
        # Which of the two counts, readers of JSON do not agree on.
        ('"rounds": ', '"rounds": 9, "rounds": '),
        ('"plan"', '"plan": {}, "plan"'),
        ('"job"', '"jo\\u0062": "x", "job"'),
    ],
)
def test_a_malformed_file_is_refused_by_its_name(make_plan: MakePlan, old: str, new: str) -> None:
    text = plan_to_json(make_plan())
    assert old in text
    with pytest.raises(PlanError):
        plan_from_json(text.replace(old, new, 1), "plan.json")


@pytest.mark.parametrize("signature", ["00", "zz" * 64, 5])
def test_a_malformed_signature_is_refused(make_plan: MakePlan, signature: object) -> None:
    document = msgspec.json.decode(plan_to_json(make_plan())) | {"signature": signature}
    with pytest.raises(PlanError, match=r"plan\.json"):
        plan_from_json(msgspec.json.encode(document).decode(), "plan.json")


def test_a_person_reads_what_matters(make_plan: MakePlan) -> None:
    plan = make_plan()
    text = "\n".join(f"{name} {value}" for name, value in plan_lines(plan))
    for part in (plan.job, plan.digest().hex(), "epsilon 8", "rank 2 on query", "at least 2 sites"):
        assert part in text
    bare = make_plan(
        privacy=NoPrivacy(),
        training=msgspec.structs.replace(
            plan.training, optimizer=Sgd(adapter_learning_rate=0.1, head_learning_rate=0.1)
        ),
    )
    assert "NONE" in dict(plan_lines(bare))["privacy"]
    gated = make_plan(release_gate=ReleaseGate(holdout=bytes(32), max_loss_increase=0.25))
    assert "rises by 0.25 at most" in dict(plan_lines(gated))["released"]


@pytest.mark.parametrize(("count", "named"), [(2, 2), (10, 10), (77, 10)])
def test_many_labels_hide_nothing_else(make_plan: MakePlan, count: int, named: int) -> None:
    """The promise stands above them, and they are all shown to whoever asks."""
    labels = tuple(f"label-{number}" for number in range(count))
    plan = make_plan(task=Classification(labels=labels))
    text = "\n".join(f"{name} {value}" for name, value in plan_lines(plan))
    assert text.index("epsilon 8") < text.index(f"{count} labels")
    assert text.count("label-") == named
    assert (f"and {count - named} more" in text) == (count > named)
    whole = [value for _, value in plan_lines(plan, labels=True)]
    assert [value for value in whole if value.startswith("label-")] == list(labels)
