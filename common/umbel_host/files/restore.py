"""Puts a backup back: unpacked beside its place, compared, and moved there by one rename.

The law: a backup may come from anybody. It names no place of the machine but below the folder of
the configuration that it brings, nothing of it is written before somebody agreed to who signed it
and to what is written, and no file is written over.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from umbel_common.errors import StorageError, UmbelError
from umbel_common.trust.identity import fingerprint, is_fingerprint_of
from umbel_host.files.backup import Manifest, unpack
from umbel_host.files.durable import all_or_nothing, create, make_folder, sync_folder
from umbel_host.files.keys import read_identity
from umbel_host.processes.lifecycle import locked
from umbel_host.terminal import confirm, print_lines

Signer = Annotated[
    str | None,
    typer.Option(
        "--fingerprint",
        help="Restore without asking, but only what the key with this fingerprint signed.",
    ),
]
Unsigned = Annotated[
    bool,
    typer.Option(
        "--unsigned", help="Restore without asking a backup of a version that did not sign."
    ),
]


_PLAIN = re.compile(r"[\w@+-][\w.@+-]*(/[\w@+-][\w.@+-]*)*")


class Intent(msgspec.Struct, frozen=True):
    """What restoring a backup would do."""

    manifest: Manifest
    signer: bytes | None
    """The key that signed the backup; None if nobody did."""
    own: bytes | None
    """The key of this machine's party; None if it is not here."""
    state: Path
    files: dict[Path, str]
    """The place of each file outside the state folder -> the name of its part."""
    missing: tuple[Path, ...]
    """Keys that are neither on this machine nor in the backup."""

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        signer: bytes | None,
        *,
        state: Path,
        identity: Path,
        places: Mapping[str, Path],
        keys: Mapping[str, Path],
    ) -> "Intent":
        """The intent for a manifest and where the configuration has its parts.

        Args:
            places: name of a part -> its place, for files outside the state folder.
            keys: the same for private keys.
        """
        parts = {part.name for part in manifest.parts}
        held = {place: name for name, place in {**places, **keys}.items() if name in parts}
        missing = tuple(key for key in keys.values() if not key.exists() and key not in held)
        own = read_identity(identity).public_key if identity.exists() else None
        return cls(manifest, signer, own, state, held, missing)

    def lines(self) -> list[tuple[str, str]]:
        """A text for people, as pairs of a name and a value."""
        kept = [path for path in self.files if path.exists()]
        return [
            ("made", self.manifest.made),
            ("signed", self._signed()),
            ("state", str(self.state)),
            *(("put back", str(path)) for path in self.files if path not in kept),
            *(("kept", f"{path}, which is there") for path in kept),
            *(("missing", f"{path}: bring your own copy") for path in self.missing),
        ]

    def _signed(self) -> str:
        if self.signer is None:
            return "BY NOBODY: anybody may have made or changed this backup"
        if self.own is None:
            return f"{fingerprint(self.signer)}: compare it, your key is not on this machine"
        if self.own != self.signer:
            return f"{fingerprint(self.signer)}, WHICH IS NOT THE KEY ON THIS MACHINE"
        return f"{fingerprint(self.signer)}, the key on this machine"


def require_consent(
    console: Console,
    who: tuple[str, str],
    intent: Intent,
    *,
    expected: str | None,
    unsigned: bool,
) -> None:
    """Shows what a restore would do, and goes ahead only after somebody agreed.

    Args:
        who: name and value of the party's line.
        expected: fingerprint of the key that must have signed; nobody is asked then.
        unsigned: whether a backup that nobody signed is restored without a question.

    Raises:
        StorageError: another key signed it.
        UmbelError: nobody agreed.
    """
    print_lines(console, [who, *intent.lines()])
    if expected is not None:
        found = "nobody" if intent.signer is None else fingerprint(intent.signer)
        if intent.signer is None or not is_fingerprint_of(expected, intent.signer):
            raise StorageError(
                "a backup is not signed by the key that was named; nothing was changed",
                field="--fingerprint",
                found=found,
                accepted=expected,
            )
    elif intent.signer is not None or not unsigned:
        confirm(
            console,
            "Type yes: ",
            unattended=UmbelError(
                "a backup is restored by a person at a terminal, or by the key that signed it",
                remedy="run this at a terminal, or add --fingerprint with the fingerprint of your"
                " identity key, or --unsigned for a backup of a version that did not sign;"
                " nothing was changed",
            ),
            declined=UmbelError("the backup was not restored: nothing was changed"),
        )


