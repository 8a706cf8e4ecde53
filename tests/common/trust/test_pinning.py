"""Which keys a site may come to believe, tested by the attacks that the rules stop."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel_common.errors import IdentityError, SignatureError, UmbelError
from umbel_common.trust.identity import Identity, Member, Roster
from umbel_common.trust.key_statements import OPERATOR, SignedRotation, revoke, rotate
from umbel_common.trust.pinning import check_change, check_revocation, merge
from umbel_common.trust.roster import (
    KeyChange,
    RosterChange,
    RosterDocument,
    compare,
)

OPERATOR_KEY, NORTH, SOUTH, WEST, NEW, NEWER, THIEF = (
    Identity(bytes([number]) * 32) for number in range(1, 8)
)
FILE = "proposed.json"


def roster(
    *, operator: Identity = OPERATOR_KEY, federation: str = "clinics", **sites: Identity
) -> Roster:
    """North and south, unless `sites` says otherwise."""
    keys = {"north": NORTH, "south": SOUTH, **sites}
    members = tuple(Member(name, keys[name].public_key) for name in sorted(keys))
    return Roster(federation, operator.public_key, members)


PINNED = RosterDocument(roster())


def approve(
    pinned: RosterDocument | None,
    proposed: RosterDocument,
    *,
    own: Identity = NORTH,
    accept: tuple[str, ...] = (),
) -> RosterDocument:
    """The document that north has pinned after its approval."""
    merged = merge(pinned, proposed, FILE)
    change = compare(pinned, merged)
    check_change(
        merged,
        change,
        site="north",
        own_key=own.public_key,
        accepted_new_keys=accept,
        file=FILE,
    )
    return merged


def refusal(
    pinned: RosterDocument | None, proposed: RosterDocument, **options: object
) -> UmbelError:
    with pytest.raises(UmbelError) as caught:
        approve(pinned, proposed, **options)  # type: ignore[arg-type]  # forwarded by name
    assert caught.value.file == FILE
    return caught.value


def test_the_first_roster_is_pinned_as_it_is() -> None:
    assert approve(None, PINNED) == PINNED


def test_approving_the_pinned_roster_again_changes_nothing() -> None:
    merged = approve(PINNED, PINNED)
    assert merged == PINNED
    assert compare(PINNED, merged) == RosterChange()


def test_sites_may_come_and_go() -> None:
    assert approve(PINNED, RosterDocument(roster(west=WEST))).parties()["west"] == WEST.public_key
    alone = RosterDocument(
        Roster("clinics", OPERATOR_KEY.public_key, (Member("north", NORTH.public_key),))
    )
    assert list(approve(PINNED, alone).parties()) == [OPERATOR, "north"]


def test_a_roster_of_another_federation_is_refused() -> None:
    error = refusal(PINNED, RosterDocument(roster(federation="banks")))
    assert isinstance(error, IdentityError)
    assert (error.field, error.found, error.accepted) == ("federation", "banks", "clinics")


def test_a_roster_without_this_site_is_refused() -> None:
    members = (Member("south", SOUTH.public_key),)
    error = refusal(PINNED, RosterDocument(Roster("clinics", OPERATOR_KEY.public_key, members)))
    assert "not in the roster" in error.message


@pytest.mark.parametrize("pinned", [None, PINNED])
def test_a_roster_that_lets_another_speak_in_this_sites_name_is_refused(
    pinned: RosterDocument | None,
) -> None:
    proposed = RosterDocument(
        roster(north=NEW), rotations=(rotate("clinics", "north", NORTH, NEW),)
    )
    assert "not in its key file" in refusal(pinned, proposed, accept=("north",)).message


def test_this_sites_own_new_key_needs_no_other_witness_than_its_key_file() -> None:
    proposed = RosterDocument(roster(north=NEW))
    assert approve(PINNED, proposed, own=NEW).parties()["north"] == NEW.public_key


@pytest.mark.parametrize("party", [OPERATOR, "south"])
def test_a_key_that_changed_without_a_rotation_is_refused_with_both_fingerprints(
    party: str,
) -> None:
    error = refusal(PINNED, RosterDocument(replaced(party, THIEF)))
    assert error.field == party
    assert f"--accept-new-key {party}" in error.diagnostics()


def replaced(party: str, key: Identity) -> Roster:
    return roster(operator=key) if party == OPERATOR else roster(**{party: key})


@pytest.mark.parametrize("party", [OPERATOR, "south"])
def test_a_lost_key_is_replaced_when_a_person_accepts_the_new_one(party: str) -> None:
    proposed = RosterDocument(replaced(party, NEW))
    assert approve(PINNED, proposed, accept=(party,)).parties()[party] == NEW.public_key


def test_accepting_one_new_key_does_not_accept_another() -> None:
    error = refusal(PINNED, RosterDocument(roster(operator=THIEF, south=NEW)), accept=("south",))
    assert error.field == OPERATOR


def test_a_new_key_is_accepted_only_where_there_is_one() -> None:
    error = refusal(PINNED, PINNED, accept=("south",))
    assert error.field == "--accept-new-key"


def test_two_sites_do_not_change_places() -> None:
    pinned = RosterDocument(roster(west=WEST))
    swapped = RosterDocument(roster(south=WEST, west=SOUTH))
    assert refusal(pinned, swapped).field == "south"


@pytest.mark.parametrize(("party", "old"), [(OPERATOR, OPERATOR_KEY), ("south", SOUTH)])
def test_a_key_follows_a_rotation_signed_by_the_old_one(party: str, old: Identity) -> None:
    rotation = rotate("clinics", party, old, NEW)
    merged = approve(PINNED, RosterDocument(replaced(party, NEW), rotations=(rotation,)))
    assert merged.parties()[party] == NEW.public_key
    assert compare(PINNED, merged).keys == (
        KeyChange(party, old.public_key, NEW.public_key, rotated=True),
    )


def test_a_site_that_missed_a_rotation_follows_the_chain() -> None:
    chain = (rotate("clinics", "south", NEW, NEWER), rotate("clinics", "south", SOUTH, NEW))
    merged = approve(PINNED, RosterDocument(roster(south=NEWER), rotations=chain))
    assert merged.parties()["south"] == NEWER.public_key


def test_a_chain_with_a_missing_link_leads_nowhere() -> None:
    chain = (rotate("clinics", "south", NEW, NEWER),)
    assert refusal(PINNED, RosterDocument(roster(south=NEWER), rotations=chain)).field == "south"


def forged(party: str, old: Identity, new: Identity) -> SignedRotation:
    """A rotation by somebody who does not have the old key."""
    signed = rotate("clinics", party, THIEF, new)
    rotation = msgspec.structs.replace(signed.rotation, old_key=old.public_key)
    return SignedRotation(
        rotation, by_old=rotate("clinics", party, THIEF, new).by_old, by_new=signed.by_new
    )


def test_a_forged_rotation_is_refused_even_if_the_key_is_accepted() -> None:
    proposed = RosterDocument(roster(south=NEW), rotations=(forged("south", SOUTH, NEW),))
    for accept in ((), ("south",)):
        error = refusal(PINNED, proposed, accept=accept)
        assert isinstance(error, SignatureError)
        assert error.field == "south"


def test_a_rotation_of_another_site_does_not_count() -> None:
    # Signed by south's key, but about west: a check of the keys alone would follow it.
    rotation = rotate("clinics", "west", SOUTH, NEW)
    error = refusal(PINNED, RosterDocument(roster(south=NEW), rotations=(rotation,)))
    assert error.field == "south"


def test_a_rotation_by_a_revoked_key_counts_for_nothing() -> None:
    by_thief = RosterDocument(
        roster(south=THIEF), rotations=(rotate("clinics", "south", SOUTH, THIEF),)
    )
    assert approve(PINNED, by_thief).parties()["south"] == THIEF.public_key
    revocation = revoke("clinics", SOUTH.public_key, OPERATOR_KEY)
    for pinned in (
        RosterDocument(roster(), revocations=(revocation,)),
        RosterDocument(roster(), revoked_here=(SOUTH.public_key,)),
    ):
        assert refusal(pinned, by_thief).field == "south"
    together = msgspec.structs.replace(by_thief, revocations=(revocation,))
    assert refusal(PINNED, together).field == "south"


def test_a_chain_through_a_revoked_key_is_broken() -> None:
    proposed = RosterDocument(
        roster(south=NEWER),
        rotations=(rotate("clinics", "south", SOUTH, NEW), rotate("clinics", "south", NEW, NEWER)),
        revocations=(revoke("clinics", NEW.public_key, NEW),),
    )
    assert refusal(PINNED, proposed).field == "south"


def test_a_key_rotated_to_two_others_is_refused_until_it_is_revoked() -> None:
    honest = RosterDocument(roster(south=NEW), rotations=(rotate("clinics", "south", SOUTH, NEW),))
    by_thief = RosterDocument(
        roster(south=THIEF), rotations=(rotate("clinics", "south", SOUTH, THIEF),)
    )
    deceived = approve(PINNED, by_thief)
    error = refusal(deceived, honest, accept=("south",))
    assert "rotated twice" in error.message
    warned = msgspec.structs.replace(deceived, revoked_here=(SOUTH.public_key,))
    assert refusal(warned, honest).field == "south"
    assert approve(warned, honest, accept=("south",)).parties()["south"] == NEW.public_key


def test_an_old_roster_does_not_bring_back_a_key_that_was_rotated_away() -> None:
    rotated = approve(
        PINNED,
        RosterDocument(roster(south=NEW), rotations=(rotate("clinics", "south", SOUTH, NEW),)),
    )
    for accept in ((), ("south",)):
        assert "rotated away" in refusal(rotated, PINNED, accept=accept).message


def test_rotating_in_a_circle_brings_no_key_back() -> None:
    circle = (rotate("clinics", "south", SOUTH, NEW), rotate("clinics", "south", NEW, SOUTH))
    for proposed in (roster(), roster(south=NEW), roster(south=NEWER)):
        assert refusal(PINNED, RosterDocument(proposed, rotations=circle)).field == "south"


@pytest.mark.parametrize("signer", [SOUTH, OPERATOR_KEY])
def test_a_revoked_key_never_comes_back(signer: Identity) -> None:
    revocation = revoke("clinics", SOUTH.public_key, signer)
    without = RosterDocument(roster(south=NEW), revocations=(revocation,))
    pinned = approve(PINNED, without, accept=("south",))
    assert pinned.revoked() == {SOUTH.public_key}
    for old in (PINNED, RosterDocument(roster(south=NEW, west=SOUTH))):
        error = refusal(pinned, old, accept=("south",))
        assert "was revoked" in error.message


def test_a_roster_that_lists_a_key_and_its_revocation_is_refused() -> None:
    revocation = revoke("clinics", OPERATOR_KEY.public_key, OPERATOR_KEY)
    error = refusal(None, RosterDocument(roster(), revocations=(revocation,)))
    assert (error.field, "was revoked" in error.message) == (OPERATOR, True)


def test_a_revocation_that_the_proposed_roster_leaves_out_stays() -> None:
    revocation = revoke("clinics", THIEF.public_key, OPERATOR_KEY)
    pinned = RosterDocument(roster(), revocations=(revocation,), revoked_here=(NEWER.public_key,))
    merged = approve(pinned, RosterDocument(roster(west=WEST)))
    assert merged.revocations == (revocation,)
    assert merged.revoked() == {THIEF.public_key, NEWER.public_key}


def test_a_new_revocation_is_part_of_the_change() -> None:
    proposed = RosterDocument(
        roster(), revocations=(revoke("clinics", THIEF.public_key, OPERATOR_KEY),)
    )
    assert compare(PINNED, approve(PINNED, proposed)).revoked == (THIEF.public_key,)


def test_what_the_sender_revoked_by_its_own_decision_is_not_taken_over() -> None:
    proposed = RosterDocument(roster(), revoked_here=(SOUTH.public_key,))
    assert approve(PINNED, proposed) == PINNED


def test_a_site_cannot_revoke_another_sites_key() -> None:
    revocation = revoke("clinics", SOUTH.public_key, WEST)
    proposed = RosterDocument(roster(south=NEW, west=WEST), revocations=(revocation,))
    assert isinstance(refusal(PINNED, proposed, accept=("south",)), SignatureError)


def test_a_revocation_whose_signature_does_not_verify_is_refused() -> None:
    signed = revoke("clinics", SOUTH.public_key, THIEF)
    forged_one = msgspec.structs.replace(signed, signer=OPERATOR_KEY.public_key)
    proposed = RosterDocument(roster(south=NEW), revocations=(forged_one,))
    assert isinstance(refusal(PINNED, proposed, accept=("south",)), SignatureError)
    with pytest.raises(SignatureError, match="does not verify"):
        check_revocation(PINNED, forged_one, FILE)


def test_a_single_revocation_counts_by_the_same_rules() -> None:
    check_revocation(PINNED, revoke("clinics", SOUTH.public_key, SOUTH), FILE)
    check_revocation(PINNED, revoke("clinics", SOUTH.public_key, OPERATOR_KEY), FILE)
    with pytest.raises(SignatureError, match="neither"):
        check_revocation(PINNED, revoke("clinics", SOUTH.public_key, WEST), FILE)
    with pytest.raises(IdentityError, match="another federation"):
        check_revocation(PINNED, revoke("banks", SOUTH.public_key, SOUTH), FILE)


def test_what_a_former_operator_key_revoked_reaches_a_site_that_joins_later() -> None:
    document = RosterDocument(
        roster(operator=NEW),
        rotations=(rotate("clinics", OPERATOR, OPERATOR_KEY, NEW),),
        revocations=(revoke("clinics", THIEF.public_key, OPERATOR_KEY),),
    )
    assert approve(None, document).revoked() == {THIEF.public_key}
    assert approve(PINNED, document).revoked() == {THIEF.public_key}


def test_a_former_operator_key_is_known_from_the_pinned_rotation_too() -> None:
    rotation = rotate("clinics", OPERATOR, OPERATOR_KEY, NEW)
    pinned = approve(PINNED, RosterDocument(roster(operator=NEW), rotations=(rotation,)))
    revocation = revoke("clinics", THIEF.public_key, OPERATOR_KEY)
    proposed = RosterDocument(roster(operator=NEW), revocations=(revocation,))
    assert approve(pinned, proposed).revoked() == {THIEF.public_key}


def test_what_is_pinned_stays_when_the_operator_lost_the_key_that_signed_it() -> None:
    revocation = revoke("clinics", THIEF.public_key, OPERATOR_KEY)
    pinned = RosterDocument(roster(), revocations=(revocation,))
    new_operator = RosterDocument(roster(operator=NEW), revocations=(revocation,))
    pinned = approve(pinned, new_operator, accept=(OPERATOR,))
    assert approve(pinned, new_operator).revoked() == {THIEF.public_key}
    assert isinstance(refusal(None, new_operator), SignatureError)


@pytest.mark.parametrize("signer", [OPERATOR_KEY, NEW])
def test_when_the_operator_lost_its_key_both_its_old_and_new_key_revoke(signer: Identity) -> None:
    revocation = revoke("clinics", THIEF.public_key, signer)
    proposed = RosterDocument(roster(operator=NEW), revocations=(revocation,))
    assert approve(PINNED, proposed, accept=(OPERATOR,)).revoked() == {THIEF.public_key}


def test_a_site_that_once_rotated_to_the_operators_key_is_no_operator() -> None:
    proposed = RosterDocument(
        roster(south=NEW),
        rotations=(rotate("clinics", "south", SOUTH, OPERATOR_KEY),),
        revocations=(revoke("clinics", WEST.public_key, SOUTH),),
    )
    assert isinstance(refusal(PINNED, proposed, accept=("south",)), SignatureError)


def test_statements_that_are_pinned_already_are_no_change() -> None:
    document = RosterDocument(
        roster(south=NEW),
        rotations=(rotate("clinics", "south", SOUTH, NEW),),
        revocations=(revoke("clinics", THIEF.public_key, OPERATOR_KEY),),
    )
    pinned = approve(PINNED, document)
    assert approve(pinned, document) == pinned
    assert compare(pinned, pinned) == RosterChange()


KEYS = st.sampled_from((SOUTH, NEW, NEWER, THIEF))
DOCUMENTS = st.builds(
    RosterDocument,
    KEYS.map(lambda south: roster(south=south)),
    rotations=st.lists(
        st.tuples(KEYS, KEYS)
        .filter(lambda pair: pair[0] is not pair[1])
        .map(lambda pair: rotate("clinics", "south", *pair)),
        max_size=2,
    ).map(tuple),
    revocations=st.lists(
        KEYS.map(lambda key: revoke("clinics", key.public_key, OPERATOR_KEY)), max_size=1
    ).map(tuple),
)


@given(st.lists(st.tuples(DOCUMENTS, st.sampled_from(((), ("south",)))), max_size=8))
def test_in_whatever_order_rosters_come_no_dead_key_ever_returns(
    proposals: list[tuple[RosterDocument, tuple[str, ...]]],
) -> None:
    pinned, dead = PINNED, frozenset[bytes]()
    for proposed, accept in proposals:
        former = pinned
        try:
            pinned = approve(former, proposed, accept=accept)
        except UmbelError:
            continue
        before, after = former.parties()["south"], pinned.parties()["south"]
        if accept == () and after != before:
            assert pinned.leads("south", before, after)
        rotated_away = {signed.rotation.old_key for signed in pinned.rotations}
        dead |= pinned.revoked() | rotated_away
        assert former.revoked() <= pinned.revoked()
        assert not dead & set(pinned.parties().values())


def test_a_key_that_the_site_revoked_revokes_nobody_any_more() -> None:
    """A thief of the operator's key could otherwise end every site for good."""
    pinned = msgspec.structs.replace(PINNED, revoked_here=(OPERATOR_KEY.public_key,))
    revocation = revoke("clinics", SOUTH.public_key, OPERATOR_KEY)
    with pytest.raises(SignatureError):
        check_revocation(pinned, revocation, "file")
    check_revocation(PINNED, revocation, "file")
    proposed = RosterDocument(roster(operator=NEW), revocations=(revocation,))
    assert isinstance(refusal(pinned, proposed, accept=(OPERATOR,)), SignatureError)


