"""A site's configuration, client.toml.

```toml
site = "north-hospital"
state = "state"
identity = "identity.pem"
roster = "roster.json"

[data]
name = "north-notes"
path = "notes.jsonl"
public_size = 5000

[model]
path = "models/minilm"

[policy]
models = ["<digest of the model, 64 hexadecimal digits>"]
labels = ["benign", "malignant"]
```

Instead of the table, `policy = "policy.toml"` above the first table names a file with the same
fields: then the people who may change the policy can be others than those who may change the rest.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from umbel_client.site.policy import Policy
from umbel_client.site.state_folder import StateFolder
from umbel_common.address import Address, require_reachable
from umbel_common.canonical import Name, Value
from umbel_common.device import require_devices
from umbel_common.errors import ConfigError
from umbel_common.plans.figures import Format
from umbel_common.plans.ranges import Count, Fraction
from umbel_common.toml_values import from_table
from umbel_host.files.text_file import from_home, read_toml, read_toml_table

POLICY_FILE = "policy.toml"
"""Name of a file with the policy."""

_ALONE = {"site": "alone", "state": "state", "identity": "identity.pem", "roster": "roster.json"}
"""What a site without a federation has, and does not use."""


class DataConfig(Value, frozen=True):
    """The `[data]` table."""

    path: str
    """The data set: .jsonl, .csv or .parquet by its ending, or a folder that `save_to_disk` of
    Hugging Face `datasets` wrote."""
    public_size: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    """About how many records (or units, with `unit_column`) the data set has: a round number that
    everyone may know, and that stays when records come and go. Sampling rate and noise follow from
    it, so they reveal nothing about the exact number; privacy holds whatever the exact number
    is."""
    text_column: str = "text"
    """The column with the texts."""
    label_column: str = "label"
    """The column with the labels."""
    format: Format = "auto"
    """Format of a causal language model's records; `auto`: the format that the columns show."""
    unit_column: str | None = None
    """The column that says whose a record is, such as a patient's number. Where it is set, the
    privacy guarantee covers all records of a unit together; else each record alone."""
    max_records_per_unit: Count = 32
    """Most records of a unit that are used, in the order of the file."""
    evaluation_share: Fraction = 0.1
    """Share of the records (or units), approximately, that is held out and scored under a plan with
    a federated evaluation."""
    name: Name | None = None
    """What the site's people call the data set, the same for all its versions and federations. It
    finds the one ledger of the data set; without a name, only the file's place and bytes do."""


class ModelConfig(Value, frozen=True):
    """The `[model]` table."""

    path: str
    """Folder of the base model, in Hugging Face format."""
    precision: Literal["float32", "bfloat16", "fastest"] = "float32"
    """Floating-point type in which the frozen layers compute; `fastest`: bfloat16 where the
    hardware multiplies it natively. The adapter, clipping and noise are float32 in any case."""
    gradient_checkpointing: bool = False
    """Whether only the input of each layer is kept, and the rest is computed again in the backward
    pass: about a third more time, and for long records a fraction of the memory."""
    quantisation: Literal["none", "int8", "nf4"] = "none"
    """`int8`: keep the weights of the frozen layers in eight bits. `nf4`: in four, which needs the
    package bitsandbytes."""
    device: str | tuple[str, ...] = "auto"
    """The device that computes: `cpu`, `cuda` (the first GPU), `cuda:1`, or `mps`, Apple's, without
    private training. `auto`: the first GPU, or the CPU on a machine without one. A list of GPUs
    divides the work as `split` says."""
    split: Literal["layers", "records"] = "layers"
    """What a list of GPUs divides among them. `layers`: each GPU holds some of the model's layers,
    which makes room. `records`: each GPU holds the whole model, and computes some of a step's
    records, which is faster."""


class RelayConfig(Value, frozen=True):
    """The `[relay]` table: the address and the files of the process with the network. `umbel-client
    init` and `umbel-client join` make the files."""

    server: Address
    """Host and port of the aggregation server."""
    server_ca: str = "relay/server-ca.pem"
    """Certificate of the authority that vouches for the server."""
    certificate: str = "relay/certificate.pem"
    """This site's certificate, as the operator issued it."""
    key: str = "relay/key.pem"
    """Its private key, which is also this site's key towards Flower; not the site's identity."""
    socket: str = "run/trainer.sock"
    """Where the trainer listens for the relay."""


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
    """The table, or what is in the file that is named in its place."""
    relay: RelayConfig | None = None
    """Absent where no server is reached from here, as in a simulation."""
    isolation: Literal["required", "preferred"] = "preferred"
    """Whether trainer and relay refuse to run (`required`) or warn (`preferred`) where the kernel
    leaves the trainer a way out, where one of the two can read what only the other may, and where
    one of them is root."""
    answer_time: Literal["when-done", "even"] = "when-done"
    """When the answer to a round leaves. `even`: at a multiple of a time that follows from plan and
    machine, so that it does not tell how long the records of the batch are. Rounds then take about
    twice as long as the longest one likely would."""
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    """CPU threads for training."""
    physical_batch_size: Annotated[int, msgspec.Meta(ge=1, le=65536)] | Literal["auto"] = "auto"
    """Records computed at once: it determines memory and speed, not the result. `auto`: as many as
    fit into half of the memory that is free when a job begins, as long as more are faster. Where
    memory runs out in a step, the size is reduced for the rest of the job."""

    @property
    def state_folder(self) -> StateFolder:
        """Where each part of the state is."""
        return StateFolder(Path(self.state))


