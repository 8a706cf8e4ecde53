"""The pinned file changes whole, under a lock, and keeps the roster that it replaces."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from support.waiting import HANGING

from umbel_client.site.config import ClientConfig, DataConfig, ModelConfig
from umbel_client.site.pinned_roster import (
    Pinned,
    find_document,
    load_pinned,
    pin,
    require_document,
    revoke_here,
    revoke_signed,
)
from umbel_client.site.policy import Policy
from umbel_common.errors import IdentityError, SignatureError, StorageError
from umbel_common.trust.identity import Identity, Member, Roster
from umbel_common.trust.key_statements import revoke
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_to_json

OPERATOR, NORTH, SOUTH, OTHER = (Identity(bytes([number]) * 32) for number in range(1, 5))


def document(*, weight: int = 1) -> RosterDocument:
    members = (Member("north", NORTH.public_key, weight), Member("south", SOUTH.public_key))
    return RosterDocument(Roster("clinics", OPERATOR.public_key, members))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "roster.json"


def config(roster: Path) -> ClientConfig:
    return ClientConfig(
        site="north",
        state="state",
        identity="identity.pem",
        roster=str(roster),
        data=DataConfig("notes.jsonl", 5000),
        model=ModelConfig("model"),
        policy=Policy(),
    )


def test_before_the_first_approval_there_is_no_roster_and_the_remedy_says_how(path: Path) -> None:
    assert find_document(path) is None
    with pytest.raises(IdentityError, match="pinned no roster") as caught:
        load_pinned(config(path))
    assert "roster approve" in caught.value.diagnostics()


def test_what_is_pinned_is_what_the_trainer_loads(path: Path) -> None:
    assert pin(path, None, document()) is None
    assert load_pinned(config(path)) == Pinned(document().roster, frozenset())


def test_every_revoked_key_is_loaded_whoever_revoked_it(path: Path) -> None:
    pin(path, None, document())
    revoke_signed(path, revoke("clinics", SOUTH.public_key, SOUTH), "revocation.json")
    revoke_here(path, OTHER.public_key)
    pinned = load_pinned(config(path))
    assert pinned.revoked == {SOUTH.public_key, OTHER.public_key}
    assert pinned.roster == document().roster


def test_the_roster_before_stays_beside_the_new_one_under_its_digest(path: Path) -> None:
    pin(path, None, document())
    kept = pin(path, document(), document(weight=4))
    assert kept == path.with_name(f"roster-{document().roster.digest().hex()}.json")
    assert require_document(kept) == document()
    assert require_document(path) == document(weight=4)
    assert sorted(path.parent.iterdir()) == sorted([path, kept])


def test_nothing_is_kept_twice_when_only_revocations_were_added(path: Path) -> None:
    pin(path, None, document())
    revoke_here(path, OTHER.public_key)
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_changed_while_it_was_compared_is_not_replaced(path: Path) -> None:
    pin(path, None, document())
    revoke_here(path, OTHER.public_key)
    with pytest.raises(IdentityError, match="changed while it was being compared"):
        pin(path, document(), document(weight=4))
    assert require_document(path).revoked() == {OTHER.public_key}


def test_a_file_that_appeared_meanwhile_is_not_replaced(path: Path) -> None:
    pin(path, None, document())
    with pytest.raises(IdentityError, match="changed while"):
        pin(path, None, document(weight=4))


REVOKES = """
import sys
from pathlib import Path
from umbel_client.site.pinned_roster import revoke_here
for number in range(20):
    while True:
        try:
            revoke_here(Path(sys.argv[1]), bytes([int(sys.argv[2]), number]) + bytes(30))
            break
        except Exception as error:
            assert "changed while" in str(error), error
"""


def test_of_two_processes_that_revoke_at_once_neither_loses_a_key(path: Path) -> None:
    pin(path, None, document())
    children = [
        subprocess.Popen([sys.executable, "-c", REVOKES, str(path), str(number)])
        for number in (1, 2)
    ]
    assert [child.wait(HANGING) for child in children] == [0, 0]
    assert len(require_document(path).revoked_here) == 40


def test_a_folder_that_cannot_be_written_leaves_the_former_roster(path: Path) -> None:
    pin(path, None, document())
    # A folder in the place of the partial file stops the write, whoever runs this.
    path.with_name(f".{path.name}.partial-{os.getpid()}").mkdir()
    with pytest.raises(StorageError) as caught:
        pin(path, document(), msgspec.structs.replace(document(), revoked_here=(bytes(32),)))
    assert caught.value.file == path
    assert require_document(path) == document()


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        pin(tmp_path / "none" / "roster.json", None, document())
    assert caught.value.file == tmp_path / "none" / "roster.json"


def test_a_pinned_file_that_is_damaged_is_not_taken_for_none(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(IdentityError, match="cannot be read"):
        find_document(path)
    path.write_text(document_to_json(document())[:40])
    with pytest.raises(IdentityError, match="malformed"):
        find_document(path)


def test_a_revocation_by_somebody_else_is_not_added(path: Path) -> None:
    pin(path, None, document())
    with pytest.raises(SignatureError):
        revoke_signed(path, revoke("clinics", SOUTH.public_key, OTHER), "revocation.json")
    assert require_document(path).revoked() == frozenset()


def test_revoking_twice_changes_nothing(path: Path) -> None:
    pin(path, None, document())
    revocation = revoke("clinics", SOUTH.public_key, SOUTH)
    revoke_signed(path, revocation, "revocation.json")
    revoke_signed(path, revocation, "revocation.json")
    revoke_here(path, SOUTH.public_key)
    assert require_document(path) == msgspec.structs.replace(document(), revocations=(revocation,))


def test_nothing_can_be_revoked_before_a_roster_is_pinned(path: Path) -> None:
    with pytest.raises(IdentityError, match="pinned no roster"):
        revoke_here(path, SOUTH.public_key)
    assert not path.exists()
