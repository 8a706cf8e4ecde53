"""The numbers that a draft is given where nothing was tried: rules, without a model or a record.

docs/operator.md ("Choose a mode and its numbers") says where each rule comes from. Nothing here is
trusted: a site computes the privacy of a plan again.
"""

import math
import textwrap
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from umbel_client.planning.distributed import DraftAggregation, DraftDistributed
from umbel_client.planning.draft_file import Draft, DraftGate, DraftLora, DraftModel, checked
from umbel_client.privacy.accounting import largest_delta
from umbel_common.canonical import Name, Value
from umbel_common.errors import ConfigError, DataError, PlanError
from umbel_common.plans.drafted_start import DraftedStart
from umbel_common.plans.plan import (
    Adam,
    Classification,
    FederatedEvaluation,
    LocalPrivacy,
    NoOptimizer,
    Task,
    Training,
)
from umbel_common.plans.ranges import Delta, Positive
from umbel_common.plans.requests import CalibrationRequest, Mode
from umbel_common.plans.server_optimizer import Average, Schedule, ServerAdam, ServerSgd
from umbel_common.toml_values import parse_toml

EPSILON = 3.0
"""What a draft without a promise gets."""
FEWEST_IN_A_BATCH = 10
"""With fewer, a mean gradient says nothing beside its noise."""
_LARGEST_BATCH = 1_000_000
_HEAD_PER_ADAPTER = 40.0
"""Learning rate of a head, as a multiple of its adapter's."""
_CLIP_RANGE = 1.0
_STEP = 1e-6
_REPLACED = ("training", "privacy", "aggregation", "server")


class Promise(msgspec.Struct, frozen=True):
    """What counts of a draft's `[privacy]`; its other fields are written again."""

    epsilon: Positive | None = None
    delta: Delta | None = None


class Ring(msgspec.Struct, frozen=True):
    """What counts of a draft's `[aggregation]`."""

    ring_bits: Literal[16, 32] = 32


class Outline(Value, frozen=True):
    """A draft whose numbers are not chosen yet: see `Draft`."""

    federation: Name
    job: Name
    model: DraftModel
    task: Task
    lora: DraftLora
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)] = 0
    evaluation: FederatedEvaluation | None = None
    release_gate: DraftGate | None = None
    start: DraftedStart | None = None
    privacy: Promise = Promise()
    aggregation: Ring = Ring()
    training: dict[str, Any] | None = None
    server: dict[str, Any] | None = None


