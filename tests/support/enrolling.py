"""An operator and sites in folders beside each other, whose people give commands in this process.

`tests/e2e/test_ceremony.py` gives the same commands as processes of their own.
"""

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import typer
from typer.testing import CliRunner

import umbel_client.cli.command
import umbel_server.cli.command
from umbel_common.errors import UmbelError
from umbel_common.trust.enrolment import (
    SignedKit,
    SignedRequest,
    SiteKit,
    kit_from_json,
    kit_to_json,
    request_from_json,
    sign_kit,
)
from umbel_common.trust.identity import Identity, fingerprint
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_from_json
from umbel_host.files.keys import read_identity


def give_command(app: typer.Typer, folder: Path, *words: str) -> str:
    """What a command prints in a folder.

    Raises:
        UmbelError: as the command raised it.
        AssertionError: it ended in another way than well.
    """
    with chdir(folder):
        done = CliRunner().invoke(app, list(words), env={"COLUMNS": "120"})
    if isinstance(done.exception, UmbelError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


class Enrolling:
    """The folders of everybody."""

    def __init__(self, folder: Path, *, new: bool = True) -> None:
        """Args:
        new: whether the operator is to be made; else its folder is there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.operator = folder, folder / "operator"
        if new:
            words = ("init", "--federation", "clinics", "--address", "127.0.0.1:9443")
            give_command(umbel_server.cli.command.app, folder, *words)

    def server(self, *words: str) -> str:
        """A command of the operator."""
        return give_command(umbel_server.cli.command.app, self.operator, *words)

    def client(self, site: str, *words: str) -> str:
        """A command of a site."""
        return give_command(umbel_client.cli.command.app, self.folder / site, *words)

    def ask(self, site: str) -> Path:
        """A site's new request."""
        (self.folder / site).mkdir(exist_ok=True)
        self.client(site, "init", "--site", site, "--federation", "clinics")
        return self.folder / site / f"{site}.request.json"

    def request(self, site: str) -> SignedRequest:
        path = self.folder / site / f"{site}.request.json"
        return request_from_json(path.read_text(), path)

    def add(self, site: str, request: Path | None = None, out: str | None = None) -> Path:
        """Admits a site by the fingerprint that its request has; returns the kit."""
        request = request or self.folder / site / f"{site}.request.json"
        identity = request_from_json(request.read_text(), request).request.identity
        kit = self.folder / (out or f"{site}.kit.json")
        words = ("--out", str(kit), "--fingerprint", fingerprint(identity))
        self.server("sites", "add", str(request), *words)
        return kit

    def enrol(self, site: str) -> Path:
        """From nothing to a site that has joined; returns the kit."""
        self.ask(site)
        kit = self.add(site)
        self.client(site, "join", str(kit))
        return kit

    def approve(self, site: str) -> None:
        """The site pins the operator's roster as it is now."""
        out = self.folder / site / "proposed.json"
        out.unlink(missing_ok=True)
        self.server("roster", "export", "--out", str(out))
        digest = self.roster().roster.digest().hex()
        self.client(site, "roster", "approve", out.name, "--digest", digest)

    def roster(self) -> RosterDocument:
        """Of the operator."""
        path = self.operator / "roster.json"
        return document_from_json(path.read_text(), path)

    def key(self) -> Identity:
        """The operator's."""
        return read_identity(self.operator / "identity.pem")

    def forged(self, kit: SiteKit, signer: Identity | None = None) -> Path:
        """A kit as whoever has a key can make it."""
        path = self.folder / "forged.json"
        path.write_text(kit_to_json(sign_kit(kit, signer or self.key())))
        return path

    def files(self, party: str = "operator") -> dict[str, bytes]:
        """Everything that a party has on disk."""
        return dict(_files(self.folder / party))


def read_kit(path: Path) -> SignedKit:
    return kit_from_json(path.read_text(), path)


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
