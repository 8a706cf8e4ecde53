"""`umbel-client` and keys: private keys stay in their files, and nothing is written over."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from umbel_client.cli.command import app
from umbel_common.errors import IdentityError, StorageError, UmbelError
from umbel_common.trust.identity import Identity, fingerprint
from umbel_common.trust.key_statements import revoke
from umbel_common.trust.roster_file import revocation_from_json, rotation_from_json
from umbel_host.files.keys import read_identity, write_identity

OPERATOR_KEY, NORTH, SOUTH = (Identity(bytes([number]) * 32) for number in range(1, 4))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a site's administrator works, with a key file."""
    write_identity(tmp_path / "identity.pem", NORTH)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> Result:
    return CliRunner().invoke(app, line.split(), env={"COLUMNS": "80"})


def refused(line: str, kind: type[UmbelError]) -> UmbelError:
    """The error of a command, which `exit_code` turns into text and a code."""
    error = run(line).exception
    assert type(error) is kind
    return error


def test_keygen_makes_a_key_that_only_its_owner_can_read_and_shows_the_public_part(
    site: Path,
) -> None:
    shown = run("keygen --out new.pem")
    assert shown.exit_code == 0
    assert (site / "new.pem").stat().st_mode & 0o777 == 0o600
    key = read_identity(site / "new.pem").public_key
    assert fingerprint(key) in shown.stdout
    assert key.hex() in shown.stdout
    assert "stays on this machine" in shown.stdout


def test_keygen_never_writes_over_a_key(site: Path) -> None:
    error = refused("keygen", IdentityError)
    assert error.file == Path("identity.pem")
    assert read_identity(site / "identity.pem").public_key == NORTH.public_key


def test_two_keys_are_not_the_same(site: Path) -> None:
    run("keygen --out one.pem")
    run("keygen --out two.pem")
    assert (site / "one.pem").read_bytes() != (site / "two.pem").read_bytes()


@pytest.mark.parametrize("command", ["fingerprint identity.pem", "keygen --out new.pem"])
def test_the_private_part_is_never_shown(site: Path, command: str) -> None:
    shown = run(command)
    path = site / command.split()[-1]
    assert fingerprint(read_identity(path).public_key) in shown.stdout
    secret = read_identity(path).seed().hex()
    base64_body = path.read_text().splitlines()[1]
    assert secret not in shown.output
    assert base64_body[-20:] not in shown.output


def test_a_fingerprint_of_what_is_no_key_file_is_an_error_by_name(site: Path) -> None:
    (site / "notes.txt").touch(mode=0o600)
    assert refused("fingerprint notes.txt", IdentityError).file == Path("notes.txt")


def test_a_rotation_carries_both_signatures_and_a_new_key_file(site: Path) -> None:
    line = "rotate --old identity.pem --new new.pem --federation clinics --site north --out r.json"
    assert run(line).exit_code == 0
    signed = rotation_from_json((site / "r.json").read_text(), "r.json")
    assert signed.verifies()
    assert signed.rotation.old_key == NORTH.public_key
    assert signed.rotation.new_key == read_identity(site / "new.pem").public_key
    assert (signed.rotation.federation, signed.rotation.party) == ("clinics", "north")


def test_a_rotation_that_cannot_be_written_leaves_no_key_behind(site: Path) -> None:
    (site / "r.json").touch()
    line = "rotate --old identity.pem --new new.pem --federation clinics --site north --out r.json"
    assert refused(line, StorageError).file == Path("r.json")
    assert not (site / "new.pem").exists()


def test_a_rotation_never_writes_over_a_key(site: Path) -> None:
    line = "rotate --old identity.pem --new identity.pem --federation clinics --site north"
    refused(f"{line} --out r.json", IdentityError)
    assert read_identity(site / "identity.pem").public_key == NORTH.public_key
    assert not (site / "r.json").exists()


def test_a_revocation_is_signed_by_the_key_itself_or_for_another_by_the_operator(
    site: Path,
) -> None:
    run("revoke --identity identity.pem --federation clinics --out own.json")
    own = revocation_from_json((site / "own.json").read_text(), "own.json")
    assert own == revoke("clinics", NORTH.public_key, NORTH)
    write_identity(site / "operator.pem", OPERATOR_KEY)
    line = "revoke --identity operator.pem --federation clinics --out other.json --key"
    run(f"{line} {SOUTH.public_key.hex()}")
    other = revocation_from_json((site / "other.json").read_text(), "other.json")
    assert other == revoke("clinics", SOUTH.public_key, OPERATOR_KEY)


@pytest.mark.parametrize(
    "line",
    [
        "revoke --identity identity.pem --federation Clinics! --out r.json",
        "revoke --identity identity.pem --federation clinics --out r.json --key 00",
        "rotate --old identity.pem --new n.pem --federation c --site North --out r.json",
    ],
)
def test_a_wrong_command_line_ends_with_2_and_writes_nothing(site: Path, line: str) -> None:
    before = sorted(site.iterdir())
    assert run(line).exit_code == 2
    assert sorted(site.iterdir()) == before


def test_an_error_ends_with_its_code_and_its_diagnostics_on_stderr(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "umbel_client.cli", "keygen"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (IdentityError.exit_code, "")
    assert done.stderr.startswith("error: a key file exists already and is never overwritten\n")


def test_the_command_starts_without_torch() -> None:
    script = (
        "import sys; from umbel_client.cli.command import app;"
        "app(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'opacus', 'transformers', 'flwr', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "keygen" in done.stdout
