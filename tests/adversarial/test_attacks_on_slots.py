"""A server that attacks what its sites prepared for an attempt.

The other attacks on attempts run on prepared ones too (conftest.py).
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from adversarial.extraction import keys_of, masks_of, remove_masks, secret_of
from adversarial.federation import Federation, moved
from adversarial.weaken import Stopped

from umbel_client.ledger.register import machine_register
from umbel_common.adapters.vector import adapter_digest
from umbel_common.plans.plan import Aggregation
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    ConfirmRequest,
    FillRequest,
    MaskPreparedRequest,
    MaskRequest,
    PrepareRequest,
    Refusal,
    ShareAgainRequest,
    ShareRequest,
    TogetherReply,
    TogetherRequest,
    UnmaskRequest,
    seal_request,
)
from umbel_common.secagg.messages import Preparation, preparation_of

SITE = "site-00"
PEERS = ("site-01", "site-02")
VICTIM = "site-03"

pytestmark = pytest.mark.way(True)


def next_header(federation: Federation, shift: float = 0.1, **parts: object) -> RoundHeader:
    """The header of a round 2 that starts from an adapter of the server's choice."""
    vector = moved(federation.plan, shift)
    digest = adapter_digest(federation.plan.digest(), vector)
    federation.releases[digest] = federation.release(vector, round=1)
    return federation.header(round=2, adapter=digest, **parts)


@pytest.mark.attack("pinned-signature")
def test_a_server_prepares_with_keys_of_its_own(federation: Federation) -> None:
    """It would read the shares of the victim's seed and mask secret."""
    federation.offer()
    federation.play(*PEERS)
    federation.prepare(federation.header())


@pytest.mark.attack("own-advert")
def test_a_server_exchanges_a_sites_prepared_keys(
    open_federation: Callable[..., Federation],
) -> None:
    """Its peers would share with a key that is not its own."""
    federation = open_federation(3)
    federation.offer()
    preparation = preparation_of(federation.header())
    request = PrepareRequest(preparation=preparation)
    # Asked again, a site draws other keys: those of before are not in its slot any more.
    old = federation.ask(SITE, request).keys
    keys = [federation.ask(site, request).keys for site in (SITE, *PEERS)]
    fill = FillRequest(context=preparation.context(), keys=(old, *keys[1:]))
    federation.ask(SITE, fill)


@pytest.mark.attack("other-context", "other-keys")
def test_a_server_replays_the_keys_of_an_earlier_attempt(federation: Federation) -> None:
    """A party that learnt an old mask key would know the new mask."""
    federation.offer()
    old = federation.drive(federation.attempt(), until="mask").requests()[SITE].adverts
    attempt = federation.drive(federation.attempt(federation.header(attempt=2)), until="mask")
    request = attempt.requests()[SITE]
    mixed = (request.adverts[0], *old[1:])
    federation.ask(SITE, msgspec.structs.replace(request, adverts=mixed))


@pytest.mark.attack("one-attempt-slots")
def test_a_server_opens_a_round_with_what_a_site_revealed_in_the_round_before(
    open_federation: Callable[..., Federation],
) -> None:
    """A site drops out of round 1, where its mask secret is revealed, and survives round 2, where
    its seed is. Were the keys of both rounds the same, its vector of round 2 would be open."""
    federation = open_federation(4)
    federation.offer()
    first = federation.attempt()
    prepared: Any = first.machine
    first = federation.drive(first, until="mask")
    first = federation.drive(first, until="unmask", silent=VICTIM)
    dropped = federation.reveal(first)
    # Round 2 is not prepared; the server delivers the shares of round 1 once more.
    federation.prepares = False
    header = next_header(federation)
    second = federation.attempt(header)
    again = replace(prepared.prepared, preparation=preparation_of(header))
    second = replace(second, machine=replace(second.machine, prepared=again))
    second = federation.drive(second, until="mask")
    vectors, second = federation.vectors(second)
    second = federation.drive(second, until="unmask")
    survived = federation.reveal(second)
    opened = remove_masks(
        masks_of(second),
        keys_of(second),
        [vectors[VICTIM]],
        seeds={VICTIM: secret_of(VICTIM, "self-mask", header, survived)},
        secrets={VICTIM: secret_of(VICTIM, "mask-key", header, dropped)},
    )
    if not federation.is_sum_of(opened, VICTIM, round_number=2):
        raise Stopped("one-attempt-slots")


