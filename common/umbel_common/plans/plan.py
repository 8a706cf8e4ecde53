"""The training plan: everything that a job may do to a site's data, in one signed value.

The law: a plan is hashed and signed, so no field, order or rounding of it changes without another
wire version.

A site's policy judges the plan before anything else happens. Every later message names its digest,
so a server that shows two sites different plans gets masks that do not cancel.
"""

import math
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from umbel_common.canonical import Digest, Name, Value, digest, encode
from umbel_common.errors import PlanError
from umbel_common.plans.ranges import (
    Count,
    Delta,
    Fraction,
    LearningRate,
    Positive,
    Scale,
    Version1,
    Version2,
)
from umbel_common.plans.server_optimizer import Average, ServerOptimizer
from umbel_common.plans.start import SeedStart, Start
from umbel_common.trust.identity import label_of

Method = Literal["both", "ffa", "alternate", "fedsvd"]
Scaling = Literal["standard", "rank-stabilised"]
"""Factor of an adapter: alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023)."""
Clipping = Literal["flat", "automatic"]
Template = Literal["chat", "plain"]
LossOn = Literal["answer", "all"]
TooLong = Literal["refuse", "truncate"]
Weights = Literal["equal", "size-class", "examples"]


class BaseModel(Value, frozen=True):
    """The frozen model that every site loads from its own disk."""

    name: str
    """The model's name among people; `base_model_name_or_path` of the released adapter."""
    digest: Digest
    """Digest of the folder's weights, configuration and tokenizer
    (`umbel_host.files.model_digest.folder_digest`)."""


class Classification(Value, frozen=True, tag_field="task", tag="classification"):
    """Sequence classification: one label for each text."""

    labels: tuple[str, ...]
    """Every label that may occur, in the order of the logits. Each site decides which column of its
    data has them."""
    max_tokens: Annotated[int, msgspec.Meta(ge=4, le=8192)] = 128
    """Number of tokens after which a text is cut."""
    head: Literal["mean-pool", "stock"] = "mean-pool"
    """Kind of head. `mean-pool`: mean of the token vectors, normalised, times `logit_scale`, then a
    linear layer that starts at zero. `stock`: the model's own classification head, a linear layer
    from the public seed on top of the pretrained pooler."""
    logit_scale: Scale = 10.0

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError("a classification needs at least two labels, all different")


class CausalLm(Value, frozen=True, tag_field="task", tag="causal-lm"):
    """Instruction tuning of a language model: the answer's tokens, given what comes before them.

    Each site decides itself in which of the accepted formats it keeps its records.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=4, le=131_072)] = 512
    """Number of tokens of the longest record."""
    template: Template = "chat"
    """Template. `chat`: records are conversations, rendered by the chat template of the base
    model's tokenizer. `plain`: the prompt as it is, the answer, and the token that ends a text."""
    loss_on: LossOn = "answer"
    """Tokens that count: those of the answer (the last turn of a conversation), or all."""
    too_long: TooLong = "refuse"
    """Treatment of a record of more than `max_tokens`. `refuse`: it is left out. `truncate`: it is
    cut; if nothing of its answer would be left, it is left out all the same. A site tells its own
    people which records it leaves out, and nobody else."""


Task: TypeAlias = Classification | CausalLm
"""The tasks that a plan can name."""


class Tensor(Value, frozen=True):
    """One trained tensor, by its name in the released PEFT folder."""

    name: str
    shape: tuple[Count, ...]
    role: Literal["lora_A", "lora_B", "head"]

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size


