"""`umbel-client roster` as its users meet it: at a terminal, without one, and on disk."""

import io
import json
import os
import pty
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import warm_python
from support.waiting import HANGING
from typer.testing import CliRunner, Result

from umbel_client.cli.command import app
from umbel_client.cli.roster_view import print_roster
from umbel_client.site.pinned_roster import require_document
from umbel_common.errors import IdentityError, SignatureError, StorageError, UmbelError
from umbel_common.trust.identity import Identity, Member, Member2, Roster, fingerprint
from umbel_common.trust.key_statements import OPERATOR, revoke, rotate
from umbel_common.trust.roster import RosterDocument, with_members
from umbel_common.trust.roster_file import (
    document_from_json,
    document_to_json,
    revocation_to_json,
    rotation_to_json,
)
from umbel_host.entry import exit_code
from umbel_host.files.keys import read_identity, write_identity
from umbel_host.terminal import Screen

OPERATOR_KEY, NORTH, SOUTH, NEW, THIEF = (Identity(bytes([number]) * 32) for number in range(1, 6))

QUESTION = "Type yes to approve: "

CLIENT_TOML = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"
[data]
path = "notes.jsonl"
public_size = 5000
[model]
path = "model"
[policy]
"""


def document(south: Identity = SOUTH, **known: object) -> RosterDocument:
    members = (Member("north", NORTH.public_key), Member("south", south.public_key, 2))
    roster = Roster("clinics", OPERATOR_KEY.public_key, members)
    return RosterDocument(roster, **known)  # type: ignore[arg-type]  # forwarded by name


def digest(of: RosterDocument) -> str:
    return of.roster.digest().hex()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the site north, where its administrator works; nothing is pinned yet."""
    (tmp_path / "client.toml").write_text(CLIENT_TOML)
    write_identity(tmp_path / "identity.pem", NORTH)
    write(tmp_path / "proposed.json", document())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pinned(site: Path) -> Path:
    """The same folder with a roster pinned."""
    assert run(f"roster approve proposed.json --digest {digest(document())}").exit_code == 0
    return site


def write(path: Path, proposed: RosterDocument) -> None:
    path.write_text(document_to_json(proposed))


def run(line: str) -> Result:
    return CliRunner().invoke(app, line.split(), env={"COLUMNS": "80"})


def refused(line: str, kind: type[UmbelError]) -> UmbelError:
    """The error of a command, which `exit_code` turns into text and a code."""
    error = run(line).exception
    assert type(error) is kind
    return error


@contextmanager
def terminal(line: str) -> Iterator[tuple[warm_python.Process, int]]:
    """A command at a terminal of its own, and the descriptor of screen and keyboard."""
    ours, theirs = pty.openpty()
    child = warm_python.start(
        *("-m", "umbel_client.cli", *line.split()),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "80", "TERM": "dumb"},
    )
    os.close(theirs)
    try:
        yield child, ours
    finally:
        os.close(ours)
        child.wait()


def read_until(descriptor: int, end: str) -> str:
    """The screen until `end` is on it, or nothing more comes."""
    screen = b""
    while end.encode() not in screen:
        try:
            screen += os.read(descriptor, 65536)
        except OSError:  # the command has ended
            break
    return screen.decode()


def wait_until_it_reads(pid: int) -> None:
    """Returns when a process that has asked its question sleeps until an answer comes.

    Python does not notice an interrupt that comes just before it begins to read.
    """
    deadline = time.monotonic() + HANGING
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def approve_at_terminal(typed: str) -> tuple[int, str]:
    """Exit code and screen of `roster approve` where a person types this at the question."""
    with terminal("roster approve proposed.json") as (child, keyboard):
        screen = read_until(keyboard, QUESTION)
        os.write(keyboard, typed.encode())
        screen += read_until(keyboard, "never on the screen")
    return child.returncode, screen


