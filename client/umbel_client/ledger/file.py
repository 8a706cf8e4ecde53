"""The file of a privacy ledger: lock, creation, reading, and what SQLite's errors mean.

This module is part of the core of the privacy guarantee. Never open a ledger that is damaged or of
a later version, never charge one that another process has locked, and never lower the count of
answers.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from umbel_client.ledger.contents import Contents
from umbel_client.ledger.rows import Row
from umbel_common.canonical import encode
from umbel_common.errors import LedgerError, RemoteProtocolError, StorageError
from umbel_host.files.database import Schema, migrate, read_only, schema_version, transaction

_JOURNAL = """
CREATE TABLE journal (answers INTEGER NOT NULL) STRICT;
INSERT INTO journal VALUES (0)
"""
SCHEMA = Schema(
    "privacy ledger",
    f"""
    CREATE TABLE rows
        (position INTEGER PRIMARY KEY, entry BLOB NOT NULL, head BLOB NOT NULL) STRICT;
    {_JOURNAL}
    """,
    (
        # Rows stay as they are, whatever the version: their heads were published.
        _JOURNAL,
        # Version 3 has kinds of rows that version 2 does not know, and so has version 4.
        "",
        "",
    ),
)


def lock_file(path: Path) -> BinaryIO:
    """Takes the lock beside `path`, which is released when the process ends, however it ends.

    Raises:
        LedgerError: another process has it.
    """
    lock = open(f"{path}.lock", "ab", opener=_private)  # noqa: SIM115  # held until closed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise LedgerError(
            "the privacy ledger is used by another process",
            file=path,
            remedy="stop the other client that trains on this data set",
        ) from None
    return lock


def create(path: Path, first: Row) -> None:
    """Creates a ledger of one row, complete at once, so that an empty file is always damage."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    open(draft, "xb", opener=_private).close()
    database = sqlite3.connect(draft, isolation_level=None)
    try:
        database.execute("PRAGMA synchronous = FULL")
        # The draft takes its name once it is complete.
        migrate(database, SCHEMA, path)
        with transaction(database):
            database.execute("INSERT INTO rows VALUES (0, ?, ?)", (encode(first), first.head()))
    finally:
        database.close()
    draft.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_ledger(path: Path) -> Contents:
    """The contents of a ledger at this moment; a trainer that uses it is not disturbed.

    Raises:
        LedgerError: there is no ledger, or it is damaged or of a later schema version.
        StorageError: it cannot be read.
    """
    if not path.exists():
        raise LedgerError(
            "there is no privacy ledger here",
            file=path,
            remedy="the first plan that this site accepts creates one; if there was one, bring"
            " back the latest copy",
        )
    with storage_errors(path), read_only(path) as database:
        return read_rows(path, database)


def read_rows(path: Path, database: sqlite3.Connection) -> Contents:
    """Follows the whole chain of a ledger of this or a former schema version.

    Raises:
        LedgerError: it is damaged, or of a later schema version.
    """
    version = schema_version(database)
    if version > SCHEMA.version:
        raise LedgerError(
            "a privacy ledger was written by a later version of Umbel",
            file=path,
            field="user_version",
            found=version,
            accepted=f"at most {SCHEMA.version}",
            remedy="upgrade Umbel on this machine; nothing was changed",
        )
    if version == 0:
        raise damaged(path, "a database without a ledger")
    rows = database.execute("SELECT position, entry, head FROM rows ORDER BY position").fetchall()
    counts = [(0,)] if version == 1 else database.execute("SELECT answers FROM journal").fetchall()
    contents = Contents()
    for number, row in enumerate(rows):
        try:
            contents.read(*row)
        except (RemoteProtocolError, ValueError, TypeError) as error:
            raise damaged(path, f"row {number}: {error}") from None
    if not rows or len(counts) != 1:
        raise damaged(path, f"{len(rows)} rows and {len(counts)} counts of answers")
    (contents.answers,) = counts[0]
    contents.schema = version
    return contents


def require_data_set(path: Path, contents: Contents, data_set: bytes, unit: str | None) -> None:
    """Checks that a ledger is about the data at hand.

    Args:
        data_set: digest of the data set, 32 bytes.
        unit: column that says whose a record is; None: each record is its own unit.

    Raises:
        LedgerError: it counts by another unit, or is about other data.
    """
    if contents.unit != unit:
        raise LedgerError(
            "a privacy ledger counts by another unit",
            file=path,
            field="data.unit_column",
            found=unit or "none: by record",
            accepted=contents.unit or "none: by record",
            remedy="set it back: what was charged by one unit says nothing about another",
        )
    if contents.data_set != data_set:
        raise LedgerError(
            "a privacy ledger belongs to another data set",
            file=path,
            field="data set digest",
            found=data_set.hex(),
            accepted=contents.data_set.hex(),
            remedy="if the data changed, run `umbel-client budget carry --data-set"
            f" {data_set.hex()}`: what was spent stays spent. Only data of which no record is the"
            " same are another data set (docs/budget.md)",
        )


def require_head(path: Path, contents: Contents, published: bytes) -> None:
    """Checks that a history continues the one that was published under a head.

    Raises:
        LedgerError: it does not: rows were removed, or an old copy was put back.
    """
    if published not in contents.heads:
        raise LedgerError(
            "the privacy ledger does not contain a head that was published earlier",
            file=path,
            field="head",
            found=contents.head().hex(),
            accepted=f"a continuation of {published.hex()}",
            remedy="the file was rolled back or replaced: bring back the latest copy",
        )


def require_journal(path: Path, contents: Contents, answers: int) -> None:
    """Checks that the session journal beside a ledger is no older than the ledger.

    Both count the site's answers: an answer is written to the journal, then the ledger counts it,
    then it leaves. So a crash can leave the journal ahead, and only an old copy of it can be
    behind. A site that used such a copy would answer a second time what it has answered before,
    with other keys or for another survivor set.

    Args:
        answers: how many answers the journal ever recorded.

    Raises:
        LedgerError: the journal is an old copy.
    """
    if answers < contents.answers:
        raise LedgerError(
            "the session journal is older than the privacy ledger beside it",
            file=path,
            field="answers",
            found=f"{answers} in the journal",
            accepted=f"at least {contents.answers}, as the ledger counts",
            remedy="session.sqlite was rolled back or replaced: bring back the latest copy. If it"
            " is lost, what was spent has to be stated: `umbel-client budget state-spend`"
            " (docs/budget.md)",
        )


def damaged(path: Path, found: object) -> LedgerError:
    """The error for a ledger that something other than a `Ledger` changed."""
    return LedgerError(
        "a privacy ledger is damaged",
        file=path,
        found=found,
        remedy="bring back the latest intact copy",
    )


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns a failing disk into a `StorageError`, and an unreadable file into a `LedgerError`."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise StorageError(
            "the privacy ledger cannot be used",
            file=path,
            found=error,
            remedy="see that the disk has space and the file is writable",
        ) from error
    except sqlite3.Error as error:
        raise damaged(path, error) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