class Lora(Value, frozen=True):
    """The adapter (Hu et al. 2021): W + scaling B A on the targeted linear layers."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=512)]
    alpha: Scale
    target_modules: tuple[str, ...]
    """Names of the linear layers, as PEFT matches them; empty: only the head is trained."""
    layers: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] | None
    """Indices of the transformer layers that get an adapter; None: all of them."""
    method: Method
    """Matrices that are trained. `both`: A and B in each round. `ffa`: B alone, A stays as
    initialised (Sun et al. 2024). `alternate`: B in odd rounds, A in even ones (RoLoRA, Chen et al.
    2024). B comes first, because with B = 0 the gradient of A is zero, and a round of A would
    release noise alone. `fedsvd`: B alone, and each release re-factorises the product B A by its
    singular values, so that A has orthonormal rows (FedSVD, Lee et al. 2025, arXiv 2505.12805)."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
    """Public seed of the initial adapter: A with orthonormal rows, B zero."""
    tensors: tuple[Tensor, ...]
    """Every tensor of the adapter, in the order in which it is flattened."""
    scaling: Literal["standard", "rank-stabilised"] = "standard"
    """Factor of B A: `standard` is alpha / rank, `rank-stabilised` is alpha / sqrt(rank) (rsLoRA,
    Kalajdzievski 2023)."""

    @property
    def size(self) -> int:
        """Number of elements of the whole adapter."""
        return sum(tensor.size for tensor in self.tensors)

    def kinds_of_rounds(self, rounds: int) -> tuple[int, ...]:
        """A round of each kind in a job of this many: one, or two where they alternate."""
        return (1, 2) if self.method == "alternate" and rounds > 1 else (1,)

    def trained(self, round_number: int) -> tuple[Tensor, ...]:
        """The tensors that a round (from 1) changes, in the order in which they are flattened."""
        frozen: tuple[str, ...] = ()
        if self.method in ("ffa", "fedsvd"):
            frozen = ("lora_A",)
        elif self.method == "alternate":
            frozen = ("lora_A",) if round_number % 2 == 1 else ("lora_B",)
        return tuple(tensor for tensor in self.tensors if tensor.role not in frozen)


