"""A site's configuration, client.toml.

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

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from umbel_client.policy import Policy
from umbel_common.canonical import Name, Value
from umbel_common.config import parse_toml
from umbel_common.errors import ConfigError
from umbel_common.plan import Count


class DataConfig(Value, frozen=True):
    """The `[data]` table."""

    path: str
    """The data set; its ending (.jsonl, .csv, .parquet) tells its format."""
    public_size: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    """About how many records (or units, with `unit_column`) the data set has, as this site is
    content to let everyone know: a round number that stays when records come and go. Sampling rate
    and noise follow from it, so that they tell nothing about the exact number; privacy holds
    whatever the exact number is."""
    text_column: str = "text"
    """The column with the texts."""
    label_column: str = "label"
    """The column with the labels."""
    unit_column: str | None = None
    """The column that says whose a record is, such as a patient's number. Where it is set, privacy
    is promised for all records of a unit together; else for each record alone."""
    max_records_per_unit: Count = 32
    """Records of a unit past so many, in the order of the file, are not used."""


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
    """Key file of this site, as `umbel-client keygen` makes it."""
    roster: str
    """The roster that this site pinned, JSON: only `umbel-client roster` changes it."""
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
