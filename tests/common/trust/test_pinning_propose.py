"""A proposal made from a rotation is the pinned roster with one key replaced, or nothing."""

import msgspec
import pytest

from umbel_common.errors import IdentityError, UmbelError
from umbel_common.trust.identity import Identity, Member, Member2, Roster
from umbel_common.trust.key_statements import OPERATOR, SignedRotation, rotate
from umbel_common.trust.pinning import propose
from umbel_common.trust.roster import RosterDocument, with_members

FILE = "rotation.json"
OPERATOR_KEY, NORTH, SOUTH, WEST, NEW, NEWER = (
    Identity(bytes([number]) * 32) for number in range(1, 7)
)


def roster(*, operator: Identity = OPERATOR_KEY, south: Identity = SOUTH) -> Roster:
    members = (Member("north", NORTH.public_key), Member("south", south.public_key))
    return Roster("clinics", operator.public_key, members)


PINNED = RosterDocument(roster())


@pytest.mark.parametrize(("party", "old"), [(OPERATOR, OPERATOR_KEY), ("south", SOUTH)])
def test_a_proposal_is_the_pinned_roster_with_the_rotated_key(party: str, old: Identity) -> None:
    pinned = msgspec.structs.replace(PINNED, revoked_here=(WEST.public_key,))
    rotation = rotate("clinics", party, old, NEW)
    proposed = propose(pinned, rotation, FILE)
    wanted = roster(operator=NEW) if party == OPERATOR else roster(south=NEW)
    assert proposed == RosterDocument(wanted, rotations=(rotation,))


def test_a_proposal_keeps_the_public_sizes() -> None:
    sized = Member2(name="south", public_key=SOUTH.public_key, public_size=900)
    pinned = RosterDocument(with_members(PINNED.roster, (PINNED.roster.members[0], sized)))
    proposed = propose(pinned, rotate("clinics", "south", SOUTH, NEW), FILE)
    changed = msgspec.structs.replace(sized, public_key=NEW.public_key)
    assert proposed.roster == with_members(pinned.roster, (pinned.roster.members[0], changed))
    assert proposed.roster.member("south").public_size == 900


@pytest.mark.parametrize(
    ("rotation", "part"),
    [
        (rotate("clinics", "south", NEW, NEWER), "does not start"),
        (rotate("clinics", "west", SOUTH, NEW), "does not start"),
        (rotate("banks", "south", SOUTH, NEW), "does not start"),
        (rotate("clinics", "south", SOUTH, NORTH), "another party"),
        (
            msgspec.structs.replace(
                rotate("clinics", "south", SOUTH, NEW),
                by_old=rotate("clinics", "south", SOUTH, NEW).by_new,
            ),
            "not signed",
        ),
    ],
)
def test_nothing_is_proposed_from_a_rotation_that_does_not_fit(
    rotation: SignedRotation, part: str
) -> None:
    with pytest.raises(UmbelError, match=part) as caught:
        propose(PINNED, rotation, FILE)
    assert caught.value.file == FILE


def test_nothing_is_proposed_from_a_revoked_key() -> None:
    pinned = msgspec.structs.replace(PINNED, revoked_here=(SOUTH.public_key,))
    with pytest.raises(IdentityError, match="does not start from a good key"):
        propose(pinned, rotate("clinics", "south", SOUTH, NEW), FILE)
