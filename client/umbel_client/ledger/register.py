"""The register of a machine: which ledger each data set belongs to, and how far it has come.

This module is part of the core of the privacy guarantee. Never open a way around it: no field of
client.toml, no option and no variable of the environment says where the register is, and no trainer
runs without one. Never let a ledger be charged before its data set is entered, and never forget a
mark or a head.

A ledger lies in a state folder, and somebody who makes another state folder begins with an empty
one. So each ledger has a file in the register, named by the head of its first row. The file holds
where the ledger is, its last head, and the marks by which its data set is known: the name that the
site's people gave, the place of the file, and its bytes. One mark is enough:

1. If a mark belongs to another ledger that is still in its place, the data set is refused.
2. If that ledger is gone, or the one at hand lacks a head that the register knows, what was spent
   is not known here: the ledger is marked as an old copy, and accepts no charge before somebody
   states what was spent.
3. Each row of the ledger is entered before anything can follow from it.
"""

import contextlib
import fcntl
import hashlib
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec

from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.site.config import ClientConfig
from umbel_common.canonical import Value
from umbel_common.errors import LedgerError, StorageError
from umbel_host.files.durable import replace, sync_folder
from umbel_host.processes.lifecycle import require_own

MACHINE = Path("/var/lib/umbel-ledgers")
"""The register where root, an image or a chart made this folder: for all users of the machine."""
OF_USER = Path(".local/state/umbel/ledgers")
"""The register elsewhere, in the home folder that the system's list of users names."""

Head = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Entry(Value, frozen=True):
    """What the register knows of one ledger."""

    ledger: str
    """The ledger's file."""
    head: Head
    """Its last head."""
    marks: tuple[str, ...]
    """What its data set is known by."""


def machine_register() -> "Register":
    """The register that every site of this machine uses, or of this user where it has none.

    Raises:
        StorageError: there is no place for it.
    """
    if os.path.lexists(MACHINE):
        return Register(MACHINE)
    try:
        # Not $HOME, which a service file may set to an empty folder.
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        raise StorageError(
            "there is no place for the register of privacy ledgers",
            found=f"user {os.geteuid()}, whom the system does not know",
            remedy=f"make {MACHINE}, which this user may write and which outlives the process",
        ) from None
    return Register(Path(home) / OF_USER)


def marks_of(config: ClientConfig, source: bytes) -> frozenset[str]:
    """What a site's data set is known by.

    Args:
        source: digest of the data file, 32 bytes.
    """
    named = () if config.data.name is None else (f"name {config.data.name}",)
    # A path may be no Unicode.
    place = hashlib.sha256(os.fsencode(os.path.realpath(config.data.path))).hexdigest()
    return frozenset((*named, f"place {place}", f"bytes {source.hex()}"))