def require_inside(folder: Path, places: Mapping[str, Path]) -> None:
    """Refuses places outside a folder, and hidden ones: for a configuration out of a backup.

    Args:
        places: a field of the configuration -> the place that it names.

    Raises:
        StorageError: names the field.
    """
    home = folder.resolve()
    for field, place in places.items():
        found = place.resolve()
        if not found.is_relative_to(home) or not _PLAIN.fullmatch(str(found.relative_to(home))):
            raise StorageError(
                "a backup names a place outside the folder that it is restored into; nothing was"
                " changed",
                field=field,
                found=found,
                accepted=f"a place below {home}, not a hidden one, and without spaces",
                remedy="if that is what you want, put your own copy of the configuration there"
                " first: a configuration of this machine may name any place",
            )


@contextmanager
def config_of(backup: Path, manifest: Manifest, name: str, config: Path) -> Iterator[Path]:
    """Yields the configuration file that says where parts belong.

    It is the one that is there, or else that of the backup, as if it were there already.

    Args:
        name: name of the configuration's part.
        config: path at which the configuration is, or would be.

    Raises:
        StorageError: the backup has no configuration either, or the folder cannot be written.
    """
    if config.exists():
        yield config
        return
    with workplace(config.absolute().parent, f"{config.name}.restoring") as place:
        unpack(backup, manifest, place, only=name)
        draft = config.with_name(f".{place.name}.toml")
        try:
            (place / name).rename(draft)
            yield draft
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def vacant(state: Path, lock: str, what: str) -> Iterator[None]:
    """Keeps a state folder missing or empty while something is put in its place.

    Args:
        lock: name of the file that the folder's process locks.
        what: that process, for the error.

    Raises:
        StorageError: the folder has something in it, or the process is running.
    """
    if not state.exists():
        yield
        return
    # A folder that nobody ever locked gets no lock file here either.
    with locked(state / lock, what) if (state / lock).exists() else nullcontext():
        held = sorted(path.name for path in state.iterdir() if path.suffix != ".lock")
        if held:
            raise StorageError(
                "a backup is restored into an empty state folder only; nothing was changed",
                file=state,
                found=tuple(held[:5]),
                remedy="move the folder away, and keep it: it may have more than the backup has",
            )
        yield


def put_back(staged: Path, state: Path, files: Mapping[Path, Path]) -> None:
    """Moves an unpacked state folder to its place, with the files beside it: all or nothing.

    Args:
        staged: the new state folder, on the same file system.
        state: missing, or empty but for lock files.
        files: place of each file -> the unpacked file. A file that is there already is kept, since
            it is no older than the backup.

    Raises:
        StorageError: something cannot be written; nothing was changed.
    """
    try:
        with all_or_nothing() as made:
            for target, source in files.items():
                if target.exists():
                    continue
                made += make_folder(target.parent, 0o700)
                create(target, source.read_bytes(), mode=0o600)
                made.append(target)
            if state.exists():
                for path in state.glob("*.lock"):
                    path.unlink()
            # A rename over an empty folder is one step, so the state is there whole or not at all.
            staged.rename(state)
            sync_folder(state.parent)
    except OSError as error:
        raise StorageError(
            "a backup cannot be put back; nothing was changed",
            file=error.filename or state,
            found=error.strerror,
        ) from None


@contextmanager
def workplace(folder: Path, name: str) -> Iterator[Path]:
    """Makes a folder for the owner only, beside the place of its content, and removes it later.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    place = folder / f".{name}-{os.getpid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.mkdir(mode=0o700)
        yield place
    except OSError as error:
        raise StorageError(
            "a folder cannot be written", file=error.filename or place, found=error.strerror
        ) from None
    finally:
        with suppress(OSError):
            shutil.rmtree(place)
