"""Text files that people name on a command line: rosters, rotations, revocations."""

import errno
import os
from pathlib import Path
from typing import TypeVar

from umbel_common.errors import ConfigError, IdentityError, StorageError, UmbelError
from umbel_common.toml_values import from_table, read_table
from umbel_host.files.durable import create
from umbel_host.processes.lifecycle import reason

_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 4095
"""The longest name of a file, and the longest path, that Linux takes."""
_MOST_BYTES = 1 << 26
"""Size of the largest text file: another party may have named or sent it."""


def find_text(path: Path, kind: type[UmbelError] = IdentityError) -> str | None:
    """The text of a file; None if the file is missing.

    Args:
        kind: the error of what the file holds.

    Raises:
        UmbelError: of this kind, if the file cannot be read, or is not text.
    """
    try:
        return _text(path)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        found = reason(error) if isinstance(error, OSError) else "not UTF-8 text"
        raise kind("a file cannot be read", file=path, found=found) from None


def read_text(path: Path, kind: type[UmbelError] = IdentityError) -> str:
    """The text of a file.

    Args:
        kind: the error of what the file holds.

    Raises:
        UmbelError: of this kind, if the file is missing, cannot be read, or is not text.
    """
    text = find_text(path, kind)
    if text is None:
        raise kind("a file is missing", file=path, remedy="give the path of the file")
    return text


def write_new_text(path: Path, text: str) -> None:
    """Writes a new file, never over another; it is on disk when this returns.

    Raises:
        StorageError: the file exists, or cannot be written.
    """
    try:
        create(path, text.encode())
    except FileExistsError:
        raise StorageError(
            "a file exists already and is never overwritten",
            file=path,
            remedy="give another --out, or move the file away",
        ) from None
    except OSError as error:
        raise StorageError("a file cannot be written", file=path, found=error.strerror) from None


def from_home(name: str, file: object = None, *, field: str | None = None) -> Path:
    """The path of a configuration, in which `~` may stand for a home folder.

    Args:
        file: where it was written, for the error; `field` names the value in it.

    Raises:
        ConfigError: no file can have this path; or the user has no home folder, as in a container.
    """
    wrong = _no_path(name)
    if wrong is not None:
        raise ConfigError(
            "no file can have this path",
            file=file,
            field=field,
            found=wrong,
            accepted=f"a path without the character U+0000, of at most {_MOST_PATH_BYTES:,} bytes,"
            f" and {_MOST_NAME_BYTES} for each name in it",
        )
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ConfigError(
            "a path begins with ~, and this user has no home folder",
            file=file,
            field=field,
            found=name,
            accepted="a path without ~",
        ) from None


def _no_path(name: str) -> str | None:
    """What keeps a text from being a path on Linux; None: it is one."""
    if not name:
        return "an empty text"
    if "\0" in name:
        return f"the character U+0000, at place {name.index(chr(0)) + 1}"
    sizes = [len(os.fsencode(part)) for part in name.split("/")]
    if max(sizes) > _MOST_NAME_BYTES:
        return f"a name of {max(sizes):,} bytes"
    whole = sum(sizes) + len(sizes) - 1
    return f"{whole:,} bytes" if whole > _MOST_PATH_BYTES else None


T = TypeVar("T")


def read_toml(path: Path, kind: type[T], remedy: str) -> T:
    """The value that a TOML file describes.

    Args:
        kind: see `parse_toml`.
        remedy: advice for a file that cannot be read.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has an unknown, missing or wrong
            field.
    """
    return from_table(read_toml_table(path, remedy), kind, path)


def read_toml_table(path: Path, remedy: str) -> dict[str, object]:
    """The table that a TOML file describes, with any fields.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    try:
        text = _text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "a configuration file cannot be read",
            file=path,
            found=reason(error) if isinstance(error, OSError) else "not UTF-8 text",
            remedy=remedy,
        ) from None
    return read_table(text, path)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return data.decode("utf-8")
