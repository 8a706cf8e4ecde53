"""A scenario: one TOML file that says who trains what on which data, and which faults occur."""

import string
from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_client.planning.distributed import DraftDistributed
from umbel_common.canonical import Name, Value
from umbel_common.plans.drafted_start import DraftedLabelNames, DraftedSeed
from umbel_common.plans.figures import Format
from umbel_common.plans.plan import (
    CausalLm,
    FederatedEvaluation,
    LocalPrivacy,
    Method,
    NoPrivacy,
    Scaling,
)
from umbel_common.plans.ranges import Count, Fraction, Positive
from umbel_common.plans.server_optimizer import Average, ServerOptimizer

Seed = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
Package = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z",
        description="the name of a package of Python as it is imported, in quotes",
    ),
]
Baseline = Literal["base", "majority", "head-only", "local-only", "pooled"]
AnswerCount = Annotated[int, msgspec.Meta(ge=0, le=100)]
Stage = Literal["train", "share", "mask", "confirm", "unmask"]


class Model(Value, frozen=True):
    """`[model]`: the base model, given by either `package` or `path`."""

    name: str
    """Hub id or display name; the released adapter names its base model by it."""
    package: Package | None = None
    """An installed package that has the model in its `model` folder; it is never imported."""
    gguf: str | None = None
    """A GGUF file of `package`, instead of its `model` folder. It is converted once, into the
    user's cache."""
    path: str | None = None
    """A local folder; relative to the scenario file."""


class Data(Value, frozen=True):
    """`[data]`: fields that every source has."""

    train_records: Count | None = None
    """Size of the random sample to train on, over all sites; absent: all records."""
    test_records: Count | None = None
    """Size of the random sample of test records to score on; absent: all of them."""
    records_per_label: Count | None = None
    """The most records to keep of each label; absent: all of them."""


class Icd10Data(Data, frozen=True, tag_field="source", tag="icd10cm"):
    """`source = "icd10cm"`: classifies the ICD-10-CM text of a diagnosis."""

    label: Literal["chapter", "category"] = "chapter"
    """`chapter`: 19 labels; the test set has other three-character categories than the training
    set. `category`: these categories are the labels, over a thousand; the test set has other
    codes."""


class HpoData(Data, frozen=True, tag_field="source", tag="hpo"):
    """`source = "hpo"`: asks what a phenotype is; the answer is its definition in the Human
    Phenotype Ontology."""

    answers: AnswerCount = 6
    """Number of test questions that each model answers in the report."""


class FileData(Data, frozen=True, tag_field="source", tag="files", kw_only=True):
    """`source = "files"`: own files, of every kind and format that a site takes."""

    train: str | dict[Name, str]
    """Path of the training file, relative to the scenario file; or the file of each site."""
    test: str
    """Path of the test file. It is assumed to be public: the server scores on it."""
    text_column: str = "text"
    label_column: str = "label"
    format: Format = "auto"
    """Format of a language model's records; `auto`: what the columns show."""
    unit_column: str | None = None
    """The column that says whose a record is. A unit's records are at one site, and privacy is
    promised for the unit."""
    max_records_per_unit: Count = 32
    """Most records of a unit that a site uses."""
    general: str | None = None
    """A file with a column `text`, about something else: it shows what a language model forgets."""
    answers: AnswerCount = 6
    """Number of test questions that each language model answers in the report."""