class Cohort(NamedTuple):
    """What is known of the sites that are to train together."""

    sizes: tuple[int, ...]
    """Public size of each site."""
    colluding: int
    """Number of sites that each site assumes to collude."""

    @property
    def sites(self) -> int:
        """Number of sites."""
        return len(self.sizes)

    @property
    def records(self) -> int:
        """Records of all sites together, about."""
        return sum(self.sizes)

    @property
    def threshold(self) -> int:
        """The smallest one that sites accept: of two sets with as many signers, both have an honest
        one, and no sum is of fewer than three sites, where there are three."""
        return max((self.sites + self.colluding) // 2 + 1, min(3, self.sites))

    @property
    def usual_dropouts(self) -> int:
        """One site in five, and one at least, as far as the threshold allows."""
        return min(max(1, self.sites // 5), self.sites - self.threshold)


class Shape(NamedTuple):
    """How sites train together, apart from learning rates and noise."""

    mode: Mode
    dropouts: int
    """Number of sites that a sum may lack."""


def read_outline(text: str, file: object) -> Outline:
    """Reads a draft whose numbers are not chosen yet.

    Raises:
        ConfigError: it is not TOML, or has an unknown, missing or wrong field.
    """
    return parse_toml(text, Outline, file)


def cohort_of(request: CalibrationRequest) -> Cohort:
    """The cohort that a request describes.

    Raises:
        ConfigError: so few sites cannot be a cohort.
    """
    cohort = Cohort(request.sizes, request.colluding)
    if cohort.sites < 2 or cohort.threshold > cohort.sites:
        raise ConfigError(
            f"a cohort with {cohort.colluding} colluding sites needs more sites",
            field="--public-size or --sites",
            found=f"{cohort.sites} sites",
            accepted=f"at least {max(2, cohort.colluding + 1)}",
            remedy="admit more sites first",
        )
    return cohort


def shape_of(request: CalibrationRequest, cohort: Cohort) -> Shape:
    """The mode, and how many sites a sum may lack.

    Distributed mode has the noise of a step divided by the square root of the honest sites, so one
    of them gains nothing.

    Raises:
        ConfigError: a sum may not lack this number of sites.
    """
    most = cohort.sites - cohort.threshold
    dropouts = cohort.usual_dropouts if request.dropouts is None else request.dropouts
    if dropouts > most:
        raise ConfigError(
            "a sum cannot lack this number of sites",
            field="--dropouts",
            found=dropouts,
            accepted=f"at most {most}: the threshold of {cohort.sites} sites, of which"
            f" {cohort.colluding} may collude, is {cohort.threshold}",
        )
    honest = cohort.sites - dropouts - cohort.colluding
    return Shape(request.mode or ("distributed" if honest > 1 else "local"), dropouts)


def promise_of(outline: Outline, cohort: Cohort) -> tuple[float, float]:
    """Epsilon and delta: those of the draft, or else usual ones.

    Raises:
        PlanError: the draft's delta is too large for the largest site.
    """
    most = largest_delta(max(cohort.sizes))
    delta = outline.privacy.delta
    if delta is None:
        digit = 10.0 ** math.floor(math.log10(most))
        delta = min(1e-5, float(f"{math.floor(most / digit) * digit:.1g}"))
    if delta > most:
        raise PlanError(
            "delta is too large for the records of a site, which would refuse the plan",
            field="privacy.delta",
            found=delta,
            accepted=f"at most 1 / (10 x {max(cohort.sizes)} records) = {most:.3g}",
        )
    return outline.privacy.epsilon or EPSILON, delta


def proposed(
    outline: Outline,
    cohort: Cohort,
    shape: Shape,
    promise: tuple[float, float],
    rounds: int | None = None,
) -> Draft:
    """The draft with the numbers of the rules.

    Args:
        promise: epsilon and delta.
        rounds: instead of the usual number.

    Raises:
        DataError: there are too few records for a batch.
        PlanError: the draft asks for what no plan can have.
    """
    epsilon, delta = promise
    is_lm = not isinstance(outline.task, Classification)
    shared = shape.mode == "distributed"
    steps = 1 if shared else 4 if is_lm else 5
    rounds = rounds or (20 if is_lm else 30) // steps
    rate, batch = _batch(cohort, 0.125 if is_lm else 0.1, shared=shared)
    clipping: Literal["flat", "automatic"] = "automatic" if is_lm else "flat"
    final = 0.2 if is_lm else 0.1
    training = Training(
        rounds=rounds,
        local_steps=steps,
        expected_batch_size=batch,
        optimizer=NoOptimizer(),
    )
    privacy: DraftDistributed | LocalPrivacy
    server: Average | ServerSgd | ServerAdam = Average()
    aggregation = DraftAggregation(
        threshold=cohort.threshold, ring_bits=outline.aggregation.ring_bits
    )
    if shared:
        least = cohort.sites - shape.dropouts
        privacy = DraftDistributed(
            epsilon=epsilon,
            delta=delta,
            clip_norm=1.0,
            clipping=clipping,
            sampling_rate=rate,
            honest=least - cohort.colluding,
            least_survivors=least,
            spare_attempts=max(2, rounds // 10),
        )
        schedule = Schedule(final=final)
        if is_lm:
            server = ServerAdam(adapter_learning_rate=_adam_rate(epsilon), schedule=schedule)
        else:
            head = 100 * min(epsilon, 3.0) / rounds
            server = ServerSgd(
                adapter_learning_rate=_short(head / _HEAD_PER_ADAPTER),
                head_learning_rate=_short(head),
                momentum=0.9,
                schedule=schedule,
            )
    else:
        privacy = LocalPrivacy(epsilon=epsilon, delta=delta, clip_norm=1.0, clipping=clipping)
        optimizer = (
            Adam(adapter_learning_rate=_adam_rate(epsilon))
            if is_lm
            else Adam(adapter_learning_rate=1e-3, head_learning_rate=4e-2)
        )
        training = msgspec.structs.replace(training, optimizer=optimizer, final_learning_rate=final)
        # No sum of all sites may wrap.
        step = _STEP
        if aggregation.ring_bits == 16:
            step = _short(1.05 * _CLIP_RANGE * cohort.sites / 2**15)
        aggregation = msgspec.structs.replace(aggregation, clip_range=_CLIP_RANGE, step=step)
    return checked(
        Draft(
            federation=outline.federation,
            job=outline.job,
            model=outline.model,
            task=outline.task,
            lora=outline.lora,
            training=training,
            privacy=privacy,
            aggregation=aggregation,
            seed=outline.seed,
            evaluation=outline.evaluation,
            release_gate=outline.release_gate,
            start=outline.start,
            server=server,
        )
    )


def require_batch(draft: Draft, cohort: Cohort) -> None:
    """Refuses a draft with batches in which little would be left beside the noise.

    Raises:
        DataError: says how many records there are.
    """
    batch = draft.training.expected_batch_size
    if batch >= FEWEST_IN_A_BATCH:
        return
    shared = isinstance(draft.privacy, DraftDistributed)
    raise DataError(
        "there are too few records for a batch",
        field="public sizes",
        found=f"{cohort.records} records at {cohort.sites} sites, the smallest has"
        f" {min(cohort.sizes)}: batches of {batch} on average",
        accepted=f"batches of at least {FEWEST_IN_A_BATCH}",
        remedy="admit more sites"
        + ("" if shared else ", leave out the smallest one, or take --mode distributed"),
    )


def _batch(cohort: Cohort, usual: float, *, shared: bool) -> tuple[float, int]:
    """Sampling rate and expected batch size: of the union, or at each site."""
    if shared:
        rate = min(usual, _LARGEST_BATCH / cohort.records)
        return rate, max(1, round(rate * cohort.records))
    # Each site has the same batch, so the smallest one sets its limit: half of its records.
    mean = cohort.records / cohort.sites
    batch = max(1, min(round(usual * mean), min(cohort.sizes) // 2, _LARGEST_BATCH))
    return batch / min(cohort.sizes), batch


def _adam_rate(epsilon: float) -> float:
    """4e-2 at epsilon 8, 3e-2 at 3 and 2e-2 at 1: Adam's rate must follow the noise."""
    return _short(2e-2 * min(max(epsilon, 0.1), 8.0) ** (1 / 3))


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def draft_text(text: str, draft: Draft, why: str, file: object) -> str:
    """A draft's text with the numbers of another draft; the rest stays, comments included.

    Args:
        text: the draft, whose tables of numbers are left out.
        why: a sentence about the numbers, for people.

    Raises:
        ConfigError: the text has its tables in a form in which they cannot be replaced.
    """
    kept, replaced = [], False
    for line in text.splitlines():
        header = line.split("#")[0].strip()
        if header.startswith("["):
            replaced = header.strip("[] ").split(".")[0].strip().strip("\"'") in _REPLACED
        if not replaced:
            kept.append(line)
    while kept and not kept[-1].strip():
        kept.pop()
    wrap = textwrap.TextWrapper(80, initial_indent="# ", subsequent_indent="# ").wrap
    written = "\n".join([*kept, "", *wrap(why), *_tables(draft)]) + "\n"
    try:
        same = parse_toml(written, Draft, file) == draft
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(
            "the numbers of a draft cannot be replaced",
            file=file,
            found="training, privacy, aggregation or server, but not as a table of its own",
            accepted="[training], [privacy], [aggregation] and [server], or none of them",
            remedy="leave out these four, and give the rest as docs/operator.md shows it",
        )
    return written


def _tables(draft: Draft) -> list[str]:
    lines = []
    for name in _REPLACED:
        fields = _told(getattr(draft, name))
        inner = fields.pop("schedule", None)
        if name == "server" and isinstance(draft.server, Average):
            continue
        lines += [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in fields.items()), ""]
        if inner is not None:
            rows = (f"{key} = {_value(value)}" for key, value in _told(inner).items())
            lines += [f"[{name}.schedule]", *rows, ""]
    return lines[:-1]


def _told(table: msgspec.Struct) -> dict[str, Any]:
    """The fields of a table that are not as by default, the field that names its kind first."""
    config, values = table.__struct_config__, msgspec.structs.asdict(table)
    kind = {} if config.tag_field is None else {config.tag_field: config.tag}
    fields = msgspec.structs.fields(table)
    return kind | {one.name: values[one.name] for one in fields if values[one.name] != one.default}


def _value(value: object) -> str:
    """A value in TOML: none of these tables has a text that needs to be escaped."""
    match value:
        case str():
            return f'"{value}"'
        case msgspec.Struct():
            inside = (f"{key} = {_value(one)}" for key, one in _told(value).items())
            return f"{{ {', '.join(inside)} }}"
        case _:
            return repr(value)
