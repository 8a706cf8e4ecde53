"""A look at a SQLite file that another process may be using, which changes nothing in it."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path


@contextmanager
def read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection within one read transaction: all that it sees is of one moment.

    Raises:
        sqlite3.Error: the file is missing, cannot be read, or is no database.
    """
    # Without a log, SQLite would leave an empty one behind, or refuse a folder that is read-only.
    # Whoever begins to write meanwhile writes into a log, not into what is read here.
    option = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    address = f"{path.absolute().as_uri()}?{option}"
    database = sqlite3.connect(address, uri=True, isolation_level=None)
    try:
        database.execute("BEGIN")
        yield database
    finally:
        database.close()


def copy_database(source: Path, target: Path) -> None:
    """A whole copy of a file as it is at one moment, for its owner only; its writer goes on.

    Raises:
        sqlite3.Error: it cannot be read, or the copy is not intact or cannot be written.
        OSError: the copy cannot be made.
    """
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with closing(sqlite3.connect(target)) as copy:
        with read_only(source) as original:
            original.backup(copy)
        # A log beside the copy would be a part of it.
        copy.execute("PRAGMA journal_mode = DELETE")
        (found,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"{source.name} is damaged: {found}")
