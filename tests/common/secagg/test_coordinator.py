"""Broken or lying sites against the coordinator: their answer is refused, the others stay in."""

import os

import msgspec
import numpy as np
import pytest

from umbel_common.errors import (
    IdentityError,
    LocalProtocolError,
    RemoteProtocolError,
    RoundAborted,
)
from umbel_common.secagg import coordinator
from umbel_common.secagg.messages import KeyAdvert, Survivors, SurvivorSignature
from umbel_common.secagg.shamir import PRIME
from umbel_common.secagg.unmasking import LostSecrets, WrongShare
from umbel_common.trust.identity import Identity, sign

ME, PEER, OTHER = "site-00", "site-01", "site-02"
ORDER_8 = bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
"""One of the points that RFC 7748, section 6.1, and curve25519's authors warn of."""
SIZE, THRESHOLD = 5, 3
NEXT = {"advertise": "share", "share": "mask", "mask": "confirm", "confirm": "reveal"}


def changed(value, **fields):
    return msgspec.structs.replace(value, **fields)


def advert_of(attempt, signed, signer=None, **fields):
    statement = msgspec.msgpack.decode(signed.statement, type=KeyAdvert)
    return sign(signer or attempt.identities[ME], changed(statement, **fields))


def repeated_key(attempt, signed):
    _, theirs = attempt.machine.answers[PEER]
    return advert_of(attempt, signed, mask_key=theirs.mask_key)


def survivors_of(attempt, signer, **fields):
    statement = Survivors(context=attempt.context, sites=attempt.machine.sites)
    return SurvivorSignature(site=ME, signed=sign(signer, changed(statement, **fields)))


def first_changed(items, **fields):
    return (changed(items[0], **fields), *items[1:])


LIES = [
    (
        "advertise",
        "keys signed by an identity that is not pinned",
        "pinned-signature",
        lambda attempt, signed: advert_of(attempt, signed, Identity.generate(os.urandom)),
    ),
    (
        "advertise",
        "another site's keys",
        "wrong-sender",
        lambda attempt, signed: attempt.machine.answers[PEER][0],
    ),
    (
        "advertise",
        "keys of another attempt",
        "other-context",
        lambda attempt, signed: advert_of(attempt, signed, context=os.urandom(32)),
    ),
    ("advertise", "a peer's mask key", "duplicate-key", repeated_key),
    (
        "advertise",
        "a mask key of small order",
        "weak-key",
        lambda attempt, signed: advert_of(attempt, signed, mask_key=bytes(32)),
    ),
    (
        "advertise",
        "a cipher key of order 8",
        "weak-key",
        lambda attempt, signed: advert_of(attempt, signed, cipher_key=ORDER_8),
    ),
    (
        "advertise",
        "keys of a stranger",
        "not-in-cohort",
        lambda attempt, signed: advert_of(attempt, signed, site="site-99"),
    ),
    (
        "advertise",
        "no statement at all",
        "malformed-message",
        lambda attempt, signed: changed(signed, statement=b"\xc1"),
    ),
    (
        "share",
        "shares in another's name",
        "wrong-sender",
        lambda attempt, shares: first_changed(shares, sender=PEER),
    ),
    ("share", "a peer left out", "wrong-recipient", lambda attempt, shares: shares[1:]),
    (
        "share",
        "two shares for one peer",
        "wrong-recipient",
        lambda attempt, shares: first_changed(shares, recipient=shares[1].recipient),
    ),
    (
        "share",
        "a share for itself",
        "wrong-recipient",
        lambda attempt, shares: first_changed(shares, recipient=ME),
    ),
    ("mask", "a vector cut short", "vector-length", lambda attempt, vector: vector[:-1]),
    ("mask", "a vector of another ring", "vector-length", lambda attempt, vector: vector * 2),
    (
        "confirm",
        "a signature by an identity that is not pinned",
        "pinned-signature",
        lambda attempt, _: survivors_of(attempt, Identity.generate(os.urandom)),
    ),
    (
        "confirm",
        "another site's signature",
        "wrong-sender",
        lambda attempt, signature: changed(signature, site=PEER),
    ),
    (
        "confirm",
        "a smaller survivor set",
        "other-survivors",
        lambda attempt, _: survivors_of(attempt, attempt.identities[ME], sites=(ME, PEER)),
    ),
    (
        "confirm",
        "a survivor set of another attempt",
        "other-context",
        lambda attempt, _: survivors_of(attempt, attempt.identities[ME], context=os.urandom(32)),
    ),
    ("reveal", "a share too few", "revealed-shares", lambda attempt, shares: shares[1:]),
    (
        "reveal",
        "one share twice",
        "revealed-shares",
        lambda attempt, shares: (*shares, shares[0]),
    ),
    (
        "reveal",
        "a survivor's mask-key share",
        "revealed-shares",
        lambda attempt, shares: first_changed(shares, kind="mask-key"),
    ),
    (
        "reveal",
        "a share past the prime",
        "share-range",
        lambda attempt, shares: first_changed(shares, share=PRIME.to_bytes(32, "big")),
    ),
]


