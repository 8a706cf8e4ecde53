"""Keys and shares that are prepared: what a site and the server refuse, and what a slot is for."""

import os
from contextlib import nullcontext

import msgspec
import pytest

from umbel_common.canonical import encode
from umbel_common.errors import LocalProtocolError, RemoteProtocolError
from umbel_common.secagg import coordinator
from umbel_common.secagg.masking import prepared_mask_context
from umbel_common.secagg.messages import KeyAdvert, PreparedKeys, preparation_of
from umbel_common.secagg.preparation import prepare
from umbel_common.secagg.preparing import Preparing
from umbel_common.secagg.primitives import public_key
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, sign

ME, PEER, OTHER = "site-00", "site-01", "site-02"


def opened(keys):
    return msgspec.msgpack.decode(keys.statement, type=PreparedKeys)


def signed_again(attempt, keys, /, signer=None, **fields):
    """A site's prepared keys, altered, and signed by `signer` (by default that site)."""
    statement = msgspec.structs.replace(opened(keys), **fields)
    return sign(signer or attempt.identities[opened(keys).site], statement)


ATTACKS_ON_KEYS = {
    "a peer's keys signed by an identity that is not pinned": (
        "pinned-signature",
        lambda attempt, me, peer, *others: (
            me,
            signed_again(attempt, peer, Identity.generate(os.urandom), cipher_key=os.urandom(32)),
            *others,
        ),
    ),
    "keys prepared for another attempt": (
        "other-context",
        lambda attempt, me, peer, *others: (
            me,
            signed_again(attempt, peer, context=os.urandom(32)),
            *others,
        ),
    ),
    "a site that is not in the cohort": (
        "not-in-cohort",
        lambda attempt, *keys: (
            *keys,
            signed_again(attempt, keys[1], Identity.generate(os.urandom), site="site-99"),
        ),
    ),
    "a peer twice": ("duplicate-site", lambda attempt, *keys: (*keys, keys[1])),
    "a colluding peer that repeats another peer's mask key": (
        "duplicate-key",
        lambda attempt, me, peer, other, *others: (
            me,
            signed_again(attempt, peer, mask_key=opened(other).mask_key),
            other,
            *others,
        ),
    ),
    "this site's keys exchanged for others, with its own valid signature": (
        "own-advert",
        lambda attempt, me, *others: (
            signed_again(attempt, me, mask_key=public_key(os.urandom(32))),
            *others,
        ),
    ),
    "a site left out": ("too-few-adverts", lambda attempt, *keys: keys[:-1]),
    "a colluding peer's key of small order": (
        "weak-key",
        lambda attempt, me, peer, *others: (
            me,
            signed_again(attempt, peer, cipher_key=bytes(32)),
            *others,
        ),
    ),
    "an advert in the place of prepared keys": (
        "malformed-message",
        lambda attempt, me, peer, *others: (
            me,
            sign(
                attempt.identities[PEER],
                KeyAdvert(
                    context=opened(peer).context,
                    site=PEER,
                    cipher_key=opened(peer).cipher_key,
                    mask_key=opened(peer).mask_key,
                    seed_commitment=bytes(32),
                    ledger_head=bytes(32),
                ),
            ),
            *others,
        ),
    ),
}

BEHIND = {
    "a site that is not in the cohort": RemoteProtocolError,
    "a peer twice": RemoteProtocolError,
    "a colluding peer's key of small order": RemoteProtocolError,
    "an advert in the place of prepared keys": RemoteProtocolError,
}
"""Attacks that something else also stops; the others are stopped by the check alone."""


@pytest.mark.parametrize(("check", "attack"), ATTACKS_ON_KEYS.values(), ids=ATTACKS_ON_KEYS.keys())
def test_a_site_shares_with_no_other_keys_than_its_peers_prepared(make_attempt, check, attack):
    attempt = make_attempt(4, 3)
    keys = attempt.begin_to_prepare().signed
    slot = attempt.slots[ME]
    with pytest.raises(RemoteProtocolError) as caught:
        slot.fill(attack(attempt, *keys), attempt.roster, os.urandom)
    assert caught.value.check == check
    slot.fill(keys, attempt.roster, os.urandom)


@pytest.mark.parametrize(
    ("name", "check", "attack"),
    [(name, check, attack) for name, (check, attack) in ATTACKS_ON_KEYS.items()],
    ids=ATTACKS_ON_KEYS.keys(),
)
def test_without_the_check_it_shares_with_them(make_attempt, without, name, check, attack):
    attempt = make_attempt(4, 3)
    keys = attack(attempt, *attempt.begin_to_prepare().signed)
    without(check)
    with pytest.raises(BEHIND[name]) if name in BEHIND else nullcontext():
        attempt.slots[ME].fill(keys, attempt.roster, os.urandom)


@pytest.mark.parametrize(
    ("threshold", "colluding", "minimum", "check"),
    [
        (2, 0, 2, "threshold-too-low"),
        (5, 0, 2, "threshold-too-high"),
        (3, 1, 5, "cohort-too-small"),
    ],
)
def test_a_site_prepares_nothing_under_rules_that_do_not_protect_it(
    make_attempt, threshold, colluding, minimum, check
):
    attempt = make_attempt(4, 2)
    rules = Rules(threshold=threshold, colluding=colluding, minimum_cohort=minimum)
    with pytest.raises(RemoteProtocolError) as caught:
        prepare(preparation_of(attempt.header), ME, rules, attempt.identities[ME], os.urandom)
    assert caught.value.check == check


