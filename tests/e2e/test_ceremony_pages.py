"""How a site comes in, as docs/operator.md and docs/site.md print it: the same commands, typed at
terminals of their own, print the same today."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import warm_python
from support.enrolling import Enrolling
from support.waiting import HANGING

from umbel_server.operator.admitted_sites import load_sites

DOCS = Path(__file__).parent.parent.parent / "docs"
MODULES = {"umbel-server": "umbel_server.cli", "umbel-client": "umbel_client.cli"}
SITES = ("hospital-a", "hospital-b", "hospital-c")


def printed(page: str, command: str) -> tuple[str, str]:
    """A command of a page, from its first words on, and what the page shows below it."""
    blocks = re.findall(r"^```console\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    found: list[tuple[str, str]] = re.findall(
        rf"^\w+\$ ({re.escape(command)}\b.*)\n((?:(?!\w+\$ ).*\n)*)", "".join(blocks), re.M
    )
    (only,) = found
    return only


def typed(folder: Path, command: str) -> str:
    """What a person sees who types a command, and yes where it asks."""
    ours, theirs = pty.openpty()
    name, *words = command.split()
    child = warm_python.start(
        *("-m", MODULES[name], *words),
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "100", "TERM": "dumb"},
    )
    os.close(theirs)
    screen = b""
    while True:
        try:
            screen += os.read(ours, 65536)
        except OSError:  # the command has ended
            break
        if screen.endswith(b"Type yes: "):
            os.write(ours, b"yes\n")
    os.close(ours)
    assert child.wait() == 0, screen.decode()
    return "".join(f"{line.rstrip()}\n" for line in screen.decode().splitlines())


def by_form(text: str) -> str:
    """Every key, digest, serial, day and folder by its form only: they are new in each session."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "<digest>", text)
    text = re.sub(r"\b[0-9a-f]{40}\b", "<serial>", text)
    text = re.sub(r"\b(?:[a-z2-7]{4}-){7}[a-z2-7]{4}\b", "<fingerprint>", text)
    text = re.sub(r"\b\d{4}-\d\d-\d\d, \d+ days", "<day>, <days> days", text)
    return re.sub(r"/\S+/(?=hospital-a/)", "<folder>/", text)


class Session:
    """The folders of the pages: `anywhere`, the operator's, and a site's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operator, self.site = root / "operator", root / "hospital-a"
        self.site.mkdir()

    def replay(self, page: str, folder: Path, command: str) -> None:
        """Types a command of a page and compares."""
        line, output = printed(page, command)
        assert by_form(typed(folder, line)) == by_form(output), line


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


def test_the_pages_show_what_happens_from_nothing_to_an_approved_roster(session: Session) -> None:
    root, operator, site = session.root, session.operator, session.site
    session.replay("operator.md", root, "umbel-server init")
    session.replay("site.md", site, "umbel-client init")
    shutil.copy(site / "hospital-a.request.json", operator)
    session.replay("operator.md", operator, "umbel-server sites add")
    others(root)
    session.replay("operator.md", operator, "umbel-server roster export")
    session.replay("operator.md", operator, "umbel-server sites list")
    shutil.copy(operator / "hospital-a.kit.json", site / "kit.json")
    session.replay("site.md", site, "umbel-client join")
    # The commands that the pages name in their text do what it says.
    words = re.findall(r"`umbel-server (sites \w+\s[^`]+)`", (DOCS / "operator.md").read_text())
    about = [" ".join(line.split()) for line in words if "hospital-a" in line]
    renewal, revocation = (line for line in about if not line.startswith("sites size"))
    typed(operator, f"umbel-server {renewal}")
    typed(operator, f"umbel-server {revocation}")
    assert (operator / "kit.json").exists()
    assert load_sites(operator / "sites.json")["hospital-a"].revoked


def others(root: Path) -> None:
    """The other sites come in too."""
    clinics = Enrolling(root, new=False)
    for site in SITES[1:]:
        clinics.ask(site)
        clinics.add(site)


@pytest.mark.parametrize("answer", [b"no\n", b"\n", b"y\n", b"\x04"])
def test_only_a_typed_yes_adds_a_site(tmp_path: Path, answer: bytes) -> None:
    clinics = Enrolling(tmp_path)
    clinics.ask("north")
    before = clinics.files()
    ours, theirs = pty.openpty()
    words = ("sites", "add", "../north/north.request.json", "--out", "../north.kit.json")
    child = subprocess.Popen(
        [sys.executable, "-m", "umbel_server.cli", *words],
        cwd=clinics.operator,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    screen = b""
    while b"Type yes: " not in screen:
        screen += os.read(ours, 65536)
    os.write(ours, answer)
    _, said = child.communicate(timeout=HANGING)
    os.close(ours)
    assert (child.returncode, b"nothing was changed" in said) == (1, True)
    assert clinics.files() == before