def load_local_config(path: Path) -> ClientConfig:
    """Reads what work without a federation needs of client.toml: `[data]` and `[model]`. The rest
    may be absent, and then has the values that `umbel-client init` writes.

    Raises:
        ConfigError: see `load_config`.
    """
    return _config(path, {**_ALONE, "policy": {}, **_table(path)})


def load_config(path: Path) -> ClientConfig:
    """Reads client.toml.

    Raises:
        ConfigError: the file, or the policy's, cannot be read, is not TOML, or has an unknown,
            missing or wrong field; or there are two policies.
    """
    return _config(path, _table(path))


def _table(path: Path) -> dict[str, object]:
    table = read_toml_table(path, "give the path of this site's client.toml")
    beside = path.absolute().with_name(POLICY_FILE)
    if "policy" in table and not isinstance(table["policy"], str) and beside.exists():
        raise ConfigError(
            "a site has two policies: a table in its configuration, and a file beside it",
            file=path,
            field="policy",
            found=f"the table [policy], and {beside}",
            remedy=f'policy = "{POLICY_FILE}" above the first table, or move that file away',
        )
    return table


def _config(path: Path, table: dict[str, object]) -> ClientConfig:
    folder, named = path.absolute().parent, table.get("policy")
    if isinstance(named, str):
        # A placeholder, until the file with the rest is known to be right.
        table["policy"] = {}
    config = from_table(table, ClientConfig, path)
    require_devices(config.model.device, field="model.device", file=path)
    if config.model.split == "records" and isinstance(config.model.device, str):
        raise ConfigError(
            "only several devices can divide records",
            file=path,
            field="model.split",
            found=f'"records", and model.device = "{config.model.device}"',
            accepted='"layers"; or a list in model.device, such as ["cuda:0", "cuda:1"]',
        )
    if isinstance(named, str):
        policy = read_toml(
            folder / from_home(named, path, field="policy"),
            Policy,
            f"see that {path} names this site's policy",
        )
        config = msgspec.structs.replace(config, policy=policy)

    def resolve(name: str, field: str) -> str:
        return str(folder / from_home(name, path, field=field))

    relay = config.relay
    if relay is not None:
        try:
            require_reachable(relay.server)
        except ValueError as error:
            raise ConfigError(
                f"a relay could not connect to its server's address: {error}",
                file=path,
                field="relay.server",
                found=relay.server,
                remedy="write the address that the operator names",
            ) from None
        files = ("server_ca", "certificate", "key", "socket")
        relay = msgspec.structs.replace(
            relay, **{name: resolve(getattr(relay, name), f"relay.{name}") for name in files}
        )
    return msgspec.structs.replace(
        config,
        relay=relay,
        state=resolve(config.state, "state"),
        identity=resolve(config.identity, "identity"),
        roster=resolve(config.roster, "roster"),
        data=msgspec.structs.replace(config.data, path=resolve(config.data.path, "data.path")),
        model=msgspec.structs.replace(config.model, path=resolve(config.model.path, "model.path")),
    )


def require_relay(config: ClientConfig, file: Path) -> RelayConfig:
    """The `[relay]` table of a site that talks to a server.

    Args:
        file: where the configuration came from, for the error.

    Raises:
        ConfigError: the table is missing.
    """
    if config.relay is None:
        raise ConfigError(
            "a configuration does not say how the server is reached",
            file=file,
            field="relay",
            remedy='add a table [relay] with server = "host:port"',
        )
    return config.relay


def trainer_socket(relay: RelayConfig) -> Path:
    """Where the relay reaches the trainer."""
    return Path(relay.socket)


def relay_socket(relay: RelayConfig) -> Path:
    """Where probes reach the relay: beside the trainer's."""
    return Path(relay.socket).with_name("relay.sock")
