"""Requests of a malicious server to a site, and the check by which the site refuses each.

The refusals within one attempt of secure aggregation are in tests/common/secagg; these are the
refusals of the trainer, its policy, its journal and its ledger.
"""

import dataclasses
import os
import shutil
import sqlite3
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from adversarial.federation import Federation, moved
from support.shared_noise_plans import shared_noise_plan

from umbel_client.ledger.register import machine_register
from umbel_client.site.config import load_config
from umbel_client.site.decisions import Decisions
from umbel_client.trainer import checks
from umbel_common.adapters.vector import adapter_digest, initial_vector, to_bytes
from umbel_common.canonical import decode_canonical
from umbel_common.errors import LocalProtocolError, StorageError
from umbel_common.plans.plan import LocalPrivacy, NoPrivacy, Sgd, TrainingPlan2, second_version
from umbel_common.plans.statements import EarlyEnd, Release
from umbel_common.protocol.wire import (
    ConfirmRequest,
    FinishReply,
    FinishRequest,
    MaskRequest,
    OfferRequest,
    ShareRequest,
    UnmaskRequest,
    seal_request,
    size_limit,
)
from umbel_common.secagg.encoding import decode_sum, encoding_of
from umbel_common.trust.identity import Identity, sign
from umbel_server.aggregation.attempt import Attempt, AttemptOutcome

SITE = "site-00"


def test_an_honest_attempt_ends_with_the_sum(federation: Any) -> None:
    federation.offer()
    outcome = federation.drive(federation.attempt())
    assert isinstance(outcome, AttemptOutcome)
    assert outcome.aggregate.survivors == tuple(sorted(federation.identities))
    assert outcome.aggregate.total[0] == 3


def test_a_request_by_anyone_but_the_pinned_operator_is_refused(federation: Any) -> None:
    stranger = Identity.generate(os.urandom)
    request = OfferRequest(plan=sign(federation.operator, federation.plan))
    assert federation.refusal(SITE, request, operator=stranger) == "pinned-signature"


def test_a_plan_signed_by_anyone_else_is_refused(federation: Any) -> None:
    stranger = Identity.generate(os.urandom)
    request = OfferRequest(plan=sign(stranger, federation.plan))
    assert federation.refusal(SITE, request) == "pinned-signature"


def test_an_oversized_message_is_not_read(federation: Any) -> None:
    sealed = seal_request(
        federation.operator, SITE, OfferRequest(plan=sign(federation.operator, federation.plan))
    )
    reply = federation.trainers[SITE].handle(sealed + bytes(size_limit(federation.plan)))
    assert b"oversized-message" in reply


@pytest.mark.parametrize(
    ("parts", "check"),
    [
        ({"federation": "others"}, "other-federation"),
        ({"privacy": LocalPrivacy(epsilon=9.0, delta=1e-4, clip_norm=1.0)}, "epsilon-too-large"),
        ({"privacy": LocalPrivacy(epsilon=8.0, delta=1e-3, clip_norm=1.0)}, "delta-too-large"),
        ({"privacy": NoPrivacy()}, "privacy-required"),
    ],
)
def test_a_plan_against_the_sites_policy_is_refused_and_charges_nothing(
    federation: Any, parts: dict[str, Any], check: str
) -> None:
    plan = federation.make_plan(**parts)
    request = OfferRequest(plan=sign(federation.operator, plan))
    assert federation.refusal(SITE, request) == check
    assert federation.spent_rounds(SITE) == 0


def test_a_model_that_the_site_did_not_allow_is_refused(federation: Any) -> None:
    model = msgspec.structs.replace(federation.plan.model, digest=b"\x01" * 32)
    request = OfferRequest(plan=sign(federation.operator, federation.make_plan(model=model)))
    assert federation.refusal(SITE, request) == "model-not-allowed"


def test_a_second_plan_under_the_same_job_name_is_refused(federation: Any) -> None:
    federation.offer()
    other = federation.make_plan(privacy=LocalPrivacy(epsilon=7.0, delta=1e-4, clip_norm=1.0))
    request = OfferRequest(plan=sign(federation.operator, other))
    assert federation.refusal(SITE, request) == "job-has-other-plan"


def test_a_round_of_a_plan_that_was_never_offered_is_refused(federation: Any) -> None:
    assert federation.refusal(SITE, federation.train_request()) == "unknown-plan"
    assert federation.spent_rounds(SITE) == 0