@pytest.mark.attack(
    "attempt-reused", "unique-attempt", "two-releases", "other-adapter", "one-attempt-slots"
)
def test_a_server_has_two_adapters_trained_under_one_slot(federation: Federation) -> None:
    federation.offer()
    federation.drive(federation.attempt())
    one, two = (next_header(federation, shift) for shift in (0.1, 0.2))
    assert preparation_of(one) == preparation_of(two)
    federation.prepare(one)
    keys = [
        msgspec.msgpack.decode(
            federation.ask(SITE, federation.train_request(header)).advert.statement
        )["mask_key"]
        for header in (one, two)
    ]
    if keys[0] != keys[1]:
        raise Stopped("one-attempt-slots")


@pytest.mark.attack("threshold-too-low")
def test_a_server_sends_the_cohort_two_ways(open_federation: Callable[..., Federation]) -> None:
    """Two sites mask as prepared: their peers are all four, whose prepared shares are out. The
    other two share again, and mask between themselves."""
    two = Aggregation(threshold=2, clip_range=1.0, step=1e-6)
    federation = open_federation(4, {"*": "minimum_cohort = 2"}, aggregation=two)
    federation.prepares = True
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    context, requests = attempt.header.context(), attempt.requests()
    one_way, other = attempt.header.cohort[:2], attempt.header.cohort[2:]
    request = ShareAgainRequest(context=context, adverts=requests[VICTIM].adverts)
    sent = [share for site in other for share in federation.ask(site, request).shares]
    shares = tuple(share for share in sent if share.recipient == VICTIM)
    vector = federation.ask(VICTIM, MaskRequest(context=context, shares=shares)).vector
    for site in one_way:
        federation.ask(site, requests[site])
    confirm = ConfirmRequest(context=context, survivors=(*one_way, VICTIM))
    signatures = tuple(federation.ask(site, confirm).signature for site in one_way)
    unmask = UnmaskRequest(context=context, signatures=signatures)
    revealed = {site: federation.ask(site, unmask).shares for site in one_way}
    keys = keys_of(attempt)
    opened = remove_masks(
        masks_of(attempt),
        {site: keys[site] for site in other},
        [vector],
        seeds={VICTIM: secret_of(VICTIM, "self-mask", attempt.header, revealed)},
        secrets={other[0]: secret_of(other[0], "mask-key", attempt.header, revealed)},
    )
    assert federation.is_sum_of(opened, VICTIM)


@pytest.mark.attack("advert-binding")
@pytest.mark.parametrize("again", [False, True], ids=["mask-prepared", "share-again"])
def test_a_machine_that_is_put_back_with_its_memory_masks_two_deltas_under_one_slot(
    federation: Federation, again: bool
) -> None:
    """The slot is back, and the round is trained again, with other noise. Were the masks the same,
    the difference of both vectors would be that of both deltas."""
    federation.offer()
    header = federation.header()
    prepared, context = federation.prepare(header), header.context()
    train = federation.train_request(header)
    theirs = tuple(federation.ask(site, train).advert for site in PEERS)
    sent = [share for site in PEERS for share in prepared.shares[site]]
    slots = federation.trainers[SITE]._slots._of_jobs.copy()
    folders = {"state": federation.folder / SITE / "state", "ledgers": machine_register().folder}
    federation.trainers[SITE].close()
    for name, folder in folders.items():
        shutil.copytree(folder, federation.folder / "copy" / name)
    sent_again: list[Any] = []
    vectors, deltas = [], []
    for _ in range(2):
        federation.trainers[SITE].close()
        for name, folder in folders.items():
            shutil.rmtree(folder)
            shutil.copytree(federation.folder / "copy" / name, folder)
        federation.start(SITE)
        federation.trainers[SITE]._slots._of_jobs.update(slots)
        adverts = (federation.ask(SITE, train).advert, *theirs)
        mask: Any = partial(MaskPreparedRequest, adverts=adverts)
        if again:
            share = ShareAgainRequest(context=context, adverts=adverts)
            federation.ask(SITE, share)
            mask = MaskRequest
            # The peers answer once; what they sent opens in both worlds.
            sent = sent_again = sent_again or [
                made for site in PEERS for made in federation.ask(site, share).shares
            ]
        shares = tuple(share for share in sent if share.recipient == SITE)
        reply = federation.ask(SITE, mask(context=context, shares=shares))
        vectors.append(np.frombuffer(reply.vector, dtype="<u4"))
        deltas.append(np.clip(federation.delta(SITE), -1, 1).astype(np.float64))
    step = federation.plan.aggregation.step
    found = (vectors[1] - vectors[0]).view(np.int32)[1:] * step
    assert np.abs(deltas[1] - deltas[0]).max() > 1000 * step
    # Each of the two was rounded by less than one step.
    if np.abs(found - (deltas[1] - deltas[0])).max() > 2.002 * step:
        raise Stopped("advert-binding")