OTHERS = {
    "federation": "banks",
    "job": "another",
    "round": 2,
    "attempt": 2,
    "plan": b"\x01" * 32,
    "roster": b"\x01" * 32,
    "cohort": ("site-00", "site-01", "site-02"),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_slot_fits_no_other_attempt(make_attempt, field):
    attempt = make_attempt(4, 3, prepared=True)
    header = msgspec.structs.replace(attempt.header, **{field: OTHERS[field]})
    with pytest.raises(LocalProtocolError) as caught:
        attempt.slots[ME].advertise(header, attempt.identities[ME], bytes(32))
    assert caught.value.check == "slot"
    with pytest.raises(LocalProtocolError) as caught:
        coordinator.open_attempt(header, attempt.roster, 3, 32, 3, prepared=attempt.prepared)
    assert caught.value.check == "slot"


def test_no_slot_can_be_written_anywhere(make_attempt):
    attempt = make_attempt(4, 3)
    attempt.begin_to_prepare()
    slot = attempt.slots[ME]
    filled = make_attempt(4, 3, prepared=True).slots[ME]
    for value in (slot, filled):
        with pytest.raises((TypeError, NotImplementedError)):
            encode(value)
        assert "secret" not in repr(value)


def test_two_adapters_under_one_preparation_give_masks_that_do_not_cancel(make_attempt):
    """One slot signs one header; here a site is made to sign a second with it."""
    attempt = make_attempt(4, 3, prepared=True)
    slot = attempt.slots["site-03"]
    other = msgspec.structs.replace(attempt.header, adapter=b"\x01" * 32)
    attempt.run_to("mask")
    misled, _ = slot.advertise(other, attempt.identities["site-03"], bytes(32))
    honest = attempt.states["site-03"]
    advertised = msgspec.structs.replace(
        misled.advertised, context=honest.context, advert=honest.advertised.advert
    )
    # It verifies the adverts of the others' header, and masks as for its own.
    verified = advertised.verify(attempt.machine.unseen, attempt.roster)
    keys, others = (
        state.advertised.mask_keys(
            verified, prepared_mask_context(state.context, attempt.machine.unseen)
        )
        for state in (misled, honest)
    )
    assert not set(keys.values()) & set(others.values())


@pytest.mark.parametrize("silent", [(), ("site-02",), ("site-03",)])
def test_a_site_without_its_slot_costs_the_attempt_a_stage_and_nothing_else(make_attempt, silent):
    attempt = make_attempt(4, 3, prepared=True)
    del attempt.slots["site-02"]
    attempt.collect()
    assert attempt.close().again
    attempt.run_to("end", {"mask": silent})
    survivors = [site for site in attempt.header.cohort if site not in silent]
    assert (attempt.machine.total == attempt.plain_sum(survivors)).all()


def test_a_site_that_took_one_way_does_not_take_the_other(make_attempt):
    attempt = make_attempt(4, 3, prepared=True).run_to("mask")
    adverts, shares = attempt.requests()[ME]
    prepared = attempt.states[ME]
    shared, sent = prepared.advertised.receive(adverts, attempt.roster, os.urandom)
    # Shares of one way do not open in the other.
    with pytest.raises(RemoteProtocolError) as caught:
        shared.receive(shares, attempt.vectors[ME].copy())
    assert caught.value.check == "share-decrypt"
    mine = [share for share in sent if share.recipient == PEER]
    theirs = [share for share in attempt.requests()[PEER][1] if share.sender != ME]
    with pytest.raises(RemoteProtocolError) as caught:
        attempt.receive(PEER, (adverts, (*mine, *theirs)))
    assert caught.value.check == "share-decrypt"


def wrong_shares(shares, kind):
    match kind:
        case "one too few":
            return shares[1:]
        case "one twice":
            return (*shares, shares[0])
        case "another's":
            return tuple(msgspec.structs.replace(share, sender=OTHER) for share in shares)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("one too few", "wrong-recipient"),
        ("one twice", "wrong-recipient"),
        ("another's", "wrong-sender"),
    ],
)
def test_the_server_takes_one_share_for_each_peer(make_attempt, kind, check):
    attempt = make_attempt(4, 3)
    machine = attempt.begin_to_prepare()
    _, shares = attempt.slots[ME].fill(machine.signed, attempt.roster, os.urandom)
    with pytest.raises(RemoteProtocolError) as caught:
        machine.receive(ME, wrong_shares(shares, kind))
    assert caught.value.check == check
    with pytest.raises(RemoteProtocolError) as caught:
        machine.receive(ME, shares).receive(ME, shares)
    assert caught.value.check == "second-answer"
    with pytest.raises(RemoteProtocolError) as caught:
        machine.receive("site-99", shares)
    assert caught.value.check == "unexpected-site"
    assert machine.receive(ME, shares).close() is None


@pytest.mark.parametrize(
    ("check", "fields"),
    [
        ("wrong-sender", None),
        ("other-context", {"context": bytes(32)}),
        ("weak-key", {"mask_key": bytes(32)}),
        ("duplicate-key", {"mask_key": "of a peer"}),
    ],
)
def test_the_server_takes_keys_that_every_site_would_take(make_attempt, check, fields):
    attempt = make_attempt(4, 3)
    me, peer, *_ = attempt.begin_to_prepare().signed
    machine = Preparing(preparation_of(attempt.header), attempt.roster).receive(ME, me)
    if fields is None:
        wrong = me
    else:
        known = {"of a peer": opened(me).mask_key}
        wrong = signed_again(
            attempt, peer, **{name: known.get(value, value) for name, value in fields.items()}
        )
    with pytest.raises(RemoteProtocolError) as caught:
        machine.receive(PEER, wrong)
    assert caught.value.check == check
    assert machine.close() is None