@pytest.mark.parametrize(
    ("parts", "check"),
    [
        ({"plan": b"\x01" * 32}, "plan-digest"),
        ({"roster": b"\x01" * 32}, "roster-digest"),
        ({"federation": "others"}, "other-federation"),
        ({"cohort": ("site-01", "site-02")}, "not-in-cohort"),
        ({"cohort": ("site-00", "site-01")}, "cohort-too-small"),
        ({"cohort": ("site-00", "site-01", "sybil")}, "not-in-roster"),
        ({"round": 3}, "round-past-plan"),
        ({"round": 2}, "other-release"),
        ({"adapter": b"\x01" * 32}, "adapter-digest"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_and_charges_nothing(
    federation: Any, parts: dict[str, Any], check: str
) -> None:
    federation.offer()
    request = federation.train_request(federation.header(**parts))
    assert federation.refusal(SITE, request) == check
    assert federation.spent_rounds(SITE) == 0
    assert federation.observers[SITE].steps == 0


def test_an_adapter_other_than_its_release_says_is_refused(federation: Any) -> None:
    federation.offer()
    request = federation.train_request()
    changed = initial_vector(federation.plan) + np.float32(1)
    request = msgspec.structs.replace(request, adapter=to_bytes(changed))
    assert federation.refusal(SITE, request) == "adapter-digest"


def test_a_first_adapter_other_than_the_public_seeds_is_refused(federation: Any) -> None:
    federation.offer()
    planted = initial_vector(federation.plan) + np.float32(1)
    header = federation.header(adapter=adapter_digest(federation.plan.digest(), planted))
    request = federation.train_request(header, federation.release(planted))
    assert federation.refusal(SITE, request) == "initial-adapter"


@pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])
def test_an_adapter_that_no_round_leads_to_is_refused(
    federation: Any, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Such as one that amplifies rounding: its numbers are in the millions."""
    federation.offer()
    planted = moved(federation.plan, 1.01)
    release = federation.release(planted, round=1)
    digest = adapter_digest(federation.plan.digest(), planted)
    request = federation.train_request(federation.header(round=2, adapter=digest), release)
    if checked:
        assert federation.refusal(SITE, request) == "adapter-too-far"
        assert federation.spent_rounds(SITE) == 0
    else:
        monkeypatch.setattr(checks, "require_reachable", lambda *given, **named: None)
        federation.ask(SITE, request)
        assert federation.spent_rounds(SITE) == 1


def test_two_releases_of_one_round_are_noticed(federation: Any) -> None:
    federation.offer()
    federation.drive(federation.attempt())
    header = federation.header(attempt=2)
    request = federation.train_request(header, federation.release(total_weight=1))
    assert federation.refusal(SITE, request) == "two-releases"


def test_a_used_attempt_number_is_refused(federation: Any) -> None:
    federation.offer()
    federation.drive(federation.attempt(), until="share")
    other = federation.header(adapter=b"\x01" * 32)
    assert federation.refusal(SITE, federation.train_request(other)) == "attempt-reused"
    federation.start(SITE)
    assert federation.refusal(SITE, federation.train_request(other)) == "attempt-reused"


def test_an_older_attempt_number_is_refused(federation: Any) -> None:
    federation.offer()
    federation.drive(federation.attempt(federation.header(attempt=2)), until="share")
    assert federation.refusal(SITE, federation.train_request()) == "attempt-reused"


def requests_of(federation: Any, attempt: Attempt) -> tuple[Any, Any]:
    """An honest request to the site in the attempt's stage, and another one for the same stage."""
    request = attempt.requests()[SITE]
    match request:
        case ShareRequest():
            return request, msgspec.structs.replace(request, adverts=request.adverts[:2])
        case MaskRequest():
            return request, msgspec.structs.replace(request, shares=request.shares[:1])
        case ConfirmRequest():
            return request, msgspec.structs.replace(request, survivors=("site-00", "site-01"))
        case UnmaskRequest():
            return request, msgspec.structs.replace(request, signatures=request.signatures[:2])
    raise AssertionError(request)


@pytest.mark.parametrize("stage", ["share", "mask", "confirm", "unmask"])
@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_a_stage_is_answered_once_and_again_only_with_the_same_bytes(
    federation: Any, stage: str, restart: bool
) -> None:
    federation.offer()
    attempt = federation.drive(federation.attempt(), until=stage)
    honest, other = requests_of(federation, attempt)
    sealed = seal_request(federation.operator, SITE, honest)
    first = federation.trainers[SITE].handle(sealed)
    if restart:
        federation.start(SITE)
    assert federation.refusal(SITE, other) == "second-answer"
    assert federation.trainers[SITE].handle(sealed) == first


@pytest.mark.parametrize("stage", ["mask", "confirm", "unmask"])
def test_a_stage_out_of_order_is_refused(federation: Any, stage: str) -> None:
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="share")
    context = attempt.header.context()
    request = {
        "mask": MaskRequest(context=context, shares=()),
        "confirm": ConfirmRequest(context=context, survivors=tuple(sorted(federation.identities))),
        "unmask": UnmaskRequest(context=context, signatures=()),
    }[stage]
    assert federation.refusal(SITE, request) == "stage-order"


def test_a_stage_of_an_attempt_that_never_began_is_refused(federation: Any) -> None:
    federation.offer()
    request = ShareRequest(context=b"\x01" * 32, adverts=())
    assert federation.refusal(SITE, request) == "unknown-attempt"


def test_an_overtaken_attempt_is_over(federation: Any) -> None:
    federation.offer()
    old = federation.drive(federation.attempt(), until="mask")
    federation.drive(federation.attempt(federation.header(attempt=2)), until="mask")
    assert federation.refusal(SITE, old.requests()[SITE]) == "attempt-over"


def test_a_retry_releases_the_same_delta_and_charges_nothing_more(federation: Any) -> None:
    federation.offer()
    first = federation.drive(federation.attempt())
    steps = federation.observers[SITE].steps
    second = federation.drive(federation.attempt(federation.header(attempt=2)))
    assert federation.observers[SITE].steps == steps
    assert federation.spent_rounds(SITE) == 1
    # A delta that is rounded again moves by at most one step.
    difference = (first.aggregate.total - second.aggregate.total).view(np.int32)
    assert np.abs(difference).max() <= 3
    assert np.abs(first.aggregate.total[1:].view(np.int32)).max() > 1000


def test_a_round_is_never_trained_from_two_adapters(federation: Any) -> None:
    federation.offer()
    federation.drive(federation.attempt())
    one, two = (moved(federation.plan, shift) for shift in (0.1, 0.2))
    for vector, number, expected in ((one, 1, None), (two, 2, "two-releases")):
        header = federation.header(
            round=2, attempt=number, adapter=adapter_digest(federation.plan.digest(), vector)
        )
        request = federation.train_request(header, federation.release(vector, round=1))
        if expected is None:
            federation.send(SITE, request)
        else:
            assert federation.refusal(SITE, request) == expected
    assert federation.spent_rounds(SITE) == 2


def test_a_plan_past_what_is_left_of_the_budget_is_refused(federation: Any) -> None:
    training = msgspec.structs.replace(federation.plan.training, rounds=10)
    federation.plan = federation.make_plan(training=training)
    federation.offer()
    for number in range(1, 11):
        vector = moved(federation.plan, number - 1)
        header = federation.header(
            round=number, adapter=adapter_digest(federation.plan.digest(), vector)
        )
        release = federation.release(vector, round=number - 1)
        federation.send(SITE, federation.train_request(header, release))
    assert federation.observers[SITE].errors == []
    assert federation.spent_rounds(SITE) == 10
    # An epsilon of 8 of 10 is spent; two plans of 8 compose to more than 10.
    second = msgspec.structs.replace(federation.plan, job="second")
    request = OfferRequest(plan=sign(federation.operator, second))
    assert federation.refusal(SITE, request) == "budget"
    assert federation.spent_rounds(SITE) == 10


def test_a_ledger_that_was_rolled_back_is_noticed(federation: Any) -> None:
    federation.offer()
    state = federation.folder / SITE / "state"
    federation.trainers[SITE].close()
    for path in state.glob("ledger.sqlite*"):
        shutil.copy(path, federation.folder / path.name)
    federation.start(SITE)
    federation.offer()
    federation.drive(federation.attempt())
    federation.trainers[SITE].close()
    for path in state.glob("ledger.sqlite*"):
        path.unlink()
    for path in federation.folder.glob("ledger.sqlite*"):
        shutil.copy(path, state / path.name)
    federation.start(SITE)
    assert federation.refusal(SITE, federation.train_request(federation.header(attempt=2))) == (
        "site-not-ready"
    )
    (error,) = federation.observers[SITE].errors
    assert "rolled back" in error.diagnostics()


def test_a_delta_that_was_changed_on_disk_never_leaves(federation: Any) -> None:
    federation.offer()
    federation.drive(federation.attempt(), until="mask")
    (path,) = (federation.folder / SITE / "state" / "deltas" / "job").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    request = federation.train_request(federation.header(attempt=2))
    assert federation.refusal(SITE, request) == "site-fault"
    (error,) = federation.observers[SITE].errors
    assert "not the one that the ledger recorded" in error.diagnostics()


def test_a_last_release_of_another_round_or_vector_is_not_stored(federation: Any) -> None:
    federation.offer()
    signed, vector = federation.release(round=1)
    request = FinishRequest(release=signed, adapter=to_bytes(vector))
    assert federation.refusal(SITE, request) == "other-release"
    signed, vector = federation.release(round=2)
    request = FinishRequest(release=signed, adapter=to_bytes(vector + np.float32(1)))
    assert federation.refusal(SITE, request) == "adapter-digest"
    assert not (federation.folder / SITE / "state" / "adapters").exists()


def test_a_last_release_of_the_other_version_is_not_stored(
    open_federation: Callable[..., Federation],
) -> None:
    """One of version 1 names no sum, so nobody could ever show that its adapter is made up."""
    federation = open_federation()
    first, vector = federation.release(round=2)
    federation.plan = second_version(federation.plan)
    federation.offer(None, SITE)
    signed, _ = federation.release(round=2)
    release = msgspec.structs.replace(
        decode_canonical(first.statement, Release),
        plan=federation.plan.digest(),
        adapter=adapter_digest(federation.plan.digest(), vector),
    )
    request = FinishRequest(release=sign(federation.operator, release), adapter=to_bytes(vector))
    assert federation.refusal(SITE, request) == "other-release"
    federation.ask(SITE, FinishRequest(release=signed, adapter=to_bytes(vector)))


def test_only_a_signed_early_end_makes_another_round_the_last(federation: Any) -> None:
    federation.offer()
    signed, vector = federation.release(round=1)

    def finish(end: EarlyEnd, signer: Identity = federation.operator) -> FinishRequest:
        return FinishRequest(release=signed, adapter=to_bytes(vector), early_end=sign(signer, end))

    plan = federation.plan
    end = EarlyEnd(federation=plan.federation, job=plan.job, plan=plan.digest(), round=1)
    other_plan = msgspec.structs.replace(end, plan=bytes(32))
    other_round = msgspec.structs.replace(end, round=0)
    stranger = Identity.generate(os.urandom)
    assert federation.refusal(SITE, finish(other_plan)) == "other-release"
    assert federation.refusal(SITE, finish(other_round)) == "other-release"
    assert federation.refusal(SITE, finish(end, stranger)) == "pinned-signature"
    assert not (federation.folder / SITE / "state" / "adapters").exists()
    reply = federation.ask(SITE, finish(end))
    assert isinstance(reply, FinishReply)
    assert (federation.folder / SITE / "state" / "adapters" / plan.job).is_dir()


def test_a_refusal_tells_the_server_a_code_and_the_site_everything(federation: Any) -> None:
    path = federation.folder / SITE / "data.jsonl"
    path.write_text('{"text": "a secret diagnosis", "label": "unheard of"}\n')
    federation.start(SITE)
    request = OfferRequest(plan=sign(federation.operator, federation.plan))
    sealed = federation.trainers[SITE].handle(seal_request(federation.operator, SITE, request))
    assert b"site-not-ready" in sealed
    assert b"secret" not in sealed
    assert b"unheard" not in sealed
    (error,) = federation.observers[SITE].errors
    assert "unheard of" in error.diagnostics()
    assert "secret" not in error.diagnostics()


def test_a_refused_offer_changes_nothing_of_the_attempt_under_way(federation: Any) -> None:
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    # Encoded under this plan, the victim's delta would be a hundred times larger in the sum.
    finer = msgspec.structs.replace(federation.plan.aggregation, step=1e-8)
    request = OfferRequest(plan=sign(federation.operator, federation.make_plan(aggregation=finer)))
    assert federation.refusal(SITE, request) == "job-has-other-plan"
    outcome = federation.drive(attempt)
    deltas = [
        safetensors.numpy.load_file(
            federation.folder / site / "state" / "deltas" / "job" / "00001.safetensors"
        )["delta"]
        for site in federation.identities
    ]
    encoding = encoding_of(federation.plan, 3)
    _, mean = decode_sum(outcome.aggregate.total, encoding)
    assert np.abs(mean - np.mean(deltas, axis=0)).max() < 2 * encoding.step


def test_a_plan_with_other_labels_is_refused_without_a_look_at_the_data(federation: Any) -> None:
    # The answer to such an offer would say whether other labels occur in the data.
    (federation.folder / SITE / "data.jsonl").unlink()
    for labels in (("a", "b", "c"), ("b", "a"), ("a", "x")):
        task = msgspec.structs.replace(federation.plan.task, labels=labels)
        request = OfferRequest(plan=sign(federation.operator, federation.make_plan(task=task)))
        assert federation.refusal(SITE, request) == "labels-not-allowed"


def test_what_a_site_says_to_an_offer_depends_on_its_public_size_only(federation: Any) -> None:
    path = federation.folder / SITE / "data.jsonl"
    lines = path.read_text().splitlines()
    answers = []
    for number in (37, 40):
        path.write_text("\n".join(lines[:number]))
        training = msgspec.structs.replace(federation.plan.training, expected_batch_size=40)
        plan = federation.make_plan(job=f"job-{number}", training=training)
        shutil.rmtree(federation.folder / SITE / "state")
        shutil.rmtree(machine_register().folder, ignore_errors=True)
        federation.start(SITE)
        answers.append(
            type(federation.send(SITE, OfferRequest(plan=sign(federation.operator, plan))))
        )
    assert answers[0] is answers[1]


def test_a_policy_that_was_tightened_ends_the_job_at_the_next_round(federation: Any) -> None:
    federation.offer()
    path = federation.folder / SITE / "client.toml"
    path.write_text(path.read_text().replace("max_epsilon = 8.0", "max_epsilon = 1.0"))
    federation.start(SITE)
    assert federation.refusal(SITE, federation.train_request()) == "epsilon-too-large"
    assert federation.spent_rounds(SITE) == 0


def test_a_round_whose_training_failed_is_charged_once_and_never_repeated(federation: Any) -> None:
    # The last learning rate is so small that A does not change in float32: a fault for the site.
    training = msgspec.structs.replace(federation.plan.training, final_learning_rate=1e-12)
    lora = msgspec.structs.replace(federation.plan.lora, method="both")
    federation.plan = federation.make_plan(training=training, lora=lora)
    federation.offer()
    federation.drive(federation.attempt())
    vector = moved(federation.plan, 0.1)
    digest = adapter_digest(federation.plan.digest(), vector)
    federation.releases[digest] = federation.release(vector, round=1)
    for number in (1, 2):
        header = federation.header(round=2, attempt=number, adapter=digest)
        assert federation.refusal(SITE, federation.train_request(header)) == "site-fault"
    first, second = federation.observers[SITE].errors
    assert "left the adapter as it was" in first.diagnostics()
    assert "is not repeated" in second.diagnostics()
    assert federation.spent_rounds(SITE) == 2


def test_a_plan_under_which_the_adapter_cannot_move_is_refused_with_the_offer(
    federation: Any,
) -> None:
    optimizer = Sgd(adapter_learning_rate=1e-12, head_learning_rate=1e-12)
    training = msgspec.structs.replace(federation.plan.training, optimizer=optimizer)
    lora = msgspec.structs.replace(federation.plan.lora, method="both")
    plan = federation.make_plan(training=training, lora=lora)
    assert federation.refusal(SITE, OfferRequest(plan=sign(federation.operator, plan))) == (
        "site-fault"
    )
    assert "left the adapter as it was" in federation.observers[SITE].errors[0].diagnostics()
    assert federation.spent_rounds(SITE) == 0


def test_a_sum_that_could_wrap_is_refused_before_anything_is_charged(federation: Any) -> None:
    aggregation = msgspec.structs.replace(federation.plan.aggregation, step=1e-9)
    federation.plan = federation.make_plan(aggregation=aggregation)
    federation.offer()
    assert federation.refusal(SITE, federation.train_request()) == "ring-too-small"
    assert federation.spent_rounds(SITE) == 0


def test_texts_longer_than_the_model_reads_are_refused_with_the_offer(federation: Any) -> None:
    task = msgspec.structs.replace(federation.plan.task, max_tokens=8192)
    request = OfferRequest(plan=sign(federation.operator, federation.make_plan(task=task)))
    assert federation.refusal(SITE, request) == "site-fault"
    assert "task.max_tokens" in federation.observers[SITE].errors[0].diagnostics()


def test_an_error_that_nobody_foresaw_is_a_refusal_and_not_the_end_of_the_site(
    federation: Any,
) -> None:
    # A file is where a folder should be, which no check expects.
    (federation.folder / SITE / "state" / "deltas").write_text("in the way")
    request = OfferRequest(plan=sign(federation.operator, federation.plan))
    assert federation.refusal(SITE, request) == "site-fault"
    (federation.folder / SITE / "state" / "deltas").unlink()
    federation.offer(None, SITE)


def test_a_fault_of_the_sites_own_code_is_named_to_nobody_but_the_site(federation: Any) -> None:
    federation.offer()
    trainer = federation.trainers[SITE]
    trainer._site = dataclasses.replace(trainer._site, entropy=lambda size: bytes(size - 1))
    assert federation.refusal(SITE, federation.train_request()) == "site-fault"
    (error,) = federation.observers[SITE].errors
    assert isinstance(error, LocalProtocolError)
    assert error.check == "entropy"


def damage(federation: Any, damaged: str) -> None:
    """Changes a byte of the plan or of the attempt that the site's journal keeps."""
    with sqlite3.connect(federation.folder / SITE / "state" / "session.sqlite") as database:
        if damaged == "plan":
            (kept,) = database.execute("SELECT plan FROM plans").fetchone()
            # The first byte of the statement that was signed.
            place = kept.index(sign(federation.operator, federation.plan).statement)
            changed = kept[:place] + bytes([kept[place] ^ 0xFF]) + kept[place + 1 :]
            database.execute("UPDATE plans SET plan = ?", (changed,))
        else:
            (kept,) = database.execute("SELECT state FROM attempts").fetchone()
            database.execute("UPDATE attempts SET state = ?", (bytes([kept[0] ^ 0xFF]) + kept[1:],))
    database.close()


def test_a_damaged_journal_is_the_sites_fault_and_not_a_message_of_the_server(
    federation: Any,
) -> None:
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="share")
    federation.trainers[SITE].close()
    damage(federation, "state")
    federation.start(SITE)
    assert federation.refusal(SITE, attempt.requests()[SITE]) == "site-fault"
    (error,) = federation.observers[SITE].errors
    assert isinstance(error, StorageError)
    assert "session.sqlite" in error.diagnostics()


