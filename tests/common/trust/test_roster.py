"""A document says what is known about keys, and what another document would change."""

import pytest

from umbel_common.trust.identity import Approver, Identity, Member, Member2, Roster, Roster2
from umbel_common.trust.key_statements import OPERATOR, revoke, rotate
from umbel_common.trust.roster import (
    KeyChange,
    RosterChange,
    RosterDocument,
    SizeChange,
    WeightChange,
    compare,
    with_members,
    without_size,
)

OPERATOR_KEY, NORTH, SOUTH, WEST, NEW, NEWER = (
    Identity(bytes([number]) * 32) for number in range(1, 7)
)


def roster(*, operator: Identity = OPERATOR_KEY, south: Identity = SOUTH) -> Roster:
    members = (Member("north", NORTH.public_key), Member("south", south.public_key))
    return Roster("clinics", operator.public_key, members)


PINNED = RosterDocument(roster())


def test_a_change_is_told_party_by_party() -> None:
    proposed = RosterDocument(
        Roster(
            "clinics",
            NEW.public_key,
            (
                Member("north", NORTH.public_key, 4),
                Member("west", WEST.public_key),
            ),
        )
    )
    assert compare(PINNED, proposed) == RosterChange(
        added=(Member("west", WEST.public_key),),
        removed=(Member("south", SOUTH.public_key),),
        keys=(KeyChange(OPERATOR, OPERATOR_KEY.public_key, NEW.public_key, rotated=False),),
        weights=(WeightChange("north", 1, 4),),
    )


def sized(size: int | None, key: Identity = NORTH, name: str = "north") -> Member2:
    return Member2(name=name, public_key=key.public_key, public_size=size)


def test_a_public_size_is_a_change_like_a_weight() -> None:
    first = with_members(PINNED.roster, (sized(None), sized(500, SOUTH, "south")))
    second = with_members(first, (sized(700), sized(None, SOUTH, "south")))
    assert compare(RosterDocument(first), RosterDocument(second)) == RosterChange(
        sizes=(SizeChange("north", None, 700), SizeChange("south", 500, None))
    )


def test_a_roster_is_of_version_2_only_while_it_says_what_version_1_cannot() -> None:
    roster = with_members(PINNED.roster, (sized(None, SOUTH, "south"), sized(None)))
    assert (roster, roster.digest()) == (PINNED.roster, PINNED.roster.digest())
    assert {type(member) for member in roster.members} == {Member}
    later = with_members(roster, (sized(5),))
    assert isinstance(later, Roster2)
    assert later.digest() != with_members(roster, (sized(6),)).digest()
    assert with_members(later, (without_size(later.members[0]),)) == Roster(
        "clinics", OPERATOR_KEY.public_key, (Member("north", NORTH.public_key),)
    )
    # Approvers stay, whoever comes and goes.
    approver = Approver(name="chief", public_key=WEST.public_key)
    approved = Roster2(
        federation="clinics",
        operator=OPERATOR_KEY.public_key,
        members=(),
        approvers=(approver,),
        approvals=1,
    )
    joined = with_members(approved, PINNED.roster.members)
    assert isinstance(joined, Roster2)
    assert (joined.approvers, joined.approvals) == ((approver,), 1)
    assert {type(member) for member in joined.members} == {Member2}


def test_a_rotation_of_another_federation_cannot_be_in_the_roster() -> None:
    rotation = rotate("banks", "south", SOUTH, NEW)
    with pytest.raises(ValueError, match="another federation"):
        RosterDocument(roster(south=NEW), rotations=(rotation,))
    with pytest.raises(ValueError, match="another federation"):
        RosterDocument(roster(), revocations=(revoke("banks", SOUTH.public_key, SOUTH),))


def test_no_site_may_have_the_operators_name() -> None:
    members = (Member(OPERATOR, NORTH.public_key),)
    with pytest.raises(ValueError, match="no site may be called operator"):
        RosterDocument(Roster("clinics", OPERATOR_KEY.public_key, members))


def test_parties_are_the_operator_and_then_the_sites() -> None:
    assert list(PINNED.parties()) == [OPERATOR, "north", "south"]
    assert PINNED.parties()[OPERATOR] == OPERATOR_KEY.public_key


def test_a_key_is_revoked_whoever_decided_it() -> None:
    document = RosterDocument(
        roster(),
        revocations=(revoke("clinics", NEW.public_key, NEW),),
        revoked_here=(NEWER.public_key,),
    )
    assert document.revoked() == {NEW.public_key, NEWER.public_key}


def test_rotations_lead_forward_over_every_step_and_nowhere_else() -> None:
    chain = (rotate("clinics", "south", NEW, NEWER), rotate("clinics", "south", SOUTH, NEW))
    document = RosterDocument(roster(), rotations=chain)
    old, middle, new = SOUTH.public_key, NEW.public_key, NEWER.public_key
    assert document.leads("south", old, middle)
    assert document.leads("south", old, new)
    assert not document.leads("south", new, old)
    assert not document.leads("south", old, NORTH.public_key)
    assert not document.leads("north", old, new)


def test_a_circle_of_rotations_ends() -> None:
    circle = (rotate("clinics", "south", SOUTH, NEW), rotate("clinics", "south", NEW, SOUTH))
    document = RosterDocument(roster(), rotations=circle)
    assert not document.leads("south", SOUTH.public_key, NEWER.public_key)
