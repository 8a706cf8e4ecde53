"""A malicious server, or peer, against one site: every refusal, and the honest run beside it.

Each attack takes an honest attempt at some stage and the honest request to the site `ME`, and gives
the request that the attacker sends in its place.
"""

import os
from contextlib import nullcontext
from functools import partial

import msgspec
import numpy as np
import pytest

from umbel_common.canonical import encode
from umbel_common.errors import IdentityError, LocalProtocolError, RemoteProtocolError
from umbel_common.secagg import participant
from umbel_common.secagg.messages import KeyAdvert, Survivors, SurvivorSignature
from umbel_common.secagg.primitives import public_key, seal, share_binding
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, sign

ME, PEER, OTHER = "site-00", "site-01", "site-02"
SIZE, THRESHOLD = 5, 4


def changed(value, **fields):
    return msgspec.structs.replace(value, **fields)


def opened(advert):
    return msgspec.msgpack.decode(advert.statement, type=KeyAdvert)


def by_site(adverts):
    return {opened(advert).site: advert for advert in adverts}


def replaced(attempt, adverts, site, signer=None, **fields):
    """The adverts, with one site's altered and signed by `signer` (by default that site)."""
    statement = changed(opened(by_site(adverts)[site]), **fields)
    forged = sign(signer or attempt.identities[site], statement)
    return tuple({**by_site(adverts), site: forged}.values())


def with_top_bit(key):
    return key[:31] + bytes([key[31] | 0x80])


ATTACKS_ON_ADVERTS = {
    "a peer's keys signed by an identity that is not pinned": (
        "pinned-signature",
        lambda attempt, adverts: replaced(
            attempt, adverts, PEER, Identity.generate(os.urandom), mask_key=os.urandom(32)
        ),
    ),
    "a peer's keys signed by another member of the cohort": (
        "pinned-signature",
        lambda attempt, adverts: replaced(attempt, adverts, PEER, attempt.identities[OTHER]),
    ),
    "a site that is not in the cohort": (
        "not-in-cohort",
        lambda attempt, adverts: (
            *adverts,
            sign(Identity.generate(os.urandom), changed(opened(adverts[0]), site="site-99")),
        ),
    ),
    "a peer twice": ("duplicate-site", lambda attempt, adverts: (*adverts, adverts[1])),
    "a peer twice, with other keys": (
        "duplicate-site",
        lambda attempt, adverts: (
            *adverts,
            sign(
                attempt.identities[PEER],
                changed(opened(adverts[1]), cipher_key=os.urandom(32), mask_key=os.urandom(32)),
            ),
        ),
    ),
    "a colluding peer that repeats another peer's mask key": (
        "duplicate-key",
        lambda attempt, adverts: replaced(
            attempt, adverts, PEER, mask_key=opened(by_site(adverts)[OTHER]).mask_key
        ),
    ),
    "a colluding peer that repeats it with the bit set that X25519 ignores": (
        "duplicate-key",
        lambda attempt, adverts: replaced(
            attempt,
            adverts,
            PEER,
            mask_key=with_top_bit(opened(by_site(adverts)[OTHER]).mask_key),
        ),
    ),
    "a colluding peer whose cipher key is this site's mask key": (
        "duplicate-key",
        lambda attempt, adverts: replaced(
            attempt, adverts, PEER, cipher_key=opened(by_site(adverts)[ME]).mask_key
        ),
    ),
    "this site's keys left out": (
        "own-advert",
        lambda attempt, adverts: tuple(
            advert for site, advert in by_site(adverts).items() if site != ME
        ),
    ),
    "this site's keys of another occasion, with its own valid signature": (
        "own-advert",
        lambda attempt, adverts: replaced(attempt, adverts, ME, mask_key=os.urandom(32)),
    ),
    "a peer's keys of another attempt": (
        "other-context",
        lambda attempt, adverts: replaced(attempt, adverts, PEER, context=os.urandom(32)),
    ),
    "fewer peers than the threshold": (
        "too-few-adverts",
        lambda attempt, adverts: adverts[: THRESHOLD - 1],
    ),
    "a colluding peer's key of small order": (
        "weak-key",
        lambda attempt, adverts: replaced(attempt, adverts, PEER, mask_key=bytes(32)),
    ),
    "a signed statement that is not canonical": (
        "malformed-message",
        lambda attempt, adverts: (
            *adverts[1:],
            changed(adverts[0], statement=adverts[0].statement + b"\0"),
        ),
    ),
}


def altered(shares, sender, /, **fields):
    return tuple(changed(share, **fields) if share.sender == sender else share for share in shares)


def flipped(ciphertext):
    return ciphertext[:-1] + bytes([ciphertext[-1] ^ 1])


