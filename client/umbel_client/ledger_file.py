"""The file of a privacy ledger: its lock, its birth, and what SQLite's errors mean."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from umbel_client.ledger_rows import SCHEMA_VERSION, Row
from umbel_common.canonical import encode
from umbel_common.errors import LedgerError, StorageError


def lock_file(path: Path) -> BinaryIO:
    """Takes the lock beside `path`, which ends with the process however it ends.

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
    """Makes a ledger of one row under its name at once, so that an empty file is always damage."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    open(draft, "xb", opener=_private).close()
    database = sqlite3.connect(draft, isolation_level=None)
    try:
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(
            "BEGIN; CREATE TABLE rows"
            " (position INTEGER PRIMARY KEY, entry BLOB NOT NULL, head BLOB NOT NULL) STRICT;"
            f" PRAGMA user_version = {SCHEMA_VERSION};"
        )
        database.execute("INSERT INTO rows VALUES (0, ?, ?)", (encode(first), first.head()))
        database.execute("COMMIT")
    finally:
        database.close()
    draft.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """A disk that fails is a `StorageError`; a file that SQLite cannot read, a `LedgerError`."""
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
        raise LedgerError(
            "a privacy ledger is damaged",
            file=path,
            found=error,
            remedy="bring back the latest intact copy",
        ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