@pytest.mark.parametrize(
    ("stage", "check", "lie"),
    [(stage, check, lie) for stage, _, check, lie in LIES],
    ids=[f"{stage}: {name}" for stage, name, _, _ in LIES],
)
def test_a_bad_answer_is_refused_and_the_true_one_still_taken(make_attempt, stage, check, lie):
    attempt = make_attempt(SIZE, THRESHOLD).run_to(stage)
    requests = attempt.requests()
    attempt.machine = attempt.machine.receive(PEER, attempt.answer(PEER, requests[PEER]))
    honest = attempt.answer(ME, requests[ME])
    before = attempt.machine
    with pytest.raises(RemoteProtocolError) as caught:
        before.receive(ME, lie(attempt, honest))
    assert caught.value.check == check
    assert ME in before.waiting
    attempt.machine = before.receive(ME, honest)
    attempt.collect(silent={ME, PEER})
    attempt.close()
    attempt.run_to("end")
    assert (attempt.machine.total == attempt.plain_sum(attempt.header.cohort)).all()


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "confirm", "reveal"])
def test_a_second_answer_and_a_stranger_are_refused_at_every_stage(make_attempt, stage):
    attempt = make_attempt(SIZE, THRESHOLD).run_to(stage)
    payload = attempt.answer(ME, attempt.requests()[ME])
    after = attempt.machine.receive(ME, payload)
    assert after.waiting == attempt.machine.waiting - {ME}
    with pytest.raises(RemoteProtocolError) as caught:
        after.receive(ME, payload)
    assert caught.value.check == "second-answer"
    with pytest.raises(RemoteProtocolError) as caught:
        after.receive("site-99", payload)
    assert caught.value.check == "unexpected-site"


@pytest.mark.parametrize("stage", ["share", "mask", "confirm", "reveal"])
def test_a_site_that_missed_a_stage_is_not_asked_again(make_attempt, stage):
    before = {following: stage for stage, following in NEXT.items()}[stage]
    attempt = make_attempt(SIZE, THRESHOLD).run_to(stage, silent={before: {PEER}})
    assert PEER not in attempt.requests()
    assert PEER not in attempt.machine.waiting


@pytest.mark.parametrize(
    ("stage", "check"),
    [
        ("advertise", "too-few-adverts"),
        ("share", "too-few-shares"),
        ("mask", "too-few-vectors"),
        ("confirm", "too-few-confirmations"),
        ("reveal", "too-few-reveals"),
    ],
)
def test_exactly_the_threshold_is_enough_and_one_fewer_aborts(make_attempt, stage, check):
    silent = {"site-03", "site-04"}
    make_attempt(SIZE, THRESHOLD).run_to("end", silent={stage: silent})
    attempt = make_attempt(SIZE, THRESHOLD).run_to(stage)
    attempt.collect(silent=silent | {OTHER})
    with pytest.raises(RoundAborted) as caught:
        attempt.close()
    assert caught.value.check == check


WRONG = bytes(31) + b"\1"


def revealed(attempt, liars, **fields):
    """The machine after all answers; shares of the liars that have these fields are wrong."""
    for name, request in attempt.requests().items():
        shares = attempt.answer(name, request)
        if name in liars:
            shares = tuple(
                changed(share, share=WRONG)
                if all(getattr(share, field) == value for field, value in fields.items())
                else share
                for share in shares
            )
        attempt.machine = attempt.machine.receive(name, shares)
    return attempt.machine


@pytest.mark.parametrize("liar", [ME, OTHER, "site-04"])
@pytest.mark.parametrize("kind", ["self-mask", "mask-key"])
def test_a_liar_that_reveals_wrong_shares_does_not_stop_the_sum(make_attempt, liar, kind):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("reveal", silent={"mask": {PEER}})
    aggregate = revealed(attempt, {liar}, kind=kind).close()
    survivors = (ME, OTHER, "site-03", "site-04")
    assert aggregate.survivors == survivors
    assert (aggregate.total == attempt.plain_sum(survivors)).all()