class Sites(Value, frozen=True):
    """`[sites]`: who takes part, and how the training records are divided among them."""

    count: Annotated[int, msgspec.Meta(ge=2, le=100)]
    """Number of sites."""
    names: tuple[Name, ...] | None = None
    """One name for each site; absent: hospital-a, hospital-b and so on."""
    partition: Literal["iid", "dirichlet", "column", "files"] = "dirichlet"
    """`iid`: at random. `dirichlet`: each label in random shares (Hsu et al. 2019, section 2).
    `column`: all records with the same value of `column` go to one site. `files`: each site has the
    file that `data.train` names for it."""
    alpha: Positive = 0.5
    """Concentration of the Dirichlet distribution: the smaller, the more the sites differ."""
    column: str | None = None
    """A column of the data files. For icd10cm: `category` (the first three characters of the
    code). For hpo: `system` (the organ system)."""
    minimum_records: Count = 1
    """The fewest records of a site; a partition that gives a site fewer is an error."""

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names of the sites, as given or generated."""
        if self.names is not None:
            return self.names
        if self.count <= len(string.ascii_lowercase):
            return tuple(f"hospital-{letter}" for letter in string.ascii_lowercase[: self.count])
        return tuple(f"hospital-{number:03}" for number in range(1, self.count + 1))


class ClassificationSettings(Value, frozen=True, tag_field="task", tag="classification"):
    """`[task]`: classification of texts; see `umbel_common.plans.plan.Classification`."""

    max_tokens: Annotated[int, msgspec.Meta(ge=4, le=8192)] = 128
    """Length in tokens at which texts are cut."""
    head: Literal["mean-pool", "stock"] = "mean-pool"
    """`mean-pool`: a zero-initialised linear layer on the mean token vector. `stock`: the model's
    own classification head."""
    logit_scale: Positive = 10.0
    """Factor on the normalised mean vector before the `mean-pool` head."""


Task: TypeAlias = ClassificationSettings | CausalLm
"""`[task]`; a language model has the same settings as in a plan."""


class LoraSettings(Value, frozen=True):
    """`[lora]`: the adapter; see `umbel_common.plans.plan.Lora`."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=512)]
    alpha: Positive
    """The adapter's output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"]
    """Names of the linear layers that get an adapter; `all-linear`: all but the output layer."""
    layers: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] | None = None
    """Indices of the transformer layers that get an adapter; absent: all."""
    method: Method = "alternate"
    """`both`, `ffa` (A frozen), `alternate` (B in odd rounds, A in even ones), or `fedsvd` (A
    frozen in a round, and rotated with B by the server after it)."""
    scaling: Scaling = "standard"
    """`standard` (alpha / rank) or `rank-stabilised` (alpha / sqrt(rank))."""


class TrainingSettings(Value, frozen=True):
    """`[training]`: what each site computes; see `umbel_common.plans.plan.Training`."""

    rounds: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    local_steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    """Optimizer steps of a site in each round."""
    expected_batch_size: Count
    """Average number of records in a Poisson batch."""
    adapter_learning_rate: Positive | None = None
    """Needed unless `optimizer` is `none`."""
    head_learning_rate: Positive | None = None
    """Learning rate of a classification head; absent: the adapter's."""
    optimizer: Literal["adam", "sgd", "none"] = "adam"
    """`none`: distributed mode, whose steps the server takes (`[server]`)."""
    beta1: Fraction = 0.9
    """Adam only."""
    beta2: Fraction = 0.99
    """Adam only."""
    eps: Positive = 1e-8
    """Adam only. With `unbiased`: the smallest second moment."""
    unbiased: bool = False
    """Adam only: DP-AdamBC, which subtracts the noise from the second moment."""
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """SGD only."""
    final_learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Learning rates fall linearly to this share of their first value."""
    average_decay: Fraction | None = None
    """Decay of the moving average over a round's local steps that is released; absent: the result
    of the last step is released."""


class AggregationSettings(Value, frozen=True):
    """`[aggregation]`: how deltas are encoded and masked; see
    `umbel_common.plans.plan.Aggregation`."""

    threshold: Annotated[int, msgspec.Meta(ge=2, le=100)]
    """Number of shares that recover a secret, and the smallest number of survivors."""
    clip_range: Positive | None = None
    """Each coordinate of a delta is clipped to [-clip_range, clip_range]; absent: to 1, or in
    distributed mode to what the ring has room for."""
    step: Positive | None = None
    """Quantisation step, in units of the delta; absent: 1e-6. In distributed mode it follows from
    the noise."""
    ring_bits: Literal[16, 32] = 32
    """Number of bits of a masked coordinate on the wire."""
    weights: Literal["equal", "size-class", "examples"] = "equal"
    """Weights of the sites in the mean. `examples` (masked record counts) is refused with
    differential privacy."""


class SitePolicy(Value, frozen=True):
    """`[site_policy]`: what the policy of every simulated site requires."""

    colluding_sites: Annotated[int, msgspec.Meta(ge=0, le=99)] = 1
    """Number of sites that may work with the server; 2 x threshold must exceed sites + this."""
    minimum_cohort: Annotated[int, msgspec.Meta(ge=2, le=100)] = 3
    """The smallest cohort in which a site takes part."""


class Dropout(Value, frozen=True):
    """One entry of `[[faults.dropouts]]`: a site falls silent in attempt 1 of a round."""

    round: Annotated[int, msgspec.Meta(ge=1)]
    site: Name
    stage: Stage
    """The first stage of the round that the site does not answer."""


class GateSettings(Value, frozen=True):
    """`[release_gate]`: holds back what scores worse on the test set; see
    `umbel_common.plans.plan.ReleaseGate`."""

    max_loss_increase: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    """Largest allowed increase of the mean loss over the predecessor's, in nats."""