def peers_share_of(attempt, shares, data, context=None):
    """The shares, with PEER's holding `data` under the key that it really has with ME."""
    state = attempt.states[ME]
    key = next(peer.opening_key for peer in state.peers if peer.peer == PEER)
    bound = share_binding(context or attempt.share_context, PEER, ME)
    return altered(shares, PEER, ciphertext=seal(key, data, bound, os.urandom))


ATTACKS_ON_SHARES = {
    "a share for another site": (
        "wrong-recipient",
        lambda attempt, shares: altered(shares, PEER, recipient=OTHER),
    ),
    "one sender twice": ("duplicate-site", lambda attempt, shares: (*shares, shares[0])),
    "a share of a site that never advertised keys": (
        "not-nested",
        lambda attempt, shares: altered(shares, PEER, sender="site-99"),
    ),
    "a share that this site is said to have sent to itself": (
        "not-nested",
        lambda attempt, shares: (*shares, changed(shares[0], sender=ME)),
    ),
    "fewer senders than the threshold": (
        "too-few-shares",
        lambda attempt, shares: shares[: THRESHOLD - 2],
    ),
    "a share with one bit flipped": (
        "share-decrypt",
        lambda attempt, shares: altered(shares, PEER, ciphertext=flipped(shares[0].ciphertext)),
    ),
    "two senders' shares exchanged": (
        "share-decrypt",
        lambda attempt, shares: (
            changed(shares[0], ciphertext=shares[1].ciphertext),
            changed(shares[1], ciphertext=shares[0].ciphertext),
            *shares[2:],
        ),
    ),
    "a share bound to another attempt": (
        "share-decrypt",
        lambda attempt, shares: peers_share_of(attempt, shares, bytes(64), os.urandom(32)),
    ),
    "a colluding peer's share past the prime": (
        "share-range",
        lambda attempt, shares: peers_share_of(attempt, shares, bytes(32) + b"\xff" * 32),
    ),
}

ATTACKS_ON_SURVIVORS = {
    "a survivor twice": ("duplicate-site", lambda attempt, names: (*names, names[-1])),
    "survivors out of order": ("survivor-order", lambda attempt, names: names[::-1]),
    "a survivor that shared nothing": (
        "not-nested",
        lambda attempt, names: (*names, "site-99"),
    ),
    "this site's vector left out of the sum": (
        "own-site-missing",
        lambda attempt, names: tuple(name for name in names if name != ME),
    ),
    "fewer survivors than the threshold": (
        "too-few-survivors",
        lambda attempt, names: names[: THRESHOLD - 1],
    ),
}


def resigned(attempt, signatures, site, signer, **fields):
    """The signatures, with that of one site over an altered survivor set."""
    statement = changed(
        Survivors(context=attempt.context, sites=attempt.states[ME].survivors), **fields
    )
    return tuple(
        SurvivorSignature(site=site, signed=sign(signer, statement))
        if signature.site == site
        else signature
        for signature in signatures
    )


ATTACKS_ON_SIGNATURES = {
    "one signature twice": (
        "duplicate-site",
        lambda attempt, signatures: (*signatures[:3], signatures[0]),
    ),
    "a signature by an identity that is not pinned": (
        "pinned-signature",
        lambda attempt, signatures: resigned(
            attempt, signatures, PEER, Identity.generate(os.urandom)
        ),
    ),
    "one site's signature in another's name": (
        "pinned-signature",
        lambda attempt, signatures: resigned(attempt, signatures, PEER, attempt.identities[OTHER]),
    ),
    "a signature by a site that is no survivor": (
        "not-a-survivor",
        lambda attempt, signatures: (*signatures, changed(signatures[0], site="site-99")),
    ),
    "a signature over another survivor set": (
        "other-survivors",
        lambda attempt, signatures: resigned(
            attempt, signatures, PEER, attempt.identities[PEER], sites=(ME, PEER)
        ),
    ),
    "a signature of another attempt": (
        "other-context",
        lambda attempt, signatures: resigned(
            attempt, signatures, PEER, attempt.identities[PEER], context=os.urandom(32)
        ),
    ),
    "fewer signatures than the threshold": (
        "too-few-signatures",
        lambda attempt, signatures: signatures[: THRESHOLD - 1],
    ),
}

BEHIND = {
    "a site that is not in the cohort": RemoteProtocolError,
    "a peer twice": RemoteProtocolError,
    "a peer twice, with other keys": LocalProtocolError,
    "fewer peers than the threshold": LocalProtocolError,
    "a colluding peer's key of small order": RemoteProtocolError,
    "a signed statement that is not canonical": RemoteProtocolError,
    "a share of a site that never advertised keys": KeyError,
    "a share that this site is said to have sent to itself": KeyError,
    "a share with one bit flipped": AssertionError,
    "two senders' shares exchanged": AssertionError,
    "a share bound to another attempt": AssertionError,
    "a survivor twice": ValueError,
    "survivors out of order": ValueError,
    "a signature by a site that is no survivor": IdentityError,
}
"""Attacks that something else also stops, if only by chance; the others are stopped by the check
alone."""