def test_the_wrong_shares_that_were_in_the_way_are_named_by_owner_and_site(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("reveal", silent={"mask": {PEER}})
    machine = revealed(attempt, {ME}, owner=OTHER)
    # Four sites revealed: one share to spare corrects an error but proves no lie.
    assert machine.close().wrong_shares == ()
    machine = revealed(make_attempt(SIZE, THRESHOLD).run_to("reveal"), {ME}, owner=OTHER)
    assert machine.close().wrong_shares == (WrongShare(owner=OTHER, site=ME),)


def test_more_liars_than_the_spare_shares_correct_abort_and_every_owner_is_named(make_attempt):
    machine = revealed(make_attempt(SIZE, THRESHOLD).run_to("reveal"), {ME, OTHER}, owner=OTHER)
    with pytest.raises(RoundAborted) as caught:
        machine.close()
    assert (caught.value.check, caught.value.field) == ("seed-commitment", OTHER)
    assert caught.value.found == LostSecrets((OTHER,), revealing=5, threshold=3)
    machine = revealed(make_attempt(SIZE, THRESHOLD).run_to("reveal"), {ME, OTHER})
    with pytest.raises(RoundAborted) as caught:
        machine.close()
    assert caught.value.field == ", ".join(f"site-{index:02}" for index in range(SIZE))


def test_a_lost_mask_key_aborts_and_names_its_owner(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("reveal", silent={"mask": {PEER}})
    with pytest.raises(RoundAborted) as caught:
        revealed(attempt, {ME, OTHER}, kind="mask-key").close()
    assert (caught.value.check, caught.value.field) == ("mask-key", PEER)


def test_without_a_share_to_spare_one_wrong_share_aborts(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD)
    attempt.run_to("reveal", silent={"confirm": {"site-03", "site-04"}})
    with pytest.raises(RoundAborted) as caught:
        revealed(attempt, {ME}, owner=OTHER).close()
    assert caught.value.found == LostSecrets((OTHER,), revealing=3, threshold=3)
    assert caught.value.found.tolerated == 0


def test_a_survivor_that_neither_confirms_nor_reveals_stays_in_the_sum(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD)
    attempt.run_to("end", silent={"confirm": {ME}, "reveal": {PEER}})
    assert attempt.machine.survivors == attempt.header.cohort
    assert (attempt.machine.total == attempt.plain_sum(attempt.header.cohort)).all()


@pytest.mark.parametrize("dropped", [{ME}, {OTHER}, {"site-04"}, {ME, "site-04"}])
def test_masks_of_dropped_out_sites_are_removed_wherever_their_names_sort(make_attempt, dropped):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("end", silent={"mask": dropped})
    survivors = tuple(site for site in attempt.header.cohort if site not in dropped)
    assert attempt.machine.survivors == survivors
    assert (attempt.machine.total == attempt.plain_sum(survivors)).all()


def test_the_running_sum_is_masked_until_the_end(make_attempt):
    zeros = {f"site-{index:02}": np.zeros(16, dtype="<u4") for index in range(SIZE)}
    attempt = make_attempt(SIZE, THRESHOLD, vectors=zeros, length=16).run_to("reveal")
    attempt.collect()
    masked = attempt.machine.total.take(count=SIZE)
    assert (masked != 0).all()


def test_masked_vectors_are_taken_as_views_of_a_larger_message(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("mask")
    for site, request in attempt.requests().items():
        message = b"header" + attempt.answer(site, request)
        attempt.machine = attempt.machine.receive(site, memoryview(message)[6:])
    attempt.close()
    attempt.run_to("end")
    assert (attempt.machine.total == attempt.plain_sum(attempt.header.cohort)).all()


def test_a_stage_that_was_left_behind_cannot_spoil_the_sum(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("mask")
    requests, stale = attempt.requests(), attempt.machine
    stale.receive(ME, attempt.answer(ME, requests[ME]))
    with pytest.raises(LocalProtocolError) as caught:
        stale.receive(PEER, attempt.answer(PEER, requests[PEER]))
    assert caught.value.check == "stale-stage"


def test_an_attempt_is_unmasked_once(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("reveal")
    attempt.collect()
    attempt.machine.close()
    with pytest.raises(LocalProtocolError) as caught:
        attempt.machine.close()
    assert caught.value.check == "stale-stage"


@pytest.mark.parametrize("threshold", [1, 6])
def test_a_threshold_that_makes_no_sense_is_our_own_mistake(make_attempt, threshold):
    attempt = make_attempt(SIZE, THRESHOLD)
    with pytest.raises(LocalProtocolError):
        coordinator.open_attempt(attempt.header, attempt.roster, threshold, 32, 3)


def test_a_cohort_past_the_roster_is_refused(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD)
    header = changed(attempt.header, cohort=(*attempt.header.cohort, "site-99"))
    with pytest.raises(IdentityError):
        coordinator.open_attempt(header, attempt.roster, THRESHOLD, 32, 3)
