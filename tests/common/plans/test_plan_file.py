"""A plan's file: people read what is signed."""

import os
from collections.abc import Callable

import msgspec
import pytest

from umbel_common.errors import PlanError, RemoteProtocolError
from umbel_common.plans.plan import (
    PLAN_VERSIONS,
    Classification,
    NoPrivacy,
    ReleaseGate,
    Sgd,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.plan_file import plan_from_json, plan_lines, plan_to_json
from umbel_common.plans.server_optimizer import (
    Average,
    Schedule,
    ServerAdam,
    ServerOptimizer,
    ServerSgd,
    ServerYogi,
)
from umbel_common.plans.start import LabelNamesStart, ReleasedStart
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
    assert open_signed(signed, PLAN_VERSIONS, OPERATOR.public_key) == read == plan


def test_no_change_to_the_text_keeps_the_signature(make_plan: MakePlan) -> None:
    plan = make_plan()
    document = msgspec.json.decode(plan_to_json(plan, sign(OPERATOR, plan).signature))
    document["plan"]["training"]["rounds"] += 1
    changed, signed = plan_from_json(msgspec.json.encode(document).decode(), "plan.json")
    assert changed != plan
    assert signed is not None
    with pytest.raises(RemoteProtocolError) as caught:
        open_signed(signed, PLAN_VERSIONS, OPERATOR.public_key)
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


SERVERS: tuple[tuple[ServerOptimizer, str], ...] = (
    (ServerSgd(adapter_learning_rate=0.5), "gradient descent with momentum 0.9, learning rate 0.5"),
    (
        ServerSgd(
            adapter_learning_rate=0.5,
            head_learning_rate=10.0,
            momentum=0.5,
            nesterov=True,
            schedule=Schedule(warmup_rounds=2, decay="cosine", final=0.1),
        ),
        "gradient descent with Nesterov's momentum 0.5, learning rate 0.5 (10 for the head),"
        " rising over 2 rounds, falling on a cosine to 0.1 of it",
    ),
    (
        ServerAdam(adapter_learning_rate=1e-3, schedule=Schedule(final=0.5)),
        "Adam with beta 0.9 and 0.99, eps 1e-08, learning rate 0.001, falling in a line to 0.5"
        " of it",
    ),
    (
        ServerYogi(adapter_learning_rate=1e-3),
        "Yogi with beta 0.9 and 0.99, eps 1e-08, learning rate 0.001",
    ),
)


@pytest.mark.parametrize(("server", "text"), SERVERS)
def test_a_person_reads_how_the_server_moves(
    make_plan2: MakePlan, server: ServerOptimizer, text: str
) -> None:
    plan = make_plan2(server=server)
    assert dict(plan_lines(plan))["server"] == text
    assert plan_from_json(plan_to_json(plan), "plan.json") == (plan, None)


def test_the_mean_of_the_deltas_needs_no_line(make_plan: MakePlan, make_plan2: MakePlan) -> None:
    assert "server" not in dict(plan_lines(make_plan()))
    assert "server" not in dict(plan_lines(make_plan2(server=Average())))


def test_both_versions_come_back_from_their_files(make_plan: MakePlan) -> None:
    plan = make_plan(release_gate=ReleaseGate(holdout=bytes(range(32)), max_loss_increase=0.25))
    names = LabelNamesStart(
        tensor=bytes(range(32)), names=("x", "y", "z"), scale=10.0, tolerance=0.01
    )
    earlier = ReleasedStart(adapter=bytes(32), plan=bytes(range(32)), round=3, largest_norm=2.0)
    for one in (plan, *(second_version(plan, start=start) for start in (None, names, earlier))):
        text = plan_to_json(one, sign(OPERATOR, one).signature)
        read, signed = plan_from_json(text, "plan.json")
        assert type(read) is type(one)
        assert read == one
        assert signed is not None
        assert open_signed(signed, PLAN_VERSIONS, OPERATOR.public_key) == one
        assert "0x" not in text
        assert "AAAA" not in text
    assert f'"tensor": "{bytes(range(32)).hex()}"' in plan_to_json(
        second_version(plan, start=names)
    )


def test_a_plan_of_one_version_has_no_field_of_another(make_plan2: MakePlan) -> None:
    document = msgspec.json.decode(plan_to_json(make_plan2(server=Average())))
    document["plan"]["version"] = 1
    with pytest.raises(PlanError, match="malformed"):
        plan_from_json(msgspec.json.encode(document).decode(), "plan.json")


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
