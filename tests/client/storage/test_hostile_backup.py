"""A backup that somebody made or changed: it writes nowhere but in its folder, and only after
somebody agreed to who signed it.

Each attack is run a second time without the fix, where it must reach its goal.
"""

import gzip
import hashlib
import io
import os
import pty
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.storage import backup as site_backup
from umbel_client.storage.journal import Journal
from umbel_common.errors import StorageError, UmbelError
from umbel_common.trust.identity import Identity, fingerprint, sign, verifies
from umbel_host.files.backup import Manifest, SignedManifest
from umbel_host.files.keys import write_identity
from umbel_host.files.restore import require_inside

OURS, THIEF = Identity(bytes([7]) * 32), Identity(bytes([8]) * 32)
FORMER = Path(__file__).parents[2] / "migrations" / "backup-1.tar.gz"
CLIENT_TOML = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"
[data]
path = "notes.jsonl"
public_size = 10000
[model]
path = "model"
[policy]
total_epsilon = 50
"""
CONTENT = b"* * * * * root id\n"


def run(*words: str) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*words: str) -> str:
    with pytest.raises(UmbelError) as caught:
        CliRunner().invoke(app, words, catch_exceptions=False)
    return caught.value.diagnostics()


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A backup of a site with its keys; the working folder is an empty machine's."""
    site, empty = tmp_path / "site", tmp_path / "new"
    (site / "state").mkdir(parents=True)
    empty.mkdir()
    (site / "client.toml").write_text(CLIENT_TOML)
    (site / "roster.json").write_text("the roster")
    write_identity(site / "identity.pem", OURS)
    Ledger.open(site / "state" / "ledger.sqlite", bytes(32)).close()
    Journal(site / "state" / "session.sqlite").close()
    out = tmp_path / "good.tar"
    run("backup", "--with-keys", "--out", str(out), "--config", str(site / "client.toml"))
    monkeypatch.chdir(empty)
    return out


def changed(
    good: Path, signer: Identity | None, change: dict[str, bytes], *, rename: str = ""
) -> Path:
    """The backup with other content in some parts, under a manifest that fits it.

    Args:
        signer: who signs the manifest; None: nobody, as in format 1.
        rename: a new name for the part `roster.json`.
    """
    with tarfile.open(good) as archive:
        begin = msgspec.json.decode(
            archive.extractfile("manifest.json").read(),  # type: ignore[union-attr]  # a file
            type=SignedManifest,
        )
        parts = {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]  # a file
            for member in archive
            if member.name != "manifest.json"
        }
    parts |= change
    if rename:
        parts[rename] = parts.pop("roster.json")
    manifest: dict[str, object] = msgspec.to_builtins(begin.manifest)
    manifest["parts"] = [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in parts.items()
    ]
    text = msgspec.json.encode(manifest)
    if signer is not None:
        signature = sign(signer, msgspec.convert(manifest, Manifest)).signature
        text = msgspec.json.encode(
            {
                "manifest": manifest,
                "signer": signer.public_key.hex(),
                "signature": signature.hex(),
                "version": 2,
            }
        )
    return packed(good.with_name("bad.tar"), {"manifest.json": text, **parts})


