"""What the server asks of the processes that choose a draft's numbers and score adapters."""

from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_common.canonical import Value
from umbel_common.plans.figures import AnswerCount, AnswerTokens, BatchSize, Format
from umbel_common.plans.ranges import Count, Positive


class EarlierAdapter(Value, frozen=True):
    """An adapter that a job released, for the draft of a plan that starts from it; as JSON."""

    plan: str
    """The text of the earlier plan's file."""
    adapter: str
    """Digest of the adapter under that plan, 64 hexadecimal digits."""
    round: int
    norm: float
    """Its Euclidean norm."""


class TuningRequest(Value, frozen=True):
    """A search for hyper-parameters on public records, as JSON. Paths are absolute."""

    draft: str
    """Path of a plan's draft, TOML."""
    data: str
    """Path of a file with public records for the plan's task."""
    out: str
    """Path for the draft with the best values; nothing may be there yet."""
    study: str
    """Path of the SQLite file with the trials, which a later call resumes."""
    trials: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    """Number of trials in all, those of earlier calls included."""
    public_size: Count | None = None
    """Public size of a site, which sets the noise; None: the number of training records."""
    sites: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    """Number of simulated sites, whose deltas, and so their noise, are averaged."""
    validation_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.2
    """Share of the records on which the search measures the loss."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0
    """Seed of the search, of the division of the records, and of the noise."""
    text_column: str = "text"
    label_column: str = "label"
    format: Format = "auto"
    """Layout of the records. The three fields are as in a site's client.toml."""
    device: str = "cpu"
    """The device that computes, as in a site's client.toml. It does not belong to what is searched:
    a search may be resumed on another one."""


PublicSize: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Mode: TypeAlias = Literal["local", "distributed"]


class CalibrationRequest(Value, frozen=True):
    """A request for the numbers of a draft, as JSON."""

    draft: str
    """Absolute path of a draft, TOML, with or without numbers."""
    sizes: tuple[PublicSize, ...]
    """Public size of each site."""
    colluding: Annotated[int, msgspec.Meta(ge=0, le=99)] = 1
    """Number of sites that each site assumes to collude."""
    dropouts: Annotated[int, msgspec.Meta(ge=0, le=99)] | None = None
    """Number of sites that a sum may lack; None: one in five, and one at least."""
    mode: Mode | None = None
    """The mode; None: what the rules propose."""
    rounds: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    """Number of rounds; None: what the rules propose."""
    epsilons: tuple[Positive, ...] = (1.0, 3.0, 8.0)
    """Claims to be compared, beside the draft's own."""


class Bought(Value, frozen=True):
    """What an epsilon buys in one mode. A figure of None needs packages that are not installed."""

    epsilon: float
    mode: Mode
    proposed: bool
    """Whether the draft has this mode, and tolerates as many dropouts."""
    dropouts: int
    """Number of sites that a sum may lack."""
    honest: int
    """Number of sites whose noise the reader of a sum must not know: 1 in local mode."""
    steps: int
    """Number of steps of the whole job."""
    bytes_sent: int
    """Bytes of a site's masked vector in the round that trains most."""
    bytes_received: int
    """Bytes of the trained part of a release, which each site gets."""
    most_attempts: int | None = None
    """Largest number of attempts of the job; None: attempts cost nothing."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise of a step in units of the clip norm, against readers of the
    sums; in local mode that of the site with the most noise."""
    noise_of_mean: float | None = None
    """Standard deviation of the noise in each number of the mean gradient over all sites, in units
    of the clip norm."""
    epsilon_readers: float | None = None
    """Epsilon of the job against readers of the sums."""
    epsilon_everybody: float | None = None
    """Epsilon of the job against all other parties together."""


class Calibration(Value, frozen=True):
    """The answer to a `CalibrationRequest`, as JSON."""

    draft: str
    """Text of the draft with its numbers."""
    mode: Mode
    accounted: bool
    """Whether the packages with the accountants were there."""
    sites: int
    records: int
    rounds: int
    batch: int
    """Expected batch size: of all sites together in distributed mode, of each site in local."""
    rows: tuple[Bought, ...]
    policy: dict[str, float]
    """Field of a site's policy -> the value with which it accepts the proposed plan."""


class HoldoutColumns(Value, frozen=True):
    """Columns of the holdout's file, as in a site's client.toml."""

    text_column: str = "text"
    label_column: str = "label"
    format: Format = "auto"


class EvaluationRequest(Value, frozen=True):
    """A request to score one adapter, as JSON. Paths are absolute."""

    plan: str
    """Text of a plan file."""
    adapter: str
    """Path of a file with the adapter's flat vector, float32 little-endian."""
    model: str
    """Folder of the base model."""
    holdout: str
    """Path of a file with public records that no site trains on."""
    before: str | None = None
    """Path of a file with the vector of the adapter before, for the drift."""
    general: str | None = None
    """Path of a file with texts outside the domain."""
    groups: str | None = None
    """Name of the holdout's column with each record's group."""
    columns: HoldoutColumns = HoldoutColumns()
    answers: AnswerCount = 50
    """Number of records that a language model answers, from the beginning of the holdout."""
    answer_tokens: AnswerTokens = 64
    """Number of tokens of the longest answer."""
    batch_size: BatchSize = 32
    device: str = "cpu"
    """The device that computes, as in a site's client.toml."""
