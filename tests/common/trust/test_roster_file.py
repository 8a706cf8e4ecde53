"""A roster written for people reads back as the roster that was pinned."""

import json
from collections.abc import Callable

import pytest

from umbel_common.errors import IdentityError
from umbel_common.trust.identity import Identity, Member, Member2, Roster, Roster2
from umbel_common.trust.key_statements import revoke, rotate
from umbel_common.trust.pinning import merge
from umbel_common.trust.roster import RosterDocument, with_members
from umbel_common.trust.roster_file import (
    document_from_json,
    document_to_json,
    revocation_from_json,
    revocation_to_json,
    roster_from_json,
    roster_to_json,
    rotation_from_json,
    rotation_to_json,
)

MakeFederation = Callable[[int], tuple[Identity, dict[str, Identity], Roster]]

ROSTER = Roster(
    federation="clinics",
    operator=b"\x00" * 31 + b"\xff",
    members=(
        Member(name="north", public_key=b"\x01" * 32),
        Member(name="south", public_key=b"\x02" * 32, weight=4),
    ),
)

FORMER, PRESENT = Identity(b"\x03" * 32), Identity(b"\x04" * 32)
ROTATION = rotate("clinics", "south", FORMER, PRESENT)
REVOCATION = revoke("clinics", FORMER.public_key, PRESENT)
DOCUMENT = RosterDocument(
    ROSTER, rotations=(ROTATION,), revocations=(REVOCATION,), revoked_here=(b"\x05" * 32,)
)


def test_a_roster_survives_its_file(make_federation: MakeFederation) -> None:
    roster = make_federation(5)[2]
    again = roster_from_json(roster_to_json(roster), "roster.json")
    assert again == roster
    assert again.digest() == roster.digest()


def test_the_file_is_readable_json_with_hexadecimal_keys() -> None:
    text = roster_to_json(ROSTER)
    assert json.loads(text) == {
        "federation": "clinics",
        "operator": "00" * 31 + "ff",
        "members": [
            {"name": "north", "public_key": "01" * 32},
            {"name": "south", "public_key": "02" * 32, "weight": 4},
        ],
    }
    assert text.count("\n") > 10
    assert text.endswith("}\n")


def test_a_public_size_survives_the_file_and_a_merge_and_leaves_with_its_site() -> None:
    sized = Member2(name="south", public_key=b"\x02" * 32, public_size=5000)
    roster = with_members(ROSTER, (ROSTER.members[0], sized))
    document = RosterDocument(roster)
    text = document_to_json(document)
    assert json.loads(text)["members"][1]["public_size"] == 5000
    again = document_from_json(text, "roster.json")
    assert (again, type(again.roster)) == (document, Roster2)
    assert merge(document, document, "roster.json") == document
    # Who left is remembered by key and weight, in a file that reads back.
    alone = merge(document, RosterDocument(with_members(roster, roster.members[:1])), "roster.json")
    assert alone.departed == (Member("south", b"\x02" * 32),)
    assert document_from_json(document_to_json(alone), "roster.json") == alone


@pytest.mark.parametrize("size", ["0", "-1", "1000000001", '"many"', "1.5"])
def test_a_wrong_public_size_is_refused(size: str) -> None:
    text = roster_to_json(ROSTER).replace('"weight": 4', f'"public_size": {size}')
    with pytest.raises(IdentityError) as caught:
        roster_from_json(text, "roster.json")
    assert "public_size" in caught.value.diagnostics()