def test_a_site_does_not_start_on_a_journal_with_a_damaged_plan(federation: Any) -> None:
    federation.offer()
    federation.trainers[SITE].close()
    damage(federation, "plan")
    with pytest.raises(StorageError) as refusal:
        federation.start(SITE)
    assert "session.sqlite" in refusal.value.diagnostics()


def sharing(federation: Any, **fields: Any) -> TrainingPlan2:
    """A plan of distributed mode for this federation, with other numbers in its promise."""
    plan = shared_noise_plan(
        federation.make_plan(), delta=1e-4, honest=2, least_survivors=3, attempts=4
    )
    privacy = msgspec.structs.replace(plan.privacy, **fields)
    return msgspec.structs.replace(plan, privacy=privacy)


@pytest.mark.parametrize(
    ("policy", "fields", "check"),
    [
        ("", {}, "distributed-not-allowed"),
        ("max_shared_epsilon = 1.0", {}, "distributed-not-allowed"),
        ("max_shared_epsilon = 0.9\ntotal_shared_epsilon = 8.0", {}, "claim-too-large"),
        ("max_shared_epsilon = 1.0\ntotal_shared_epsilon = 8.0", {"honest": 3}, "too-many-honest"),
        (
            "max_shared_epsilon = 1.0\ntotal_shared_epsilon = 8.0",
            {"most_attempts": 5},
            "claim-exceeded",
        ),
        ("max_shared_epsilon = 1.0\ntotal_shared_epsilon = 0.9", {}, "budget"),
    ],
)
def test_noise_that_sites_share_is_judged_before_anybody_is_asked_or_charged(
    federation: Any, policy: str, fields: dict[str, Any], check: str
) -> None:
    path = federation.folder / SITE / "client.toml"
    text = path.read_text().replace('approval = "none"', 'approval = "each-plan"')
    path.write_text(text.replace("[policy]", f"[policy]\n{policy}"))
    federation.start(SITE)
    request = OfferRequest(plan=sign(federation.operator, sharing(federation, **fields)))
    assert federation.refusal(SITE, request) == check
    assert federation.spent_rounds(SITE) == 0
    assert Decisions(load_config(path).state_folder).proposals() == []
