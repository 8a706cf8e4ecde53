"""Backups as docs/operator.md and docs/site.md print them: the same commands print the same today,
on the machine that is backed up and on an empty one."""

import math
import re
import shutil
from pathlib import Path

import pytest
from e2e.test_ceremony_pages import by_form, printed, typed
from support.enrolling import Enrolling

from umbel_client.ledger.ledger import Ledger
from umbel_client.privacy.accounting import DpEvent
from umbel_client.site.policy import Budget
from umbel_client.storage.journal import Journal

SITE = "hospital-a"


def replay(page: str, folder: Path, command: str) -> None:
    """Types a command of a page and compares; every moment is another one."""
    line, output = printed(page, command)
    found = typed(folder, line).replace(str(folder.parent), "/srv/umbel")
    found, output = (
        re.sub(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", "<moment>", by_form(text))
        for text in (found, output)
    )
    assert found == output, line


def emptied(folder: Path) -> None:
    """All but the backup is gone."""
    for path in folder.iterdir():
        if path.suffix != ".tar":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def clinics(tmp_path: Path) -> Enrolling:
    return Enrolling(tmp_path)


def test_the_operators_page(clinics: Enrolling) -> None:
    clinics.enrol(SITE)
    replay("operator.md", clinics.operator, "umbel-server backup")
    emptied(clinics.operator)
    replay("operator.md", clinics.operator, "umbel-server restore")


def test_the_sites_page(clinics: Enrolling) -> None:
    clinics.enrol(SITE)
    clinics.approve(SITE)
    folder = clinics.folder / SITE
    state = folder / "state"
    state.mkdir(exist_ok=True)
    Journal(state / "session.sqlite").close()
    with Ledger.open(state / "ledger.sqlite", bytes(32)) as ledger:
        for number in (1, 2, 3):
            event = DpEvent(1.0, 0.01, 10)
            ledger.reserve("clinics", bytes(32), number, event, Budget(math.inf, 1e-5))
    replay("site.md", folder, "umbel-client backup")
    emptied(folder)
    replay("site.md", folder, "umbel-client restore")
