"""SQLite files that must survive: opened, migrated, and written in whole transactions.

The law: no transaction of a `Database` returns before its rows are on disk, and no file of a later
version is migrated or written to.

`PRAGMA user_version` is the version of a file's schema. When a file of a former version is opened,
it is migrated step by step to today's version, in one transaction. A file of a later version is
refused and left as it is. This module has what all such files share; the modules that use it know
what the files hold.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from umbel_common.errors import RemoteProtocolError, StorageError
from umbel_host.processes.lifecycle import require_own


@dataclass(frozen=True)
class Schema:
    """The schema of one kind of file, with its history."""

    kind: str
    """Name of this kind of file in errors, such as `session journal`."""
    tables: str
    """SQL that makes an empty file of today's version."""
    steps: tuple[str, ...] = ()
    """SQL from each former version to the one after it, from version 1 on."""

    @property
    def version(self) -> int:
        """Today's version."""
        return len(self.steps) + 1


class Database:
    """One file and one connection; used by one thread at a time."""

    def __init__(self, path: Path, schema: Schema, *, secure_delete: bool = False) -> None:
        """Opens the file, or makes it, readable by its owner only, and migrates it.

        Args:
            secure_delete: whether deleted rows are overwritten in the file, not only unlinked.

        Raises:
            StorageError: the file is corrupt, of a later version, or cannot be written, or another
                user could have made or can change it.
        """
        self._path = path
        self._kind = schema.kind
        with self.errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            _require_own(path)
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
                # Now the log and its index are there, and nobody else can have made them since.
                _require_own(path)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Runs one statement; call it within `errors`, and within `transaction` if it writes."""
        return self._connection.execute(statement, values)

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection, for functions that also read files through `read_only`."""
        return self._connection

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Writes everything in the block, on disk when the block ends, or nothing.

        Raises:
            StorageError: it cannot be written.
        """
        with self.errors(), transaction(self._connection):
            yield

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns errors of SQLite and of the disk into a `StorageError`."""
        with storage_errors(self._path, self._kind):
            yield


def _require_own(path: Path) -> None:
    """Checks the file, and the files that SQLite keeps beside it and believes as much.

    Raises:
        StorageError: see `umbel_host.processes.lifecycle.require_own`.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        require_own(path.with_name(path.name + suffix))


@contextmanager
def storage_errors(path: Path, kind: str) -> Iterator[None]:
    """Turns errors of SQLite, of the disk and of rows that do not decode into a `StorageError`."""
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
    """Writes everything in the block or nothing; a second writer waits."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def schema_version(database: sqlite3.Connection) -> int:
    """Version of a file's schema; 0 for an empty file."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)


def require_known(version: int, schema: Schema, path: Path) -> None:
    """Refuses a file of a later version than this program knows.

    Raises:
        StorageError: the version is later.
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
    """Migrates a file to today's version, or leaves it as it is.

    Raises:
        StorageError: the file is of a later version.
    """
    version = schema_version(database)
    require_known(version, schema, path)
    if version != schema.version:
        with transaction(database):
            _migrate(database, schema, path)


def _migrate(database: sqlite3.Connection, schema: Schema, path: Path) -> None:
    # Another process may have migrated the file since the first look.
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
    """Opens a connection with one read transaction, so that all it sees is of one moment.

    Raises:
        sqlite3.Error: the file is missing, cannot be read, or is not a database.
    """
    # Without a log, SQLite would leave an empty one behind, or refuse a folder that is read-only.
    # A writer that begins meanwhile writes into a new log, not into the file that is read here.
    option = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    address = f"{path.absolute().as_uri()}?{option}"
    database = sqlite3.connect(address, uri=True, isolation_level=None)
    try:
        database.execute("BEGIN")
        yield database
    finally:
        database.close()


def copy_database(source: Path, target: Path) -> None:
    """Copies a file as it is at one moment, readable by its owner only, beside a running writer.

    Raises:
        sqlite3.Error: the file cannot be read, or the copy is not intact or cannot be written.
        OSError: the copy cannot be made.
    """
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with closing(sqlite3.connect(target)) as copy:
        with read_only(source) as original:
            original.backup(copy)
        # With a log beside it, the copy would be two files.
        copy.execute("PRAGMA journal_mode = DELETE")
        (found,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"{source.name} is damaged: {found}")
