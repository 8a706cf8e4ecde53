"""A site's configuration, client.toml, and the key file that it names.

```toml
site = "north-hospital"
state = "state"
identity = "identity.pem"
roster = "roster.json"

[data]
path = "notes.jsonl"
public_size = 5000

[model]
path = "models/minilm"

[policy]
models = ["<digest of the model, 64 hexadecimal digits>"]
labels = ["benign", "malignant"]
```
"""

import os
import stat
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from umbel_client.policy import Policy
from umbel_common.canonical import Name, Value
from umbel_common.config import parse_toml
from umbel_common.errors import ConfigError, IdentityError
from umbel_common.identity import Identity


class DataConfig(Value, frozen=True):
    """The `[data]` table."""

    path: str
    """The data set; its ending (.jsonl, .csv, .parquet) tells its format."""
    public_size: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    """About how many records the data set has, as this site is content to let everyone know: a
    round number that stays when records come and go. Sampling rate and noise follow from it, so
    that they tell nothing about the exact number; privacy holds whatever the exact number is."""
    text_column: str = "text"
    """The column with the texts."""
    label_column: str = "label"
    """The column with the labels."""


class ModelConfig(Value, frozen=True):
    """The `[model]` table."""

    path: str
    """Folder of the base model, in Hugging Face format."""
    precision: Literal["float32", "bfloat16", "fastest"] = "float32"
    """In which floating point the frozen layers compute; `fastest`: bfloat16 where the hardware
    multiplies it itself. The adapter, clipping and noise are float32 in any case."""


class ClientConfig(Value, frozen=True):
    """client.toml. Relative paths start at the file's folder; after `load_config` all are
    absolute."""

    site: Name
    """This site's name in the roster."""
    state: str
    """Folder for journal, ledger, deltas and caches: as private as the data itself."""
    identity: str
    """Key file of this site, as `write_identity` makes it."""
    roster: str
    """The roster that this site pinned, JSON."""
    data: DataConfig
    model: ModelConfig
    policy: Policy
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    """CPU threads for training."""
    physical_batch_size: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 32
    """Records computed at once: sets memory and speed, not the result."""


def load_config(path: Path) -> ClientConfig:
    """Reads client.toml.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or has an unknown, missing or wrong field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "a configuration file cannot be read",
            file=path,
            found=error.strerror if isinstance(error, OSError) else "not UTF-8 text",
            remedy="give the path of this site's client.toml",
        ) from None
    config = parse_toml(text, ClientConfig, path)
    folder = path.absolute().parent

    def resolve(name: str) -> str:
        return str(folder / Path(name).expanduser())

    return msgspec.structs.replace(
        config,
        state=resolve(config.state),
        identity=resolve(config.identity),
        roster=resolve(config.roster),
        data=msgspec.structs.replace(config.data, path=resolve(config.data.path)),
        model=msgspec.structs.replace(config.model, path=resolve(config.model.path)),
    )


def write_identity(path: Path, identity: Identity) -> None:
    """Writes a new key file (PKCS#8 PEM, unencrypted, mode 0600), and never over another.

    Raises:
        IdentityError: the file exists, or cannot be written.
    """
    key = Ed25519PrivateKey.from_private_bytes(identity.seed())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise IdentityError(
            "a key file exists already and is never overwritten",
            file=path,
            remedy="use it, or move it away if another identity is wanted",
        ) from None
    except OSError as error:
        raise IdentityError(
            "a key file cannot be written", file=path, found=error.strerror
        ) from None


def read_identity(path: Path) -> Identity:
    """Reads a key file that only its owner can read.

    Raises:
        IdentityError: missing, readable by others, or no Ed25519 key in unencrypted PKCS#8 PEM.
    """
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read()
    except OSError as error:
        raise IdentityError(
            "a key file cannot be read",
            file=path,
            found=error.strerror,
            remedy="give the path of this party's own key file",
        ) from None
    if mode & 0o077:
        raise IdentityError(
            "a key file is open to other users of this machine",
            file=path,
            found=f"mode {mode:04o}",
            accepted="mode 0600",
            remedy=f"chmod 600 {path}; if others may have read it, make a new identity",
        )
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(
            "a key file holds no usable key",
            file=path,
            accepted="an Ed25519 private key, PKCS#8 PEM, without passphrase",
        )
    return Identity(key.private_bytes_raw())
