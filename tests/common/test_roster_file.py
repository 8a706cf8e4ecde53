"""A roster written for people reads back as the roster that was pinned."""

import json
from collections.abc import Callable

import pytest

from umbel_common.errors import IdentityError
from umbel_common.identity import Identity, Member, Roster
from umbel_common.roster_file import roster_from_json, roster_to_json

MakeFederation = Callable[[int], tuple[Identity, dict[str, Identity], Roster]]

ROSTER = Roster(
    federation="clinics",
    operator=b"\x00" * 31 + b"\xff",
    members=(
        Member(name="north", public_key=b"\x01" * 32),
        Member(name="south", public_key=b"\x02" * 32, weight=4),
    ),
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
    ],
)
def test_a_wrong_roster_is_refused_by_file_and_reason(old: str, new: str, part: str) -> None:
    text = roster_to_json(ROSTER)
    assert old in text
    with pytest.raises(IdentityError) as caught:
        roster_from_json(text.replace(old, new, 1), "roster.json")
    assert caught.value.file == "roster.json"
    assert part in caught.value.diagnostics()
