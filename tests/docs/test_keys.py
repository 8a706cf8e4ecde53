"""docs/keys.md is a session that can be replayed: each command at its site, with its output."""

import os
import pty
import re
import shutil
from pathlib import Path

from support import warm_python

from umbel_common.trust.identity import Identity, Member, Roster
from umbel_common.trust.roster_file import document_from_json, document_to_json, roster_to_json
from umbel_host.files.keys import read_identity, write_identity

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
SITES = {"north": 1, "south": 2}
"""Weights by site."""

CLIENT_TOML = """
site = "{site}-hospital"
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


def sessions(page: str) -> list[tuple[str, str, str]]:
    """Site, command and output, in the page's order."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return re.findall(r"^(\w+)\$ (.*)\n((?:(?!\w+\$ ).*\n)*)", "".join(blocks), re.MULTILINE)


def at_terminal(folder: Path, command: str) -> str:
    """What a person sees who types a command, and yes where it asks."""
    ours, theirs = pty.openpty()
    child = warm_python.start(
        *("-m", "umbel_client.cli", *command.split()[1:]),
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "80", "TERM": "dumb"},
    )
    os.close(theirs)
    screen = b""
    while True:
        try:
            screen += os.read(ours, 65536)
        except OSError:  # the command has ended
            break
        if screen.endswith(b"Type yes to approve: "):
            os.write(ours, b"yes\n")
    os.close(ours)
    assert child.wait() == 0, screen.decode()
    lines = screen.decode().replace(str(folder), "/srv/umbel").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def without_keys(text: str) -> str:
    """Every key, digest and fingerprint by its form only: they are new in each session."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "<64 digits>", text)
    return re.sub(r"\b(?:[a-z2-7]{4}-){7}[a-z2-7]{4}\b", "<fingerprint>", text)


def replay(root: Path, page: str) -> list[tuple[str, str, str]]:
    """The page's commands with the output that they have now.

    What one site writes for the others, all have: that is the post between them.
    """
    folders = {site: root / site for site in SITES}
    for site, folder in folders.items():
        folder.mkdir()
        (folder / "client.toml").write_text(CLIENT_TOML.format(site=site))
    write_identity(folders["south"] / "identity.pem", Identity.generate(os.urandom))
    operator = Identity.generate(os.urandom)
    replayed = []
    for site, command, _ in sessions(page):
        if "clinics.json" in command:
            first_roster(folders, operator)
        if "clinics-3.json" in command:
            new_south(folders["north"])
        replayed.append((site, command, at_terminal(folders[site], command)))
        for path in folders[site].glob("r*ion.json"):
            for folder in folders.values():
                if folder != folders[site]:
                    shutil.copy(path, folder)
    return replayed


def first_roster(folders: dict[str, Path], operator: Identity) -> None:
    """The operator's first roster, in the post of the north."""
    members = tuple(
        Member(f"{site}-hospital", read_identity(folders[site] / "identity.pem").public_key, weight)
        for site, weight in SITES.items()
    )
    roster = Roster("clinics", operator.public_key, members)
    (folders["north"] / "clinics.json").write_text(roster_to_json(roster))


def new_south(north: Path) -> None:
    """The operator's roster with south's new identity, made after its key was lost."""
    text = (north / "clinics-2.json").read_text()
    former = document_from_json(text, "clinics-2.json")
    key = former.parties()["south-hospital"].hex()
    new = Identity.generate(os.urandom).public_key.hex()
    members = text.split('"rotations"')[0]
    proposed = document_from_json(text.replace(members, members.replace(key, new)), "clinics-3")
    (north / "clinics-3.json").write_text(document_to_json(proposed))


def test_every_session_of_the_page_replays_as_it_is_printed(tmp_path: Path) -> None:
    printed = sessions(PAGE.read_text())
    assert len(printed) >= 8
    for (site, command, output), now in zip(
        printed, replay(tmp_path, PAGE.read_text()), strict=True
    ):
        assert (site, command, without_keys(output)) == (*now[:2], without_keys(now[2]))