IN_PREPARED = {"a colluding peer's key of small order": "other-keys"}
"""Checks that come first in a prepared attempt."""

BEHIND_PREPARED = {
    "adverts: a peer twice, with other keys": None,
    "adverts: fewer peers than the threshold": RemoteProtocolError,
}
"""As `BEHIND`, where it differs in a prepared attempt."""

ATTACKS = [
    (stage, name, check, attack)
    for stage, attacks in (
        ("share", ATTACKS_ON_ADVERTS),
        ("mask", ATTACKS_ON_SHARES),
        ("confirm", ATTACKS_ON_SURVIVORS),
        ("reveal", ATTACKS_ON_SIGNATURES),
    )
    for name, (check, attack) in attacks.items()
]


@pytest.mark.parametrize(
    ("stage", "check", "attack"),
    [(stage, check, attack) for stage, _, check, attack in ATTACKS],
    ids=[f"{stage}: {name}" for stage, name, _, _ in ATTACKS],
)
def test_a_site_refuses(make_attempt, stage, check, attack):
    attempt = make_attempt(SIZE, THRESHOLD).run_to(stage)
    request = attempt.requests()[ME]
    with pytest.raises(RemoteProtocolError) as caught:
        attempt.receive(ME, attack(attempt, request))
    assert caught.value.check == check
    attempt.run_to("end")
    assert (attempt.machine.total == attempt.plain_sum(attempt.header.cohort)).all()


@pytest.mark.parametrize(
    ("stage", "name", "check", "attack"),
    ATTACKS,
    ids=[f"{stage}: {name}" for stage, name, _, _ in ATTACKS],
)
def test_without_the_check_the_attack_is_answered(
    make_attempt, without, stage, name, check, attack
):
    attempt = make_attempt(SIZE, THRESHOLD).run_to(stage)
    request = attack(attempt, attempt.requests()[ME])
    without(check)
    with pytest.raises(BEHIND[name]) if name in BEHIND else nullcontext():
        attempt.receive(ME, request)


def on_adverts(attack, attempt, adverts, shares):
    return attack(attempt, adverts), shares


def on_shares(attack, attempt, adverts, shares):
    return adverts, attack(attempt, shares)


ATTACKS_ON_PREPARED = {
    "a colluding peer's other keys than it prepared": (
        "other-keys",
        lambda attempt, adverts, shares: (
            replaced(attempt, adverts, PEER, mask_key=public_key(os.urandom(32))),
            shares,
        ),
    ),
    **{
        f"adverts: {name}": (IN_PREPARED.get(name, check), partial(on_adverts, attack))
        for name, (check, attack) in ATTACKS_ON_ADVERTS.items()
    },
    **{
        f"shares: {name}": (check, partial(on_shares, attack))
        for name, (check, attack) in ATTACKS_ON_SHARES.items()
    },
}
"""In a prepared attempt, adverts and shares come together."""


@pytest.mark.parametrize(
    ("check", "attack"), ATTACKS_ON_PREPARED.values(), ids=ATTACKS_ON_PREPARED.keys()
)
def test_a_site_of_a_prepared_attempt_refuses(make_attempt, check, attack):
    attempt = make_attempt(SIZE, THRESHOLD, prepared=True).run_to("mask")
    with pytest.raises(RemoteProtocolError) as caught:
        attempt.receive(ME, attack(attempt, *attempt.requests()[ME]))
    assert caught.value.check == check
    attempt.run_to("end")
    assert (attempt.machine.total == attempt.plain_sum(attempt.header.cohort)).all()


@pytest.mark.parametrize(
    ("name", "check", "attack"),
    [(name, check, attack) for name, (check, attack) in ATTACKS_ON_PREPARED.items()],
    ids=ATTACKS_ON_PREPARED.keys(),
)
def test_without_the_check_the_attack_on_a_prepared_attempt_is_answered(
    make_attempt, without, name, check, attack
):
    attempt = make_attempt(SIZE, THRESHOLD, prepared=True).run_to("mask")
    request = attack(attempt, *attempt.requests()[ME])
    # It stops most of what is done to keys by itself.
    without(check, "other-keys")
    expected = BEHIND_PREPARED.get(name, BEHIND.get(name.partition(": ")[2]))
    with pytest.raises(expected) if expected else nullcontext():
        attempt.receive(ME, request)


