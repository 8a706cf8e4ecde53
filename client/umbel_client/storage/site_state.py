"""Ledger and journal as they were at one moment, though a trainer may be writing both."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from umbel_client.ledger.contents import Contents
from umbel_client.ledger.file import read_ledger, require_head, require_journal
from umbel_client.site.state_folder import StateFolder
from umbel_client.storage.journal import Published, read_published
from umbel_host.files.database import copy_database

T = TypeVar("T")


def read_site_state(folder: StateFolder) -> tuple[Contents, Published]:
    """What the ledger holds and what the journal has let out, if the two do not contradict.

    Raises:
        LedgerError: there is no ledger, or it is damaged or contradicts the journal.
        StorageError: one of the two cannot be read.
    """
    contents, published = _at_one_moment(folder.journal, lambda: read_ledger(folder.ledger))
    _hold_against(folder.ledger, contents, published)
    return contents, published


def copy_site_state(folder: StateFolder, target: StateFolder) -> Contents:
    """Copies ledger and journal, and returns what the ledger holds.

    Args:
        target: a folder that is there; copies in it are replaced.

    Raises:
        LedgerError: the ledger contradicts the journal: such a backup would be of no use.
        StorageError: the journal cannot be read.
        sqlite3.Error: a database cannot be read, or its copy not written.
        OSError: a copy cannot be made.
    """

    def copy() -> None:
        for source, copied in ((folder.journal, target.journal), (folder.ledger, target.ledger)):
            copied.unlink(missing_ok=True)
            copy_database(source, copied)

    _, published = _at_one_moment(folder.journal, copy)
    contents = read_ledger(target.ledger)
    _hold_against(folder.ledger, contents, published)
    return contents


def _at_one_moment(journal: Path, take: Callable[[], T]) -> tuple[T, Published]:
    """Repeats `take` until the journal stood still meanwhile: the trainer writes an answer there
    before the ledger counts it."""
    while True:
        published = read_published(journal)
        taken = take()
        if read_published(journal) == published:
            return taken, published


def _hold_against(ledger: Path, contents: Contents, published: Published) -> None:
    if published.ledger_head is not None:
        require_head(ledger, contents, published.ledger_head)
    require_journal(ledger, contents, published.answers)
