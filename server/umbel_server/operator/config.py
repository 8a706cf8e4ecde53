"""The operator's configuration, server.toml.

```toml
state = "state"
identity = "identity.pem"
roster = "roster.json"
sites = "sites.json"

[listen]
address = "0.0.0.0:9443"
certificate = "tls/certificate.pem"
key = "tls/key.pem"
client_ca = "ca/certificate.pem"
```
"""

from pathlib import Path
from typing import Annotated

import msgspec

from umbel_common.address import Address, is_every, require_reachable, split
from umbel_common.canonical import Value
from umbel_common.device import require_device
from umbel_common.errors import ConfigError
from umbel_common.plans.figures import AnswerCount, AnswerTokens, BatchSize, Format
from umbel_common.plans.ranges import Count
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_from_json
from umbel_host.files.text_file import from_home, read_text, read_toml

Seconds = Annotated[float, msgspec.Meta(gt=0, le=30 * 86400)]


class ListenConfig(Value, frozen=True):
    """The `[listen]` table: the one port that sites reach."""

    address: Address = "0.0.0.0:9443"
    """Where the SuperLink listens, with TLS 1.3 and only for client certificates of sites. 0.0.0.0
    means every IPv4 address of this machine, [::] every address of both families."""
    certificate: str = "tls/certificate.pem"
    """The server's certificate, issued by its own authority."""
    key: str = "tls/key.pem"
    """The private key of the certificate."""
    client_ca: str = "ca/certificate.pem"
    """The authority that issued the sites' certificates."""
    public: Address | None = None
    """The address that sites connect to. Absent: `address`, if that is one that sites can reach; it
    must be given where `address` is 0.0.0.0 or [::]."""


class Limits(Value, frozen=True):
    """The `[limits]` table: how long and how often the operator tries."""

    attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    """Number of attempts at one round before the job fails; it can be resumed."""
    offer_seconds: Seconds = 60.0
    """Time for the sites' answers to a plan."""
    train_seconds: Seconds = 3600.0
    """Time for a round's training; a site that takes longer is not in the attempt."""
    stage_seconds: Seconds = 60.0
    """Time for each stage after training."""

    def seconds(self, stage: str) -> float:
        """The deadline of a stage, in seconds."""
        return {"offer": self.offer_seconds, "train": self.train_seconds}.get(
            stage, self.stage_seconds
        )


class EvaluationConfig(Value, frozen=True):
    """The `[evaluation]` table: adapters are scored on public records, in a separate process with
    the client's packages. It is read again for each job."""

    holdout: str
    """File with public records of the plan's task that no site trains on: .jsonl, .csv or
    .parquet."""
    model: str
    """Folder of the base model."""
    general: str | None = None
    """File with texts from outside the domain, in a column `text`: they show what a language model
    forgets."""
    groups: str | None = None
    """The holdout's column with the group of each record; a classifier's accuracy is computed for
    each group."""
    text_column: str = "text"
    label_column: str = "label"
    format: Format = "auto"
    """How the holdout encodes its records; as in a site's client.toml."""
    answers: AnswerCount = 50
    """Number of records, from the start of the holdout, that a language model answers."""
    answer_tokens: AnswerTokens = 64
    """The longest answer, in tokens."""
    batch_size: BatchSize = 32
    """Number of records computed at once."""
    device: str = "cpu"
    """The device that computes: `cpu`, `cuda` (the first GPU), `cuda:1`, `mps`, or `auto`."""
    python: str | None = None
    """The Python of an environment with the client's packages; absent: the server's own."""
    seconds: Seconds = 3600.0
    """Time for one evaluation."""
    stop_after: Count | None = None
    """Number of rounds without a lower loss than the best one; after them a job ends early with the
    best adapter; absent: a job runs all rounds of its plan."""


class ServerConfig(Value, frozen=True):
    """The content of server.toml. Relative paths start at the file's folder; `load_config` makes
    all of them absolute."""

    state: str = "state"
    """Folder for journal, queue, releases, and the SuperLink's database."""
    identity: str = "identity.pem"
    """The operator's key file. The process with the port does not read it."""
    roster: str = "roster.json"
    """The operator's roster; `umbel-server sites` changes it."""
    sites: str = "sites.json"
    """The sites' relay keys and certificates; `umbel-server sites` changes it."""
    socket: str | None = None
    """The socket where the two processes meet; absent: carrier.sock in `state`. If it is elsewhere,
    each process may have its own `state`, and they share only this socket."""
    listen: ListenConfig = ListenConfig()
    limits: Limits = Limits()
    evaluation: EvaluationConfig | None = None
    """How adapters are scored; absent: they are released without being scored."""


def load_config(path: Path) -> ServerConfig:
    """Reads server.toml.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has an unknown, missing or wrong
            field.
    """
    config = read_toml(
        path,
        ServerConfig,
        "give the path of the operator's server.toml; `umbel-server init` makes one",
    )
    folder = path.absolute().parent

    def resolved(above: str, table: Value, *names: str) -> dict[str, str]:
        return {
            name: str(folder / from_home(getattr(table, name), path, field=f"{above}{name}"))
            for name in names
        }

    _check_addresses(config.listen, path)
    listen = msgspec.structs.replace(
        config.listen, **resolved("listen.", config.listen, "certificate", "key", "client_ca")
    )
    evaluation = config.evaluation
    if evaluation is not None:
        require_device(evaluation.device, field="evaluation.device", file=path)
        given = [
            name
            for name in ("holdout", "model", "general", "python")
            if getattr(evaluation, name) is not None
        ]
        evaluation = msgspec.structs.replace(
            evaluation, **resolved("evaluation.", evaluation, *given)
        )
    files = resolved("", config, "state", "identity", "roster", "sites")
    if config.socket is not None:
        files |= resolved("", config, "socket")
    return msgspec.structs.replace(config, listen=listen, evaluation=evaluation, **files)


def _check_addresses(listen: ListenConfig, file: Path) -> None:
    for field, check in (("address", split), ("public", require_reachable)):
        address = getattr(listen, field)
        try:
            if address is not None:
                check(address)
        except ValueError as error:
            raise ConfigError(
                "an address cannot be used",
                file=file,
                field=f"listen.{field}",
                found=address,
                accepted=str(error),
            ) from None


def public_address(config: ServerConfig) -> str:
    """The address that sites connect to, as it is written into their kits.

    Raises:
        ConfigError: the configuration only says where this server listens.
    """
    address = config.listen.public or config.listen.address
    if is_every(split(address)[0]):
        raise ConfigError(
            "the configuration does not say which address sites connect to",
            field="listen.public",
            found=f"listen.address = {address}, which means every address of this machine",
            accepted="this server's name or address, with the port that sites reach",
            remedy='add public = "HOST:PORT" to [listen] in server.toml',
        )
    return address


def carrier_socket(config: ServerConfig) -> Path:
    """The socket where the process with the jobs reaches the one with the port."""
    return Path(config.state) / "carrier.sock" if config.socket is None else Path(config.socket)


def rounds_socket(config: ServerConfig) -> Path:
    """The socket where probes reach the process with the jobs."""
    return Path(config.state) / "rounds.sock"


def load_roster(config: ServerConfig) -> RosterDocument:
    """Reads the operator's roster.

    Raises:
        IdentityError: the file is missing or malformed.
    """
    path = Path(config.roster)
    return document_from_json(read_text(path), path)