def test_a_former_operator_key_does_not_revoke_the_present_one() -> None:
    rotation = rotate("clinics", OPERATOR, OPERATOR_KEY, NEW)
    pinned = approve(PINNED, RosterDocument(roster(operator=NEW), rotations=(rotation,)))
    with pytest.raises(SignatureError):
        check_revocation(pinned, revoke("clinics", NEW.public_key, OPERATOR_KEY), "file")
    check_revocation(pinned, revoke("clinics", NEW.public_key, NEW), "file")


def test_a_site_that_comes_back_with_another_key_must_account_for_it() -> None:
    """Two steps that each look harmless: first south leaves, then a thief joins as south."""
    without = Roster("clinics", OPERATOR_KEY.public_key, roster().members[:1])
    pinned = approve(PINNED, RosterDocument(without))
    assert pinned.departed == (roster().member("south"),)
    assert isinstance(refusal(pinned, RosterDocument(roster(south=THIEF))), IdentityError)
    assert approve(pinned, RosterDocument(roster())).departed == ()
    accepted = approve(pinned, RosterDocument(roster(south=NEW)), accept=("south",))
    assert accepted.roster.member("south").public_key == NEW.public_key
    forgetful = RosterDocument(roster(south=THIEF), departed=())
    assert isinstance(refusal(pinned, forgetful), IdentityError)