@pytest.mark.parametrize(
    ("size", "threshold", "colluding", "minimum", "check"),
    [
        (4, 2, 0, 2, "threshold-too-low"),
        (5, 3, 1, 2, "threshold-too-low"),
        (4, 5, 0, 2, "threshold-too-high"),
        (4, 3, 1, 5, "cohort-too-small"),
    ],
)
def test_a_site_does_not_advertise_under_rules_that_do_not_protect_it(
    make_attempt, size, threshold, colluding, minimum, check
):
    header = make_attempt(size, 2).header
    rules = Rules(threshold=threshold, colluding=colluding, minimum_cohort=minimum)
    with pytest.raises(RemoteProtocolError) as caught:
        participant.advertise(
            header, ME, rules, Identity.generate(os.urandom), bytes(32), os.urandom
        )
    assert caught.value.check == check


@pytest.mark.parametrize(("size", "colluding", "lowest"), [(3, 1, 3), (4, 0, 3), (5, 1, 4)])
def test_the_lowest_threshold_that_two_survivor_sets_cannot_both_reach_is_taken(
    make_attempt, size, colluding, lowest
):
    make_attempt(size, lowest, colluding=colluding).run_to("end")


def test_a_site_outside_the_cohort_does_not_advertise(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD)
    with pytest.raises(RemoteProtocolError) as caught:
        participant.advertise(
            attempt.header,
            "site-99",
            attempt.rules,
            Identity.generate(os.urandom),
            bytes(32),
            os.urandom,
        )
    assert caught.value.check == "not-in-cohort"


@pytest.mark.parametrize(
    ("stage", "check"),
    [
        ("advertise", "too-few-adverts"),
        ("share", "too-few-shares"),
        ("mask", "too-few-survivors"),
    ],
)
def test_the_minimum_cohort_holds_at_every_stage_though_the_threshold_is_lower(
    make_attempt, stage, check
):
    """The policy asks for five sites; the server's threshold for four."""
    attempt = make_attempt(6, 4, minimum_cohort=5)
    stages = ("advertise", "share", "mask", "confirm")
    attempt.run_to(stages[stages.index(stage) + 1], silent={stage: {"site-04", "site-05"}})
    with pytest.raises(RemoteProtocolError) as caught:
        attempt.receive(ME, attempt.requests()[ME])
    assert caught.value.check == check


def test_a_vector_stays_unmasked_when_a_share_is_refused(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("mask")
    shares = attempt.requests()[ME]
    vector = attempt.vectors[ME].copy()
    with pytest.raises(RemoteProtocolError):
        attempt.states[ME].receive(altered(shares, "site-04", ciphertext=bytes(92)), vector)
    assert (vector == attempt.vectors[ME]).all()


def test_a_vector_of_no_ring_is_our_own_mistake(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("mask")
    with pytest.raises(LocalProtocolError):
        attempt.states[ME].receive(attempt.requests()[ME], np.zeros(3))


def test_a_share_made_for_another_recipient_does_not_decrypt(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("mask")
    requests = attempt.requests()
    theirs = next(share for share in requests[OTHER] if share.sender == PEER)
    with pytest.raises(RemoteProtocolError) as caught:
        attempt.receive(ME, altered(requests[ME], PEER, ciphertext=theirs.ciphertext))
    assert caught.value.check == "share-decrypt"


def test_a_state_drops_each_secret_as_soon_as_it_is_not_needed(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD)
    attempt.run_to("share")
    first = attempt.states[ME]
    attempt.run_to("mask")
    shared = attempt.states[ME]
    for secret in (first.cipher_secret, first.mask_secret, first.seed):
        assert secret not in encode(shared)
    attempt.run_to("confirm")
    masked = attempt.states[ME]
    for secret in (shared.self_mask_key, *(peer.mask_key for peer in shared.peers)):
        assert secret not in encode(masked)
    attempt.collect()
    confirmed = attempt.states[ME]
    for share in masked.held:
        assert share.self_mask in encode(confirmed)
        assert share.mask_key not in encode(confirmed)
    attempt.close()
    attempt.collect()
    assert all(share.share not in encode(attempt.states[ME]) for share in confirmed.shares)


def test_a_dropped_out_peer_loses_its_mask_key_share_and_keeps_its_self_mask_hidden(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("confirm", silent={"mask": {PEER}})
    held = {share.owner: share for share in attempt.states[ME].held}
    attempt.collect()
    revealed = {share.owner: share for share in attempt.states[ME].shares}
    assert revealed[PEER].kind == "mask-key"
    assert revealed[PEER].share == held[PEER].mask_key
    assert held[PEER].self_mask not in encode(attempt.states[ME])
    assert sorted(revealed) == list(attempt.header.cohort)


def test_no_secret_is_in_what_a_refusal_says(make_attempt):
    attempt = make_attempt(SIZE, THRESHOLD).run_to("mask")
    with pytest.raises(RemoteProtocolError) as caught:
        attempt.receive(ME, altered(attempt.requests()[ME], PEER, ciphertext=bytes(92)))
    assert str(caught.value) == (
        "a share does not decrypt in the context of this attempt\n  field: site-01"
    )