def test_show_lists_everyone_with_a_fingerprint_on_one_line(pinned: Path) -> None:
    lines = run("roster show").stdout.splitlines()
    assert any(digest(document()) in line for line in lines)
    for party, key in document().parties().items():
        assert any(line.startswith(party) and fingerprint(key) in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_the_longest_name_folds_and_the_fingerprints_stay_whole_and_aligned(site: Path) -> None:
    members = (Member("a" * 64, SOUTH.public_key, 64), Member("north", NORTH.public_key))
    roster = Roster("clinics", OPERATOR_KEY.public_key, members)
    proposed = RosterDocument(roster, revoked_here=(SOUTH.public_key,))
    write(site / "long.json", proposed)
    piped = run("roster show long.json").stdout.splitlines()
    own = fingerprint(SOUTH.public_key)
    assert any(line.startswith("a" * 64) and own in line for line in piped)
    shown = io.StringIO()
    print_roster(Screen(file=shown, width=80), proposed, "north")
    lines = shown.getvalue().splitlines()
    table = [line for line in lines if not line.startswith("digest")]
    assert max(len(line.rstrip()) for line in table) <= 80
    columns = {
        line.index(fingerprint(key))
        for key in proposed.parties().values()
        for line in table
        if fingerprint(key) in line and not line.startswith(fingerprint(key))
    }
    assert len(columns) == 1
    assert "REVOKED" in "".join(table)


def test_nothing_is_shown_where_nothing_is_pinned(site: Path) -> None:
    assert "pinned no roster" in refused("roster show", IdentityError).message


def test_diff_shows_a_change_and_changes_nothing(pinned: Path) -> None:
    rotation = rotate("clinics", "south", SOUTH, NEW)
    write(pinned / "next.json", document(NEW, rotations=(rotation,)))
    before = (pinned / "roster.json").read_bytes()
    shown = run("roster diff next.json").stdout
    assert re.search(rf"- +south +{fingerprint(SOUTH.public_key)} +old key", shown)
    assert re.search(rf"\+ +south +{fingerprint(NEW.public_key)} +rotated by old key", shown)
    assert (pinned / "roster.json").read_bytes() == before


def test_a_public_size_is_shown_before_it_is_approved(pinned: Path) -> None:
    assert "public size" not in run("roster show").stdout
    north = document().roster.members[0]
    south = Member2(name="south", public_key=SOUTH.public_key, weight=2, public_size=4000)
    west = Member2(name="west", public_key=NEW.public_key, public_size=300)
    proposed = RosterDocument(with_members(document().roster, (north, south, west)))
    write(pinned / "sized.json", proposed)
    shown = run("roster diff sized.json").stdout
    assert "public size of south: none -> 4,000" in shown
    assert "weight 1, public size 300" in shown
    assert run(f"roster approve sized.json --digest {digest(proposed)}").exit_code == 0
    assert "Everyone stays" in run("roster diff sized.json").stdout
    assert re.search(r"south +\S+ +2 +4,000", run("roster show").stdout)
    told = json.loads(run("roster show --json").stdout)["parties"]
    assert [one["public_size"] for one in told] == [None, None, 4000, 300]


def test_diff_shouts_where_a_key_changed_without_the_old_one(pinned: Path) -> None:
    write(pinned / "next.json", document(THIEF))
    shown = run("roster diff next.json").stdout
    assert re.search(rf"\+ +south +{fingerprint(THIEF.public_key)} +NOT BY OLD KEY", shown)


def test_diff_tells_what_the_sender_revoked_by_its_own_decision(pinned: Path) -> None:
    write(pinned / "next.json", document(revoked_here=(THIEF.public_key,)))
    shown = run("roster diff next.json").stdout
    assert f"revoked {fingerprint(THIEF.public_key)} by its own\ndecision" in shown


def test_a_person_who_types_yes_approves(site: Path) -> None:
    code, screen = approve_at_terminal("yes\n")
    assert code == 0, screen
    assert screen.index(fingerprint(SOUTH.public_key)) < screen.index(QUESTION)
    assert require_document(site / "roster.json") == document()


@pytest.mark.parametrize("typed", ["y\n", "YES\n", "no\n", "\n", " yes\n", "\x04"])
def test_a_person_who_types_anything_else_changes_nothing(site: Path, typed: str) -> None:
    code, screen = approve_at_terminal(typed)
    assert code == 1, screen
    assert "nothing was changed" in screen
    assert not (site / "roster.json").exists()


def test_who_interrupts_the_question_changes_nothing(site: Path) -> None:
    with terminal("roster approve proposed.json") as (child, screen):
        read_until(screen, QUESTION)
        wait_until_it_reads(child.pid)
        child.send_signal(signal.SIGINT)
        assert "interrupted" in read_until(screen, "interrupted")
    assert child.returncode == 130
    assert not (site / "roster.json").exists()


@pytest.mark.parametrize("stdin", ["yes\n", ""])
def test_without_a_terminal_and_a_digest_nothing_is_approved(site: Path, stdin: str) -> None:
    done = warm_python.run(
        *("-m", "umbel_client.cli", "roster", "approve", "proposed.json"), input=stdin
    )
    assert done.returncode == IdentityError.exit_code
    assert "nothing was changed" in done.stderr
    assert not (site / "roster.json").exists()


def test_a_digest_approves_exactly_its_roster_and_no_other(site: Path) -> None:
    write(site / "other.json", document(THIEF))
    error = refused(f"roster approve other.json --digest {digest(document())}", IdentityError)
    assert (error.field, error.found) == ("--digest", digest(document(THIEF)))
    assert not (site / "roster.json").exists()
    prefix = digest(document())[:16]
    refused(f"roster approve proposed.json --digest {prefix}", IdentityError)
    assert run(f"roster approve proposed.json --digest {digest(document())}").exit_code == 0
    assert require_document(site / "roster.json") == document()


def test_a_digest_does_not_replace_the_rules(pinned: Path) -> None:
    write(pinned / "next.json", document(THIEF))
    line = f"roster approve next.json --digest {digest(document(THIEF))}"
    assert "--accept-new-key south" in refused(line, IdentityError).diagnostics()
    assert require_document(pinned / "roster.json") == document()
    assert run(f"{line} --accept-new-key south").exit_code == 0
    assert require_document(pinned / "roster.json") == document(THIEF)


def test_approving_keeps_the_roster_before(pinned: Path) -> None:
    write(pinned / "next.json", document(NEW, rotations=(rotate("clinics", "south", SOUTH, NEW),)))
    shown = run(f"roster approve next.json --digest {digest(document(NEW))}")
    kept = pinned / f"roster-{digest(document())}.json"
    assert str(kept) in shown.stdout
    assert require_document(kept) == document()


def test_the_pinned_roster_needs_no_second_approval(pinned: Path) -> None:
    shown = run("roster approve proposed.json")
    assert shown.exit_code == 0
    assert "pinned already" in shown.stdout


def test_an_old_roster_is_not_approved_again_after_a_rotation_or_revocation(pinned: Path) -> None:
    (pinned / "rotation.json").write_text(rotation_to_json(rotate("clinics", "south", SOUTH, NEW)))
    run("roster propose rotation.json --out next.json")
    assert run(f"roster approve next.json --digest {digest(document(NEW))}").exit_code == 0
    line = f"roster approve proposed.json --digest {digest(document())} --accept-new-key south"
    assert "rotated away" in refused(line, IdentityError).message
    assert run(f"roster revoke --key {fingerprint(SOUTH.public_key)}").exit_code == 0
    assert "was revoked" in refused(line, IdentityError).message
    assert require_document(pinned / "roster.json").roster == document(NEW).roster


def test_a_proposal_never_writes_over_a_file(pinned: Path) -> None:
    (pinned / "rotation.json").write_text(rotation_to_json(rotate("clinics", "south", SOUTH, NEW)))
    refused("roster propose rotation.json --out roster.json", StorageError)
    assert require_document(pinned / "roster.json") == document()


def test_a_sites_own_rotation_from_key_to_pinned_roster(pinned: Path) -> None:
    run("rotate --old identity.pem --new new.pem --federation clinics --site north --out r.json")
    run("roster propose r.json --out next.json")
    proposed = document_from_json((pinned / "next.json").read_text(), "next.json")
    line = f"roster approve next.json --digest {digest(proposed)}"
    assert "not in its key file" in refused(line, IdentityError).message
    (pinned / "client.toml").write_text(CLIENT_TOML.replace("identity.pem", "new.pem"))
    assert run(line).exit_code == 0
    key = read_identity(pinned / "new.pem").public_key
    assert require_document(pinned / "roster.json").parties()["north"] == key


def test_a_signed_revocation_is_added_and_names_whose_key_it_was(pinned: Path) -> None:
    (pinned / "r.json").write_text(
        revocation_to_json(revoke("clinics", SOUTH.public_key, OPERATOR_KEY))
    )
    assert "south" in run("roster revoke r.json").stdout
    assert require_document(pinned / "roster.json").revoked() == {SOUTH.public_key}
    assert re.search(r"south .*REVOKED", run("roster show").stdout)


def test_a_revocation_by_a_stranger_ends_with_the_code_of_signatures(pinned: Path) -> None:
    (pinned / "r.json").write_text(revocation_to_json(revoke("clinics", SOUTH.public_key, THIEF)))
    refused("roster revoke r.json", SignatureError)
    assert require_document(pinned / "roster.json").revoked() == frozenset()


@pytest.mark.parametrize("name", [lambda key: fingerprint(key).upper(), lambda key: key.hex()])
def test_a_site_revokes_by_its_own_decision(pinned: Path, name: Callable[[bytes], str]) -> None:
    assert run(f"roster revoke --key {name(OPERATOR_KEY.public_key)}").exit_code == 0
    assert require_document(pinned / "roster.json").revoked_here == (OPERATOR_KEY.public_key,)
    assert OPERATOR in run("roster show").stdout


def test_a_fingerprint_that_nobody_has_revokes_nothing(pinned: Path) -> None:
    error = refused(f"roster revoke --key {fingerprint(THIEF.public_key)}", IdentityError)
    assert error.field == "--key"
    assert require_document(pinned / "roster.json").revoked() == frozenset()


def test_a_file_of_another_party_cannot_move_the_readers_cursor(
    site: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = document_to_json(document()).replace('"operator"', '"\\u001b[2Joperator"')
    (site / "evil.json").write_text(text)
    assert exit_code(lambda: app(["roster", "show", "evil.json"])) == IdentityError.exit_code
    shown = capfd.readouterr().err
    assert "\x1b" not in shown
    assert "\\x1b[2Joperator" in shown


@pytest.mark.parametrize("line", ["roster revoke", "roster revoke r.json --key 00"])
def test_a_revocation_is_a_file_or_a_key_and_not_both(pinned: Path, line: str) -> None:
    assert run(line).exit_code == 2
    assert require_document(pinned / "roster.json").revoked() == frozenset()