class Register:
    """The register in a folder. Each call that writes takes its lock: processes may share it."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made before the first ledger is entered.

        Args:
            folder: `machine_register` gives the only one that a site may use; simulations and tests
                have others.
        """
        self.folder = folder

    def find(self, marks: frozenset[str]) -> tuple[Entry, ...]:
        """The ledgers that these marks belong to; normally one, or none yet.

        Raises:
            StorageError: the register cannot be read.
        """
        with self._errors():
            return tuple(e for e in self._read(own=False).values() if marks & {*e.marks})

    def require_free(self, path: Path, marks: frozenset[str]) -> None:
        """Refuses a data set whose ledger is in another place, before one is made here.

        Args:
            path: where the site's ledger is, or would be made.

        Raises:
            LedgerError: the data set belongs to another ledger, or the ledger here is a copy.
            StorageError: the register cannot be used.
        """
        with self._errors():
            entries = self._read(own=False)
        if entries:
            first = read_ledger(path).heads[0].hex() if path.exists() else None
            self._judge(entries, first, path, marks)

    def enter(self, ledger: Ledger, marks: frozenset[str]) -> None:
        """Enters a ledger, and from now on each of its rows: steps 1 to 3.

        Raises:
            LedgerError: the data set belongs to another ledger, or this one is a copy.
            StorageError: the register cannot be used.
        """
        first = ledger.first().hex()
        with self._locked():
            entries = self._read()
            # 1. One that belongs elsewhere is refused.
            former = self._judge(entries, first, ledger.path, marks)
            # 2. What is not in these rows has to be stated.
            lost = [entry for entry in former.values() if not ledger.contains(_bytes(entry.head))]
            if lost:
                ledger.mark_as_old_copy(_bytes(lost[0].head))
            marks = marks.union(*(entry.marks for entry in former.values()))
            entry = Entry(str(ledger.path.absolute()), ledger.head().hex(), tuple(sorted(marks)))
            self._write(first, entry)
            for name in former.keys() - {first}:
                self._file(name).unlink()
            sync_folder(self.folder)
        # 3. Rows follow.
        ledger.report_to(lambda head: self._advance(first, head))

    def settle(self, ledger: Ledger) -> None:
        """Takes the rows of a ledger for all there is, after somebody stated what was spent.

        Raises:
            LedgerError: the ledger is a copy of one in another place.
            StorageError: the register cannot be used.
        """
        if not self.folder.exists():
            return
        first = ledger.first().hex()
        with self._locked():
            entries = self._read()
            self._judge(entries, first, ledger.path, frozenset())
            if first in entries:
                self._write(
                    first, msgspec.structs.replace(entries[first], head=ledger.head().hex())
                )

    def _judge(
        self, entries: dict[str, Entry], first: str | None, path: Path, marks: frozenset[str]
    ) -> dict[str, Entry]:
        """The entries that a ledger continues: its own, and those of ledgers that are gone."""
        found = {
            name: entry
            for name, entry in entries.items()
            if name == first or marks & {*entry.marks}
        }
        for name, entry in found.items():
            known = Path(entry.ledger)
            if not (name == first and _same(known, path)) and _stands(known, name):
                raise self._elsewhere(name == first, known, path, marks & {*entry.marks})
        return found

    def _elsewhere(
        self, copied: bool, known: Path, path: Path, marks: frozenset[str]
    ) -> LedgerError:
        shared = sorted(mark.partition(" ")[0] for mark in marks)
        return LedgerError(
            "a privacy ledger is a copy of one that is in use elsewhere"
            if copied
            else "this data set has a privacy ledger already, in another state folder",
            file=path,
            field="state",
            found=path.parent,
            accepted=known.parent,
            remedy=f'set state = "{known.parent}" in client.toml, also where two federations use'
            " the same data (docs/budget.md)"
            + (
                ""
                if copied
                else f". It was known by: {', '.join(shared)}. Only if no record is the same, give"
                " the data a file and a data.name of their own"
            ),
        )

    def _advance(self, first: str, head: bytes) -> None:
        with self._locked():
            entry = self._read_one(self._file(first))
            if entry is None:
                raise LedgerError(
                    "the register no longer knows a privacy ledger that is in use",
                    file=self._file(first),
                    remedy="start the trainer again; if the register was removed, bring it back",
                )
            self._write(first, msgspec.structs.replace(entry, head=head.hex()))

    def _file(self, first: str) -> Path:
        return self.folder / f"{first}.json"

    def _read(self, *, own: bool = True) -> dict[str, Entry]:
        """The entries by the first heads of their ledgers.

        Args:
            own: whether only this user may have written them; else root may look at another's.
        """
        paths = [path for path in self._names() if path.suffix == ".json"]
        found = {path.stem: self._read_one(path, own=own) for path in paths}
        return {name: entry for name, entry in found.items() if entry is not None}

    def _names(self) -> list[Path]:
        try:
            # `glob` would take a folder that cannot be read for an empty one.
            return sorted(self.folder / name for name in os.listdir(self.folder))
        except FileNotFoundError:
            return []

    def _read_one(self, path: Path, *, own: bool = True) -> Entry | None:
        if own:
            require_own(path)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Entry)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise StorageError(
                "the register of privacy ledgers is damaged",
                file=path,
                found=error,
                remedy="bring back the file from a backup of this machine",
            ) from None

    def _write(self, first: str, entry: Entry) -> None:
        replace(self._file(first), msgspec.json.format(msgspec.json.encode(entry)) + b"\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Makes the folder if need be, and holds the register's lock."""
        with self._errors():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_own(self.folder)
            with open(self.folder / "register.lock", "ab", opener=_private) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns a failing disk into a `StorageError`."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                "the register of privacy ledgers cannot be used",
                file=self.folder,
                found=error,
                remedy="let the trainer's user write this folder, and keep it (docs/budget.md)",
            ) from error


def _bytes(head: str) -> bytes:
    return bytes.fromhex(head)


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _stands(path: Path, first: str) -> bool:
    """Whether a ledger is still in its place. One that cannot be read is not known to be gone."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        return read_ledger(path).heads[0].hex() == first
    except (LedgerError, StorageError):
        return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
