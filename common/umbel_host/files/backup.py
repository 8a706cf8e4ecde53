"""Backups: one tar file with a manifest in front, written whole or not at all.

The manifest names every part with its size and digest, the party that made the backup, and the
schema version of each database in it; the party's identity signs it. Backups of format 1 have a
bare manifest, which nobody signed. Reading trusts nothing before it was compared with the manifest.
`umbel_host.files.restore` puts a backup back.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal, cast

import msgspec

from umbel_common.canonical import Value, digest, encode
from umbel_common.errors import StorageError
from umbel_common.trust.identity import SIGNATURE_BYTES, Identity, label_of, sign, verifies
from umbel_host.files.durable import make_folder, sync_folder

Program = Literal["umbel-client", "umbel-server"]
MANIFEST = "manifest.json"
_MOST_MANIFEST_BYTES = 1 << 26
_FORMAT = 2
_CHUNK = 1 << 20


class Part(Value, frozen=True):
    """One file of a backup."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*\Z", max_length=1000)]
    """Path of the part within the backup, which is no path of the machine."""
    size: Annotated[int, msgspec.Meta(ge=0)]
    """Size in bytes."""
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]

    def __post_init__(self) -> None:
        if ".." in PurePosixPath(self.name).parts:
            raise ValueError("a part must not be named outside of the backup")


class Manifest(Value, frozen=True):
    """The contents of a backup."""

    program: Program
    party: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,64}\Z")]
    """The site's name, or the operator's fingerprint."""
    made: Annotated[str, msgspec.Meta(pattern=r"^[0-9T:.+-]{1,40}\Z")]
    """Time at which the backup was made, UTC, ISO 8601."""
    umbel: str
    """Version of Umbel that made the backup."""
    schemas: dict[str, int]
    """Schema version of each database in the backup, by the name of its part."""
    keys: bool
    """Whether private keys are in the backup."""
    parts: tuple[Part, ...]
    version: Literal[1] = 1

    def digest(self) -> bytes:
        """The digest that names this backup, 32 bytes."""
        return digest("backup", msgspec.json.encode(self))


class SignedManifest(Value, frozen=True):
    """What a backup begins with, from format 2 on."""

    manifest: Manifest
    signer: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """The identity key that signed the manifest's canonical encoding, in hexadecimal."""
    signature: Annotated[str, msgspec.Meta(pattern=rf"^[0-9a-f]{{{2 * SIGNATURE_BYTES}}}\Z")]
    version: Literal[2] = 2


