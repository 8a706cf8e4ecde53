"""SQLite files that must survive: opened, migrated and written in whole transactions.

`PRAGMA user_version` is the version of a file's schema. A file of a former version is brought to
today's, step by step, in one transaction as it is opened; one of a later version is refused and
left as it is. What is common to all such files is here; what they hold, their own modules know.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from umbel_common.errors import RemoteProtocolError, StorageError


@dataclass(frozen=True)
class Schema:
    """What a kind of file looks like now, and how it came to look so."""

    kind: str
    """Its name in errors, such as `session journal`."""
    tables: str
    """SQL that makes an empty file of today's version."""
    steps: tuple[str, ...] = ()
    """SQL from each former version to the one after it, from version 1 on."""

    @property
    def version(self) -> int:
        """Today's."""
        return len(self.steps) + 1


class Database:
    """One file and one connection; used by one thread at a time."""

    def __init__(self, path: Path, schema: Schema, *, secure_delete: bool = False) -> None:
        """Opens the file, makes it where there is none, and migrates it; for its owner only.

        Args:
            secure_delete: whether what is deleted is overwritten in the file, not only unlinked.

        Raises:
            StorageError: it is corrupt, of a later schema version, or cannot be written.
        """
        self._path = path
        self._kind = schema.kind
        with self.errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=10.0
            )
            try:
                self.execute("PRAGMA journal_mode = WAL")
                self.execute("PRAGMA synchronous = FULL")
                if secure_delete:
                    self.execute("PRAGMA secure_delete = ON")
                migrate(self._connection, schema, path)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """One statement; within `errors`, and `transaction` where it writes."""
        return self._connection.execute(statement, values)

    @property
    def connection(self) -> sqlite3.Connection:
        """For readers that also read files which others use."""
        return self._connection

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside, or nothing; on disk when it ends.

        Raises:
            StorageError: it could not be written.
        """
        with self.errors(), transaction(self._connection):
            yield

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What SQLite and the disk complain about, as a `StorageError`."""
        with storage_errors(self._path, self._kind):
            yield


@contextmanager
def storage_errors(path: Path, kind: str) -> Iterator[None]:
    """What SQLite, the disk or a row that does not decode complains about, as a `StorageError`."""
    try:
        yield
    except (sqlite3.Error, OSError, RemoteProtocolError) as error:
        raise StorageError(
            f"the {kind} cannot be used",
            file=path,
            found=error,
            remedy="check that the disk has space, and that the file is writable and intact",
        ) from error


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All that is written inside, or nothing; of two writers, the second waits."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def schema_version(database: sqlite3.Connection) -> int:
    """Version of a file's schema; 0 for an empty one."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)


def require_known(version: int, schema: Schema, path: Path) -> None:
    """Refuses a file of a later version than this program knows.

    Raises:
        StorageError: it is one.
    """
    if version > schema.version:
        raise StorageError(
            f"a {schema.kind} was written by a later version of Umbel",
            file=path,
            field="user_version",
            found=version,
            accepted=f"at most {schema.version}",
            remedy="upgrade Umbel on this machine; nothing was changed",
        )


def migrate(database: sqlite3.Connection, schema: Schema, path: Path) -> None:
    """Brings a file to today's version, or leaves it as it is.

    Raises:
        StorageError: it is of a later version.
    """
    version = schema_version(database)
    require_known(version, schema, path)
    if version != schema.version:
        with transaction(database):
            _migrate(database, schema, path)


def _migrate(database: sqlite3.Connection, schema: Schema, path: Path) -> None:
    # Asked again: another process may have been faster.
    version = schema_version(database)
    require_known(version, schema, path)
    if version == schema.version:
        return
    steps = (schema.tables,) if version == 0 else schema.steps[version - 1 :]
    for step in steps:
        # `executescript` would end the transaction; no statement of ours quotes a semicolon.
        for statement in step.split(";"):
            database.execute(statement)
    database.execute(f"PRAGMA user_version = {schema.version}")


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
