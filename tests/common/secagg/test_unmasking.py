"""Secrets from shares, some of them wrong: every secret is right, or none is recovered."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel_common.errors import RoundAborted
from umbel_common.secagg.messages import KeyAdvert
from umbel_common.secagg.primitives import commit, public_key
from umbel_common.secagg.shamir import draw_element, split
from umbel_common.secagg.unmasking import LostSecrets, Secrets, WrongShare

CONTEXT = bytes(32)


class Revealed:
    """Sites whose secrets are shared, survivors and others, and the shares that each reveals."""

    def __init__(self, size, threshold, revealing, dropped=()):
        self.names = [f"site-{index:02}" for index in range(size)]
        self.threshold = threshold
        self.dropped = set(dropped)
        self.points = {index + 1: self.names[index] for index in revealing}
        self.seeds, self.keys = (
            {name: draw_element(os.urandom) for name in self.names} for _ in range(2)
        )
        self.shares = {
            owner: self.split(self.keys[owner] if owner in self.dropped else self.seeds[owner])
            for owner in self.names
        }

    def split(self, secret):
        points = range(1, len(self.names) + 1)
        shares = dict(zip(points, split(secret, points, self.threshold, os.urandom), strict=True))
        return {point: shares[point] for point in self.points}

    def secrets(self):
        adverts = {
            name: KeyAdvert(
                context=CONTEXT,
                site=name,
                cipher_key=bytes(32),
                mask_key=public_key(self.keys[name]),
                seed_commitment=commit(self.seeds[name], CONTEXT, name),
                ledger_head=bytes(32),
            )
            for name in self.names
        }
        return Secrets(
            context=CONTEXT,
            masks=CONTEXT,
            adverts=adverts,
            threshold=self.threshold,
            sites=self.points,
            seed_shares={o: s for o, s in self.shares.items() if o not in self.dropped},
            key_shares={o: s for o, s in self.shares.items() if o in self.dropped},
        )

    def check(self, recovered):
        """Checks that all secrets are there and right, keys as far as X25519 tells them apart."""
        assert recovered.seeds == {n: s for n, s in self.seeds.items() if n not in self.dropped}
        assert recovered.keys.keys() == self.dropped
        for name in self.dropped:
            assert public_key(recovered.keys[name]) == public_key(self.keys[name])


@st.composite
def federations(draw):
    size = draw(st.integers(2, 12))
    threshold = draw(st.integers(1, size))
    order = draw(st.permutations(range(size)))
    revealing = sorted(order[: draw(st.integers(threshold, size))])
    dropped = draw(st.sets(st.sampled_from([f"site-{index:02}" for index in range(size)])))
    return Revealed(size, threshold, revealing, dropped)


@given(revealed=federations(), data=st.data())
def test_liars_up_to_half_of_the_spare_shares_change_nothing_and_are_named(revealed, data):
    radius = (len(revealed.points) - revealed.threshold) // 2
    expected = []
    for owner in revealed.names:
        liars = data.draw(st.permutations(sorted(revealed.points)))[
            : data.draw(st.integers(0, radius))
        ]
        for point in liars:
            revealed.shares[owner][point] = draw_element(os.urandom)
        expected += [WrongShare(owner, revealed.points[point]) for point in sorted(liars)]
    recovered = revealed.secrets().recover()
    revealed.check(recovered)
    # If no wrong share of a kind was in the way, none was looked for.
    assert set(recovered.wrong_shares) <= set(expected)
    for is_dropped in (False, True):
        named = [w for w in recovered.wrong_shares if (w.owner in revealed.dropped) == is_dropped]
        there = [w for w in expected if (w.owner in revealed.dropped) == is_dropped]
        assert named in ([], there)


@given(revealed=federations(), data=st.data())
def test_whatever_is_revealed_the_secrets_are_right_or_their_owners_are_named(revealed, data):
    wrong = {}
    for owner in revealed.names:
        liars = data.draw(st.sets(st.sampled_from(sorted(revealed.points))))
        for point in liars:
            revealed.shares[owner][point] = draw_element(os.urandom)
        wrong[owner] = len(liars)
    secrets = revealed.secrets()
    tolerated = LostSecrets((), len(revealed.points), revealed.threshold).tolerated
    try:
        revealed.check(secrets.recover())
        return
    except RoundAborted as error:
        abort = error
    named = abort.found.owners
    assert named
    assert all(wrong[owner] > tolerated for owner in named)
    assert abort.check == ("mask-key" if set(named) <= revealed.dropped else "seed-commitment")


@pytest.mark.parametrize("liar", [1, 2, 3, 4])
@pytest.mark.parametrize("dropped", [(), ("site-01",)])
def test_with_one_share_to_spare_any_one_liar_is_tolerated_and_nobody_accused(liar, dropped):
    revealed = Revealed(4, 3, range(4), dropped)
    for shares in revealed.shares.values():
        shares[liar] = draw_element(os.urandom)
    recovered = revealed.secrets().recover()
    revealed.check(recovered)
    assert recovered.wrong_shares == ()


def test_liars_between_whom_no_run_of_sites_is_honest_are_found_by_decoding():
    revealed = Revealed(9, 3, range(9), dropped={"site-08"})
    liars = (1, 4, 7)
    for owner in revealed.names:
        for point in liars:
            revealed.shares[owner][point] = draw_element(os.urandom)
    recovered = revealed.secrets().recover()
    revealed.check(recovered)
    assert sorted((wrong.owner, wrong.site) for wrong in recovered.wrong_shares) == [
        (owner, revealed.points[point]) for owner in revealed.names for point in liars
    ]


def test_two_liars_whose_errors_cancel_do_not_get_an_honest_site_named():
    """The secret of the first shares fits although their polynomial is wrong."""
    revealed = Revealed(5, 3, range(5))
    shares = revealed.shares["site-00"]
    # At zero, the first three shares weigh 3, -3 and 1.
    shares[1], shares[2] = (
        (int.from_bytes(shares[point], "big") + 1).to_bytes(32, "big") for point in (1, 2)
    )
    recovered = revealed.secrets().recover()
    revealed.check(recovered)
    assert recovered.wrong_shares == ()


def test_an_owner_that_hands_out_garbage_is_named_and_nobody_else():
    revealed = Revealed(6, 4, range(6))
    revealed.shares["site-02"] = {point: draw_element(os.urandom) for point in revealed.points}
    with pytest.raises(RoundAborted) as caught:
        revealed.secrets().recover()
    assert caught.value.field == "site-02"
    assert caught.value.found == LostSecrets(("site-02",), revealing=6, threshold=4)


@pytest.mark.parametrize(
    ("revealing", "threshold", "tolerated"),
    [(3, 3, 0), (4, 3, 1), (5, 3, 1), (7, 3, 2), (10, 6, 2), (100, 51, 24)],
)
def test_so_many_wrong_shares_are_tolerated(revealing, threshold, tolerated):
    assert LostSecrets(("site-00",), revealing, threshold).tolerated == tolerated
