"""Configuration files into typed values."""

from pathlib import Path
from typing import TypeVar

from umbel_common.config import from_table, read_table
from umbel_common.errors import ConfigError
from umbel_host.process import reason

T = TypeVar("T")


def read_toml(path: Path, kind: type[T], remedy: str) -> T:
    """The value that a TOML file describes.

    Args:
        kind: see `parse_toml`.
        remedy: what to do where the file cannot be read.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or has an unknown, missing or wrong field.
    """
    return from_table(read_toml_table(path, remedy), kind, path)


def read_toml_table(path: Path, remedy: str) -> dict[str, object]:
    """What a TOML file describes, of any fields.

    Raises:
        ConfigError: the file cannot be read, or is no TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "a configuration file cannot be read",
            file=path,
            found=reason(error) if isinstance(error, OSError) else "not UTF-8 text",
            remedy=remedy,
        ) from None
    return read_table(text, path)