class Faults(Value, frozen=True):
    """`[faults]`: faults that the simulation causes on purpose."""

    dropouts: tuple[Dropout, ...] = ()


class Compute(Value, frozen=True):
    """`[compute]`: how this machine is used. It has no effect on the result."""

    workers: Count | None = None
    """Number of sites that work at the same time, one thread each; absent: one for each core."""
    site_batch_size: Count | Literal["auto"] = msgspec.field(default=96, name="physical_batch_size")
    """`physical_batch_size`: number of records that go through the model at once; it limits the
    memory. `auto`: each site determines it, as in a deployment."""

    device: str | tuple[str, ...] = "cpu"
    """The device that computes: `cpu`, `cuda`, `cuda:1`, `mps` without privacy, or `auto`; or
    several, over which the sites are dealt in turn."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices, at least one; the first also scores."""
        return (self.device,) if isinstance(self.device, str) else self.device

    def device_of(self, number: int) -> str:
        """The device of the site (or party) of that number, from 0."""
        return self.devices[number % len(self.devices)]

    @property
    def physical_batch_size(self) -> int:
        """The batch size for training outside a site; with `auto`, the default."""
        return 96 if self.site_batch_size == "auto" else self.site_batch_size


class Scenario(Value, frozen=True, kw_only=True):
    """A whole scenario file."""

    name: Name
    description: str
    """One line for `umbel-simulate list`."""
    seed: Seed
    """Public seed of the partition, the samples and the initial adapter; never of noise or keys."""
    insecure_test_seed: Seed | None = None
    """Makes noise, batches and keys repeatable, and therefore predictable: for tests only."""
    baselines: tuple[Baseline, ...] = ("majority", "head-only", "local-only", "pooled")
    """What the federated adapter is compared with."""
    model: Model
    data: Icd10Data | HpoData | FileData
    sites: Sites
    task: Task = ClassificationSettings()
    lora: LoraSettings
    training: TrainingSettings
    privacy: LocalPrivacy | NoPrivacy | DraftDistributed
    """`mode = "local"` with epsilon, delta, clip_norm and clipping; `mode = "distributed"`, which
    has more; or `mode = "none"`."""
    aggregation: AggregationSettings
    server: ServerOptimizer = Average()
    """`[server]`: the server's optimizer; see `umbel_common.plans.server_optimizer`. Absent: the
    mean of the deltas is the step."""
    evaluation: FederatedEvaluation | None = None
    """`[evaluation]`: each site scores adapters on records that it holds out; absent: none does."""
    release_gate: GateSettings | None = None
    """Absent: each round's adapter is released."""
    start: DraftedSeed | DraftedLabelNames | None = None
    """`[start]`: absent, the adapter follows from the seed. With `start = "label-names"` and
    without `names`, an icd10cm label's text is its title in the list."""
    site_policy: SitePolicy = SitePolicy()
    faults: Faults = Faults()
    compute: Compute = Compute()