class Adam(Value, frozen=True, tag_field="optimizer", tag="adam"):
    """Adam (Kingma and Ba 2015) on the noisy gradient; its moments stay at the site."""

    adapter_learning_rate: LearningRate
    head_learning_rate: LearningRate | None = None
    """Learning rate of a classification head; None: that of the adapter."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    eps: Positive = 1e-8
    """Number added to the root of the second moment. With `unbiased`, instead the least second
    moment (gamma' of DP-AdamBC), so a step is at most the learning rate times first moment /
    sqrt(eps)."""
    unbiased: bool = False
    """Whether to use DP-AdamBC (Tang, Shpilevskiy and Lecuyer 2024, algorithm 1), which subtracts
    from the second moment what the noise adds to it. Steps are then longer, so learning rates and
    eps have to be searched again."""


class Sgd(Value, frozen=True, tag_field="optimizer", tag="sgd"):
    """Gradient descent with momentum on the noisy gradient; the momentum stays at the site."""

    adapter_learning_rate: LearningRate
    head_learning_rate: LearningRate | None = None
    """Learning rate of a classification head; None: that of the adapter."""
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0


class NoOptimizer(Value, frozen=True, tag_field="optimizer", tag="none"):
    """No step at the site: it sends its gradient, and the server's optimizer takes the step."""


class Training(Value, frozen=True):
    """What a site computes in each round."""

    rounds: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    local_steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    expected_batch_size: Count
    """Mean number of records in a Poisson batch. In local mode a site of public size N samples each
    of its records with probability expected_batch_size / N, its sampling rate. In distributed mode
    it is the public number by which the sum over all sites is divided."""
    optimizer: Adam | Sgd | NoOptimizer
    final_learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Share of their first value to which learning rates fall linearly over the whole job."""
    average_decay: Fraction | None = None
    """Decay of the exponential moving average of the parameters over a round's local steps, without
    the bias of its start (De et al. 2022, section 3), which a site then releases. None: a site
    releases the parameters of the last step."""

    @property
    def site_optimizer(self) -> Adam | Sgd:
        """The optimizer of a site that takes steps of its own.

        Raises:
            PlanError: the plan has none.
        """
        if isinstance(self.optimizer, NoOptimizer):
            raise PlanError(
                "a site takes no step of its own under this plan",
                field="training.optimizer",
                found="none",
                accepted="adam or sgd",
            )
        return self.optimizer

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole job at one site."""
        return self.rounds * self.local_steps

    def learning_rate_factor(self, step: int) -> float:
        """Share of the first learning rate at `step` (from 0) of the job."""
        if self.steps == 1:
            return 1.0
        return 1.0 - (1.0 - self.final_learning_rate) * step / (self.steps - 1)


class DifferentialPrivacy(Value, frozen=True):
    """What the modes of DP-SGD (Abadi et al. 2016) have in common."""

    epsilon: Positive
    delta: Delta
    clip_norm: Scale
    """Largest contribution of one unit to the sum of a step, in the Euclidean norm."""
    clipping: Clipping = "flat"
    """Kind of clipping. `flat`: a gradient longer than the clip norm is shortened to it.
    `automatic`: each gradient is brought to nearly the clip norm (AUTO-S, Bu et al. 2023), so the
    clip norm only scales the learning rate. Both cost the same privacy."""


class LocalPrivacy(DifferentialPrivacy, frozen=True, tag_field="mode", tag="local"):
    """Each site's own DP-SGD protects its records against everyone.

    (epsilon, delta) holds for the whole job at each site, under add/remove adjacency. A site
    calibrates its noise multiplier to its own sampling rate.
    """


MOST_STEPS = 2**24
"""Largest clip norm of distributed mode in steps: float32 holds every integer up to it."""


FEWEST_NOISE_BITS = 4
"""Fewest bits of the noise of distributed mode: of what its sampler draws, and what its privacy is
proven for (`umbel_client.privacy.discrete_gaussian`, `shared_noise`)."""


class DistributedPrivacy(
    DifferentialPrivacy, frozen=True, kw_only=True, tag_field="mode", tag="distributed"
):
    """Sites share the noise: each adds a part of it, and masks show the sum alone.

    (epsilon, delta) holds for the whole job against those who read the sums, as long as the noise
    of `honest` sites in each sum is unknown to them. Each number is fixed here. A site computes
    epsilon from them, and none follows from a size that anybody states.
    """

    sampling_rate: Annotated[float, msgspec.Meta(gt=0, le=1)]
    """Probability with which each site draws each of its units into a batch."""
    noise_bits: Annotated[int, msgspec.Meta(ge=2, le=24)]
    """Scale of the noise that each site adds to a coordinate: 2^noise_bits steps
    (`Aggregation.step`) of a discrete Gaussian."""
    honest: Annotated[int, msgspec.Meta(ge=1, le=100)]
    """Number of sites in each sum whose noise the reader does not know."""
    least_survivors: Annotated[int, msgspec.Meta(ge=2, le=100)]
    """Fewest sites whose vectors may be in a sum. A site signs no smaller set."""
    most_attempts: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    """Largest number of attempts of the whole job. Each costs its own part of epsilon."""


class NoPrivacy(Value, frozen=True, tag_field="mode", tag="none"):
    """No differential privacy: gradients are neither clipped nor noised. Sites refuse it unless
    their policy allows it by name."""


def levels(clip_range: float, step: float) -> int:
    """Largest magnitude of a clipped and rounded coordinate, in steps."""
    return math.ceil(clip_range / step)


class Aggregation(Value, frozen=True):
    """How deltas are encoded, masked and summed."""

    threshold: Annotated[int, msgspec.Meta(ge=2, le=100)]
    """Number of shares that recover a secret; also the least number of survivors."""
    clip_range: Positive
    """Bound of each coordinate of a delta, which is clipped to [-clip_range, clip_range]."""
    step: Positive
    """Quantisation step, in units of the delta."""
    ring_bits: Literal[16, 32] = 32
    weights: Weights = "equal"
    """Weight of a site: `equal`, `size-class` (public, from the roster), or `examples`, its number
    of records, masked. `examples` is refused with differential privacy, because the exact sum of
    the numbers is a release of its own."""
    max_weight: Count = 1
    """Largest weight that a site may use; 1 for `equal`."""

    @property
    def largest_change(self) -> float:
        """Largest magnitude of a coordinate of a delta that was clipped and rounded."""
        return levels(self.clip_range, self.step) * self.step


COUNTS = 2
"""Number of coordinates of the counts of an evaluation: score and records."""


class FederatedEvaluation(Value, frozen=True):
    """Each site scores the adapter that a round starts from on records that it holds out.

    Two noisy counts of each site, its records and their score, travel in the masked sum. This is a
    Gaussian mechanism on top of the round's steps, and the plan's epsilon covers both.
    """

    noise_multiplier: Positive
    """Standard deviation of the noise on a count, divided by sqrt(2), the sensitivity of
    the two counts."""
    max_records: Count
    """Bound to which a site's counts are clipped, and the scale on which they are rounded."""
    largest_loss: Scale = 10.0
    """Loss in nats at which a language model's loss on a record is clipped; a record's score is the
    clipped loss divided by this."""


class ReleaseGate(Value, frozen=True):
    """Holds back a round's adapter that is worse than its predecessor on public records.

    The predecessor is then released once more, and sites train on from it.
    """

    holdout: Digest
    """SHA-256 of the file with the public records."""
    max_loss_increase: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    """Largest allowed increase of the mean loss over the predecessor's, in nats."""


class TrainingPlan(Value, frozen=True):
    """Everything a job may do to a site's data."""

    federation: Name
    job: Name
    model: BaseModel
    task: Task
    lora: Lora
    training: Training
    privacy: LocalPrivacy | NoPrivacy | DistributedPrivacy
    aggregation: Aggregation
    evaluation: FederatedEvaluation | None = None
    """Evaluation at the sites; None: nothing but adapters is summed."""
    release_gate: ReleaseGate | None = None
    """Gate before each release; None: each round's adapter is released, however bad it is."""
    version: Version1 = 1

    def digest(self) -> bytes:
        """The digest by which all parties know that they follow the same plan, 32 bytes."""
        return digest(label_of(type(self)), encode(self))

    @property
    def start(self) -> Start:
        """The adapter from which the job starts."""
        return SeedStart()

    @property
    def server(self) -> ServerOptimizer:
        """How the server's step follows from a round's sum."""
        return Average()

    @property
    def least_survivors(self) -> int:
        """Fewest sites whose vectors may be in a sum."""
        privacy, threshold = self.privacy, self.aggregation.threshold
        if isinstance(privacy, DistributedPrivacy):
            return max(threshold, privacy.least_survivors)
        return threshold

    @property
    def kinds_of_rounds(self) -> tuple[int, ...]:
        """A round of each kind: one, or two where rounds alternate what they train."""
        return self.lora.kinds_of_rounds(self.training.rounds)

    def trained_tensors(self, round_number: int) -> tuple[Tensor, ...]:
        """The tensors that a round (from 1) changes, in the order in which they are flattened."""
        return self.lora.trained(round_number)

    def vector_length(self, round_number: int) -> int:
        """Number of coordinates that a site masks in a round (from 1), without the weight."""
        counts = 0 if self.evaluation is None else COUNTS
        return sum(tensor.size for tensor in self.trained_tensors(round_number)) + counts


class LoraAdapter(Lora, frozen=True, tag_field="adapter", tag="lora"):
    """The adapter of a plan of version 2, which names its kind."""


class ScoreEvaluation(FederatedEvaluation, frozen=True, tag_field="evaluation", tag="score"):
    """The evaluation of a plan of version 2, which names its kind."""


class LossGate(ReleaseGate, frozen=True, tag_field="gate", tag="loss"):
    """The release gate of a plan of version 2, which names its kind."""


class TrainingPlan2(TrainingPlan, frozen=True, kw_only=True):
    """A plan of version 2: it can name a start and an optimizer of the server.

    Its attempts and releases are `RoundHeader2` and `Release2`.
    """

    lora: LoraAdapter
    evaluation: ScoreEvaluation | None = None
    release_gate: LossGate | None = None
    own_start: Start = msgspec.field(default=SeedStart(), name="start")
    own_server: ServerOptimizer = msgspec.field(default=Average(), name="server")
    version: Version2 = 2

    @property
    def start(self) -> Start:
        """The adapter from which the job starts."""
        return self.own_start

    @property
    def server(self) -> ServerOptimizer:
        """How the server's step follows from a round's sum."""
        return self.own_server


def second_version(
    plan: TrainingPlan, *, start: Start | None = None, server: ServerOptimizer | None = None
) -> TrainingPlan2:
    """The plan in version 2.

    Args:
        start: None: the plan's own.
        server: None: the plan's own.
    """
    gate, evaluation = plan.release_gate, plan.evaluation
    parts = {
        "lora": LoraAdapter(**_fields(plan.lora)),
        "evaluation": None if evaluation is None else ScoreEvaluation(**_fields(evaluation)),
        "release_gate": None if gate is None else LossGate(**_fields(gate)),
        "own_start": plan.start if start is None else start,
        "own_server": plan.server if server is None else server,
        "version": 2,
    }
    return TrainingPlan2(**(_fields(plan) | parts))


def _fields(value: Value) -> dict[str, Any]:
    return msgspec.structs.asdict(value)


PLAN_VERSIONS = (TrainingPlan, TrainingPlan2)
"""Every version of a plan that is read, for `open_signed` and `decode_canonical`."""


SENSITIVITY = math.sqrt(2)
"""Largest Euclidean norm that one unit adds to the two counts: a score of at most 1, and 1."""


def standard_deviation(evaluation: FederatedEvaluation, sites: int = 1) -> float:
    """Standard deviation of the noise on each count of a sum over `sites`."""
    return evaluation.noise_multiplier * SENSITIVITY * math.sqrt(sites)
