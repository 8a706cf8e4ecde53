"""A look at a SQLite file that another process may be using, which changes nothing in it."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
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