def test_a_site_that_prepared_shares_in_no_way_that_its_slot_does_not_bind(
    federation: Federation,
) -> None:
    """Masks of `share` are those of keys that are younger than the delta."""
    federation.prepares = True
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    request = attempt.requests()[SITE]
    plain = ShareRequest(context=request.context, adverts=request.adverts)
    assert federation.refusal(SITE, plain) == "stage-order"
    federation.ask(SITE, ShareAgainRequest(context=request.context, adverts=request.adverts))
    assert federation.refusal(SITE, plain) == "second-answer"


@pytest.mark.parametrize(
    ("part", "check"),
    [
        ({"federation": "others"}, "other-federation"),
        ({"plan": b"\x01" * 32}, "plan-digest"),
        ({"roster": b"\x01" * 32}, "roster-digest"),
        ({"cohort": ("site-00", "site-01")}, "cohort-too-small"),
        ({"cohort": ("site-01", "site-02", "site-03")}, "not-in-cohort"),
        ({"cohort": ("site-00", "site-01", "site-99")}, "not-in-roster"),
        ({"round": 3}, "round-past-plan"),
        ({"job": "unknown"}, "unknown-plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_site_prepares_no_attempt_that_it_would_refuse(
    open_federation: Callable[..., Federation], part: dict[str, object], check: str
) -> None:
    federation = open_federation(4)
    federation.offer()
    preparation = msgspec.structs.replace(preparation_of(federation.header()), **part)
    assert federation.refusal(SITE, PrepareRequest(preparation=preparation)) == check
    assert not federation.trainers[SITE]._slots._of_jobs


def test_a_site_prepares_no_attempt_whose_number_is_used(federation: Federation) -> None:
    federation.offer()
    federation.drive(federation.attempt())
    request = PrepareRequest(preparation=preparation_of(federation.header()))
    assert federation.refusal(SITE, request) == "attempt-reused"


def prepared_next(federation: Federation) -> tuple[RoundHeader, Preparation]:
    """Round 1 is over, and round 2 prepared."""
    federation.offer()
    federation.drive(federation.attempt())
    header = next_header(federation)
    federation.prepare(header)
    return header, preparation_of(header)


def advertised_keys(federation: Federation, header: RoundHeader) -> bytes:
    reply = federation.ask(SITE, federation.train_request(header))
    statement: bytes = reply.advert.statement
    return statement


def test_a_restarted_site_has_no_slot_and_no_trace_of_one(federation: Federation) -> None:
    header, preparation = prepared_next(federation)
    secrets = federation.trainers[SITE]._slots._of_jobs["job"].slot.secrets
    for path in (federation.folder / SITE).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for secret in (secrets.cipher_secret, secrets.mask_secret, secrets.seed):
                assert secret not in data, path
    federation.start(SITE)
    fill = FillRequest(context=preparation.context(), keys=())
    assert federation.refusal(SITE, fill) == "unknown-slot"
    outcome = federation.drive(federation.attempt(header))
    assert federation.is_sum_of(outcome.aggregate.total, *federation.identities, round_number=2)


def test_a_state_folder_that_was_put_back_brings_no_slot_back(federation: Federation) -> None:
    """Rollback: a copy of the disk, made while a slot was prepared, advertises other keys."""
    header, _ = prepared_next(federation)
    prepared = federation.trainers[SITE]._slots._of_jobs["job"].slot.keys
    federation.note_journal(SITE)
    federation.crash(SITE)
    keys = msgspec.msgpack.decode(advertised_keys(federation, header))
    assert keys["mask_key"] != msgspec.msgpack.decode(prepared.statement)["mask_key"]


def test_an_offer_voids_the_slot_of_its_job(federation: Federation) -> None:
    """A server that resumes a job knows of no slot, and its sites have none."""
    header, preparation = prepared_next(federation)
    federation.offer()
    assert not federation.trainers[SITE]._slots._of_jobs
    assert federation.refusal(SITE, FillRequest(context=preparation.context(), keys=())) == (
        "unknown-slot"
    )
    del federation.prepared[preparation.context()]
    federation.drive(federation.attempt(header))


@pytest.mark.parametrize(
    "part",
    [{"attempt": 2}, {"cohort": ("site-00", "site-01", "site-02")}],
    ids=["another attempt", "another cohort"],
)
def test_a_slot_that_its_attempt_did_not_use_is_void(
    open_federation: Callable[..., Federation], part: dict[str, object]
) -> None:
    federation = open_federation(4)
    header, _ = prepared_next(federation)
    slot = federation.trainers[SITE]._slots._of_jobs["job"]
    prepared = msgspec.msgpack.decode(slot.slot.keys.statement)
    other = next_header(federation, **part)
    statement = msgspec.msgpack.decode(advertised_keys(federation, other))
    assert statement["mask_key"] != prepared["mask_key"]
    assert not federation.trainers[SITE]._slots._of_jobs
    assert header != other


def test_a_revoked_key_or_another_roster_voids_all_slots(federation: Federation) -> None:
    _, preparation = prepared_next(federation)
    federation.revoke(SITE, federation.identities[PEERS[0]])
    assert not federation.trainers[SITE]._slots._of_jobs
    request = PrepareRequest(preparation=preparation)
    assert federation.refusal(SITE, request) == "revoked-key"


def test_shares_are_made_once(federation: Federation) -> None:
    federation.offer()
    preparation = preparation_of(federation.header())
    request = PrepareRequest(preparation=preparation)
    keys = tuple(federation.ask(site, request).keys for site in (SITE, *PEERS))
    fill = FillRequest(context=preparation.context(), keys=keys)
    federation.ask(SITE, fill)
    assert federation.refusal(SITE, fill) == "unknown-slot"


def late_stages(federation: Federation) -> tuple[ConfirmRequest, Preparation]:
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="confirm")
    request = attempt.requests()[SITE]
    return request, preparation_of(federation.header(round=2))


def test_a_stage_and_what_comes_with_it_are_answered_together_and_again_with_the_same_bytes(
    federation: Federation,
) -> None:
    confirm, preparation = late_stages(federation)
    request = TogetherRequest(stage=confirm, ahead=PrepareRequest(preparation=preparation))
    sealed = seal_request(federation.operator, SITE, request)
    first = federation.trainers[SITE].handle(sealed)
    assert federation.trainers[SITE].handle(sealed) == first
    reply = federation.deliver(SITE, sealed)
    assert isinstance(reply, TogetherReply)
    # The slot is still that of the answer, and fits it.
    slot = federation.trainers[SITE]._slots._of_jobs["job"]
    assert slot.keys == reply.ahead.keys
    # Another preparation with the same stage is another request for the stage.
    other = msgspec.structs.replace(request, ahead=FillRequest(context=bytes(32), keys=()))
    assert federation.refusal(SITE, other) == "second-answer"


def test_what_is_refused_of_a_preparation_does_not_stop_the_stage(federation: Federation) -> None:
    confirm, preparation = late_stages(federation)
    past = msgspec.structs.replace(preparation, round=3)
    request = TogetherRequest(stage=confirm, ahead=PrepareRequest(preparation=past))
    reply = federation.ask(SITE, request)
    assert reply.ahead == Refusal(check="round-past-plan")
    assert reply.stage.signature.site == SITE


def test_a_stage_that_is_refused_prepares_nothing(federation: Federation) -> None:
    confirm, preparation = late_stages(federation)
    wrong = msgspec.structs.replace(confirm, survivors=confirm.survivors[1:])
    request = TogetherRequest(stage=wrong, ahead=PrepareRequest(preparation=preparation))
    assert federation.refusal(SITE, request) == "own-site-missing"
    assert not federation.trainers[SITE]._slots._of_jobs
    unmask = UnmaskRequest(context=confirm.context, signatures=())
    request = TogetherRequest(stage=unmask, ahead=PrepareRequest(preparation=preparation))
    assert federation.refusal(SITE, request) == "stage-order"


def test_a_site_takes_one_of_the_two_ways_to_its_vector(federation: Federation) -> None:
    federation.prepares = True
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    request = attempt.requests()[SITE]
    federation.ask(SITE, request)
    other = msgspec.structs.replace(request, adverts=request.adverts[::-1])
    assert federation.refusal(SITE, other) == "second-answer"