def packed(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def with_place(field: str, place: Path | str) -> bytes:
    former = {"state": "state", "identity": "identity.pem", "roster": "roster.json"}[field]
    return CLIENT_TOML.replace(f'{field} = "{former}"', f'{field} = "{place}"').encode()


@pytest.mark.parametrize("field", ["roster", "identity", "state"])
@pytest.mark.parametrize("how", ["absolute", "above", "by a link", "in the home folder"])
def test_a_backup_names_no_place_outside_its_folder(
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replace_everywhere: Callable[[object, object], None],
    field: str,
    how: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "etc").mkdir()
    (tmp_path / "new" / "link").symlink_to(tmp_path / "etc")
    outside = tmp_path / ("home" if how == "in the home folder" else "etc") / "evil"
    place = {
        "absolute": str(outside),
        "above": "../etc/evil",
        "by a link": "link/evil",
        "in the home folder": "~/evil",
    }[how]
    # Even whom the fingerprint's owner made a fool of signs nothing outside.
    parts = {"client.toml": with_place(field, place), "roster.json": CONTENT}
    bad = changed(good, OURS, parts)
    restore = ("restore", str(bad), "--fingerprint", fingerprint(OURS.public_key))
    assert "outside the folder that it is restored into" in refusal(*restore)
    assert not outside.exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["link"]
    replace_everywhere(require_inside, lambda folder, places: None)
    run(*restore)
    assert outside.exists()


@pytest.mark.parametrize("place", [".ssh/authorized_keys", "x/.config/y", "a b", "."])
def test_nor_a_hidden_place_or_a_forged_line(good: Path, place: str) -> None:
    bad = changed(good, OURS, {"client.toml": with_place("roster", place)})
    printed = refusal("restore", str(bad), "--fingerprint", fingerprint(OURS.public_key))
    assert "outside the folder" in printed


def test_a_configuration_of_the_machines_own_may_name_any_place(good: Path, tmp_path: Path) -> None:
    Path("client.toml").write_bytes(with_place("state", tmp_path / "elsewhere"))
    run("restore", str(good), "--fingerprint", fingerprint(OURS.public_key))
    assert (tmp_path / "elsewhere" / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    "name", ["rosters/authorized_keys", "state/ledger.sqlite-wal", "cron", "relay/x", "keys/a.pem"]
)
def test_a_backup_holds_nothing_but_what_backups_hold(good: Path, name: str) -> None:
    bad = changed(good, OURS, {"roster.json": CONTENT}, rename=name)
    printed = refusal("restore", str(bad), "--fingerprint", fingerprint(OURS.public_key))
    assert f"{name}, which no backup of umbel-client holds" in printed


def test_a_former_roster_gets_a_name_of_ours(good: Path) -> None:
    name = f"rosters/any-{'ab' * 32}.sh"
    bad = changed(good, OURS, {"roster.json": CONTENT}, rename=name)
    run("restore", str(bad), "--fingerprint", fingerprint(OURS.public_key))
    assert Path(f"roster-{'ab' * 32}.json").read_bytes() == CONTENT


def test_what_somebody_changed_is_not_signed_by_us(
    good: Path, replace_everywhere: Callable[[object, object], None]
) -> None:
    ours = fingerprint(OURS.public_key)
    by_thief = changed(good, THIEF, {"roster.json": CONTENT})
    assert "not signed by the key that was named" in refusal(
        "restore", str(by_thief), "--fingerprint", ours
    )
    forged = packed(
        good.with_name("forged.tar"),
        {"manifest.json": in_our_name(by_thief), **parts_of(by_thief)},
    )
    unsigned = changed(good, None, {"roster.json": CONTENT})
    assert "found: nobody" in refusal("restore", str(unsigned), "--fingerprint", ours)
    restore = ("restore", str(forged), "--fingerprint", ours)
    assert "a manifest that its signature does not fit" in refusal(*restore)
    assert list(Path().iterdir()) == []
    replace_everywhere(verifies, lambda *_: True)
    run(*restore)
    assert Path("roster.json").read_bytes() == CONTENT


def parts_of(backup: Path) -> dict[str, bytes]:
    with tarfile.open(backup) as archive:
        return {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]  # a file
            for member in archive
            if member.name != "manifest.json"
        }


def in_our_name(backup: Path) -> bytes:
    """The thief's manifest under our key."""
    with tarfile.open(backup) as archive:
        text = archive.extractfile("manifest.json").read()  # type: ignore[union-attr]  # a file
    return text.replace(THIEF.public_key.hex().encode(), OURS.public_key.hex().encode())


@pytest.mark.parametrize("options", [(), ("--unsigned",)])
def test_nobody_restores_without_a_person_or_a_key(good: Path, options: tuple[str, ...]) -> None:
    assert "by a person at a terminal" in refusal("restore", str(good), *options)
    assert list(Path().iterdir()) == []


