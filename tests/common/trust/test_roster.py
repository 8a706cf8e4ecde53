"""A document says what is known about keys, and what another document would change."""

import pytest

from umbel_common.trust.identity import Identity, Member, Roster
from umbel_common.trust.key_statements import OPERATOR, revoke, rotate
from umbel_common.trust.roster import (
    KeyChange,
    RosterChange,
    RosterDocument,
    WeightChange,
    compare,
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