def write_backup(
    out: Path,
    signer: Identity,
    program: Program,
    party: str,
    sources: Mapping[str, Path],
    *,
    schemas: Mapping[str, int],
    keys: bool,
) -> Manifest:
    """Writes a backup, readable by its owner only, which is on disk when this returns.

    Args:
        signer: the party's identity.
        sources: name of each part -> its file, which must not change meanwhile.

    Raises:
        StorageError: the file exists, a source cannot be read, or the disk is full; nothing of the
            backup is left.
    """
    if out.exists():
        raise StorageError(
            "a file exists already and is never overwritten", file=out, remedy="give another --out"
        )
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        parts = tuple(
            Part(name, path.stat().st_size, _sha256(path)) for name, path in sources.items()
        )
        made = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(program, party, made, version("umbel"), dict(schemas), keys, parts)
        with open(partial, "xb", opener=_private) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                signature = sign(signer, manifest).signature
                begin = SignedManifest(manifest, signer.public_key.hex(), signature.hex())
                text = msgspec.json.format(msgspec.json.encode(begin))
                archive.addfile(_member(MANIFEST, len(text)), BytesIO(text))
                for part in parts:
                    with open(sources[part.name], "rb") as source:
                        archive.addfile(_member(part.name, part.size), source)
            file.flush()
            os.fsync(file.fileno())
        # This finds a file that changed while it was read, and one that the disk does not return.
        _each_part(partial, manifest, None, lambda content, _: _sha256_of(content))
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise StorageError(
            "a backup cannot be written", file=error.filename or out, found=error.strerror or error
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return manifest


def read_manifest(
    backup: Path, program: Program, schemas: Mapping[str, int], names: re.Pattern[str]
) -> tuple[Manifest, bytes | None]:
    """The manifest of a backup, and the key that signed it; None if nobody did.

    Args:
        schemas: schema version of each database that this program knows, by its part's name.
        names: what every part of such a backup is named.

    Raises:
        StorageError: the file is not a backup, or one of the other program or of a later version.
    """
    with _opened(backup) as archive:
        first = archive.next()
        if first is None or first.name != MANIFEST or first.size > _MOST_MANIFEST_BYTES:
            raise _broken(backup, "no manifest at the beginning")
        text = _content(archive, first).read(first.size)
    try:
        format_version = msgspec.json.decode(text).get("version")
        if isinstance(format_version, int) and format_version > _FORMAT:
            raise _too_new(backup, "version", format_version, _FORMAT)
        if format_version == _FORMAT:
            manifest, signer = _verified(backup, msgspec.json.decode(text, type=SignedManifest))
        else:
            manifest, signer = msgspec.json.decode(text, type=Manifest), None
    except (msgspec.MsgspecError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise _broken(backup, error) from None
    if manifest.program != program:
        raise StorageError(
            f"a backup was not made by {program}", file=backup, found=manifest.program
        )
    for name, number in manifest.schemas.items():
        if number > schemas.get(name, 0):
            raise _too_new(backup, name, number, schemas.get(name, 0))
    for part in manifest.parts:
        if not names.fullmatch(part.name):
            raise _broken(backup, f"{part.name}, which no backup of {program} holds")
    return manifest, signer


def _verified(backup: Path, begin: SignedManifest) -> tuple[Manifest, bytes]:
    signer, signature = bytes.fromhex(begin.signer), bytes.fromhex(begin.signature)
    if not verifies(signer, label_of(Manifest), encode(begin.manifest), signature):
        raise _broken(backup, "a manifest that its signature does not fit")
    return begin.manifest, signer


def require_party(backup: Path, manifest: Manifest, party: str) -> None:
    """Refuses the backup of another party.

    Raises:
        StorageError: the backup is not of `party`.
    """
    if manifest.party != party:
        raise StorageError(
            "a backup belongs to another party; nothing was changed",
            file=backup,
            found=manifest.party,
            accepted=party,
        )


def unpack(backup: Path, manifest: Manifest, folder: Path, only: str | None = None) -> None:
    """Unpacks every part into an empty folder, readable by its owner only, and syncs it.

    Args:
        only: name of the only part to unpack; None: all parts.

    Raises:
        StorageError: a part is missing or not as in the manifest, or the disk is full.
    """

    def take(content: BinaryIO, part: Part) -> str:
        target = folder / part.name
        make_folder(target.parent, 0o700)
        with open(target, "xb", opener=_private) as file:
            return _copy(content, file)

    _each_part(backup, manifest, only, take)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)


@contextmanager
def _opened(backup: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(backup, mode="r:") as archive:
            yield archive
    except (tarfile.TarError, ValueError, ArithmeticError, RecursionError, EOFError) as error:
        # What the tarfile module raises at headers that were made to confuse it.
        raise _broken(backup, error) from None
    except OSError as error:
        raise StorageError(
            "a backup cannot be unpacked; nothing was changed",
            file=error.filename or backup,
            found=error.strerror or error,
        ) from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    # A link would lead to another member; a file with holes would be larger than the backup.
    content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
    if content is None:
        raise tarfile.ReadError(f"{member.name} is not a file")
    return cast(BinaryIO, content)


def _each_part(
    backup: Path,
    manifest: Manifest,
    only: str | None,
    take: Callable[[BinaryIO, Part], str],
) -> None:
    """Hands every part to `take`, which returns its SHA-256, and compares it with the manifest."""
    expected = {part.name: part for part in manifest.parts if only in (None, part.name)}
    if only is not None and not expected:
        raise _broken(backup, f"{only} missing")
    with _opened(backup) as archive:
        for member in archive:
            if member.name == MANIFEST or only not in (None, member.name):
                continue
            part = expected.pop(member.name, None)
            if part is None or member.size != part.size:
                raise _broken(backup, f"{member.name} is not what the manifest says")
            if take(_content(archive, member), part) != part.sha256:
                raise _broken(backup, f"{member.name} has another digest")
    if expected:
        raise _broken(backup, f"{', '.join(sorted(expected))} missing")


def _copy(source: BinaryIO, file: BinaryIO) -> str:
    """Copies a part to disk; returns its SHA-256."""
    state = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        state.update(chunk)
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    return state.hexdigest()


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return _sha256_of(file)


def _sha256_of(file: BinaryIO) -> str:
    state = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        state.update(chunk)
    return state.hexdigest()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _broken(backup: Path, found: object) -> StorageError:
    return StorageError(
        "a file is not a backup, or a damaged one; nothing was changed",
        file=backup,
        found=found,
        remedy="use another copy of it, or an earlier backup",
    )


def _too_new(backup: Path, field: str, found: int, accepted: int) -> StorageError:
    return StorageError(
        "a backup was made by a later version of Umbel; nothing was changed",
        file=backup,
        field=field,
        found=found,
        accepted=f"at most {accepted}",
        remedy="upgrade Umbel on this machine, then restore",
    )