def test_a_backup_of_a_former_version_is_restored_with_a_warning(tmp_path: Path) -> None:
    former = tmp_path / "b.tar"
    former.write_bytes(gzip.decompress(FORMER.read_bytes()))
    config = ("--config", str(tmp_path / "new" / "client.toml"))
    (tmp_path / "new").mkdir()
    assert "by a person at a terminal" in refusal("restore", str(former), *config)
    printed = run("restore", str(former), *config, "--unsigned")
    assert "signed    BY NOBODY: anybody may have made or changed this backup" in printed
    contents = read_ledger(tmp_path / "new" / "state" / "ledger.sqlite")
    assert len(contents.rounds) == 2
    assert contents.old_copy


def test_a_key_that_is_not_ours_is_said_aloud(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_identity(Path("identity.pem"), OURS)
    bad = changed(good, THIEF, {"roster.json": CONTENT})
    printed = run("restore", str(bad), "--fingerprint", fingerprint(THIEF.public_key))
    assert f"{fingerprint(THIEF.public_key)}, WHICH IS NOT THE KEY ON THIS MACHINE" in printed


@pytest.mark.parametrize("answer", [b"no\n", b"\n", b"yes\n"])
def test_a_person_sees_what_is_written_and_is_asked(
    good: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    with os.fdopen(theirs, "r+b", buffering=0) as terminal:
        text = io.TextIOWrapper(terminal, write_through=True)
        monkeypatch.setattr("sys.stdin", text)
        monkeypatch.setattr("sys.stdout", text)
        words = ["restore", str(good)]
        if answer == b"yes\n":
            app(words, standalone_mode=False)
        else:
            with pytest.raises(UmbelError, match="not restored: nothing was changed"):
                app(words, standalone_mode=False)
    # The kernel hands over what was written in parts, and an error at its end.
    parts = []
    with suppress(OSError):
        while part := os.read(ours, 65536):
            parts.append(part)
    os.close(ours)
    screen = b"".join(parts).decode()
    assert f"{fingerprint(OURS.public_key)}: compare it" in screen
    assert f"put back  {Path('client.toml').absolute()}" in screen
    assert bool(list(Path().iterdir())) is (answer == b"yes\n")


def header(kind: bytes, name: str, data: bytes = b"") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    return member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def linked(kind: bytes) -> bytes:
    member = tarfile.TarInfo("manifest.json")
    member.type, member.linkname = kind, "nowhere"
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


HEADS = {
    "a deep manifest": header(b"0", "manifest.json", b"[" * 200_000),
    "a manifest with a deep field": header(
        b"0", "manifest.json", b'{"version": 2, "manifest": ' + b"[" * 100_000
    ),
    "a manifest that is a list": header(b"0", "manifest.json", b"[1]"),
    "a manifest of no text": header(b"0", "manifest.json", b"\xff\xfe"),
    "a symbolic link": linked(b"2"),
    "a hard link": linked(b"1"),
    "a device": linked(b"3"),
    "a pipe": linked(b"6"),
    "a thousand long names": header(b"L", "././@LongLink", b"manifest.json\0") * 2000,
    "a header of nonsense": header(b"x", "pax", b"999 size=many\n") + header(b"0", "manifest.json"),
    "nothing": b"",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_a_broken_backup_is_one_clear_error(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "b.tar"
    path.write_bytes(head + bytes(10240))
    with pytest.raises(StorageError, match="not a backup, or a damaged one"):
        CliRunner().invoke(
            app,
            ["restore", str(path), "--config", str(tmp_path / "client.toml")],
            catch_exceptions=False,
        )
    assert [one.name for one in tmp_path.iterdir()] == ["b.tar"]


def test_a_file_with_holes_is_refused(good: Path) -> None:
    """It would fill the disk from a backup of a few bytes."""
    bad = changed(good, OURS, {"roster.json": b""})
    with tarfile.open(bad, "w", format=tarfile.PAX_FORMAT) as archive:
        manifest = tarfile.TarInfo("manifest.json")
        manifest.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.map": "0,0",
            "GNU.sparse.size": "1000000000000",
        }
        archive.addfile(manifest)
    assert "manifest" in refusal("restore", str(bad))


def test_every_name_that_a_backup_holds_is_known(good: Path) -> None:
    assert all(map(site_backup._NAMES.fullmatch, parts_of(good)))