def test_the_order_of_members_in_the_file_does_not_matter() -> None:
    entry = json.loads(roster_to_json(ROSTER))
    entry["members"].reverse()
    assert roster_from_json(json.dumps(entry), "roster.json") == ROSTER


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"weight"', '"wieght"', "wieght"),
        ('"weight": 4', '"weight": 65', "weight"),
        ('"north"', '"North"', "name"),
        ('"south"', '"north"', "unique"),
        ("02" * 32, "01" * 32, "share one key"),
        ("02" * 32, "00" * 31 + "ff", "share one key"),
        ("02" * 32, "02" * 31, "64 hexadecimal digits"),
        ("02" * 32, "zz" * 32, "64 hexadecimal digits"),
        ('"federation"', '"federal"', "federa"),
        ("{", "", "malformed"),
        ('"weight": 4', '"weight": 4, "weight": 5', "`weight` twice"),
        ('"federation"', '"federation": "x", "federation"', "`federation` twice"),
    ],
)
def test_a_wrong_roster_is_refused_by_file_and_reason(old: str, new: str, part: str) -> None:
    text = roster_to_json(ROSTER)
    assert old in text
    with pytest.raises(IdentityError) as caught:
        roster_from_json(text.replace(old, new, 1), "roster.json")
    assert caught.value.file == "roster.json"
    assert part in caught.value.diagnostics()


def test_what_is_known_about_keys_survives_the_file_with_its_signatures() -> None:
    again = document_from_json(document_to_json(DOCUMENT), "roster.json")
    assert again == DOCUMENT
    assert again.rotations[0].verifies()
    assert again.revocations[0].verifies()


def test_statements_in_a_roster_file_leave_the_rosters_digest_as_it_is() -> None:
    assert roster_from_json(document_to_json(DOCUMENT), "roster.json").digest() == ROSTER.digest()


def test_statements_are_readable_and_stand_in_the_roster_as_in_their_own_files() -> None:
    text = document_to_json(DOCUMENT)
    whole = json.loads(text)
    assert whole["rotations"] == [json.loads(rotation_to_json(ROTATION))]
    assert whole["revocations"] == [json.loads(revocation_to_json(REVOCATION))]
    assert whole["revoked_here"] == ["05" * 32]
    assert whole["rotations"][0] == {
        "federation": "clinics",
        "party": "south",
        "old_key": FORMER.public_key.hex(),
        "new_key": PRESENT.public_key.hex(),
        "signature_by_old_key": ROTATION.by_old.hex(),
        "signature_by_new_key": ROTATION.by_new.hex(),
    }


def test_rotations_and_revocations_survive_their_own_files() -> None:
    assert rotation_from_json(rotation_to_json(ROTATION), "rotation.json") == ROTATION
    assert revocation_from_json(revocation_to_json(REVOCATION), "revocation.json") == REVOCATION


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (ROTATION.by_old.hex(), ROTATION.by_old.hex()[2:], "128 hexadecimal digits"),
        (ROTATION.rotation.new_key.hex(), "00", "64 hexadecimal digits"),
        (ROTATION.rotation.new_key.hex(), FORMER.public_key.hex(), "two different keys"),
        ('"party": "south"', '"party": "South"', "party"),
        ('"signature_by_old_key"', '"signature"', "signature"),
        ('"clinics",\n      "party"', '"banks",\n      "party"', "another federation"),
        ('"clinics",\n      "key"', '"banks",\n      "key"', "another federation"),
        ("05" * 32, "05" * 31, "64 hexadecimal digits"),
        ('"north"', '"operator"', "no site may be called operator"),
    ],
)
def test_a_wrong_statement_is_refused_by_file_and_reason(old: str, new: str, part: str) -> None:
    text = document_to_json(DOCUMENT)
    assert old in text
    with pytest.raises(IdentityError) as caught:
        document_from_json(text.replace(old, new, 1), "roster.json")
    assert caught.value.file == "roster.json"
    assert part in caught.value.diagnostics()


def test_a_file_of_one_kind_is_not_read_as_another() -> None:
    with pytest.raises(IdentityError, match="a revocation file is malformed"):
        revocation_from_json(rotation_to_json(ROTATION), "rotation.json")
    with pytest.raises(IdentityError, match="a rotation file is malformed"):
        rotation_from_json(revocation_to_json(REVOCATION), "revocation.json")
    with pytest.raises(IdentityError, match="a roster file is malformed"):
        document_from_json(rotation_to_json(ROTATION), "rotation.json")
