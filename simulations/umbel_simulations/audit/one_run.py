"""`umbel-simulate audit`: an attack's lower bound on epsilon beside the accountant's claim.

One site of a scenario is trained twice with canaries in its data (Steinke et al. 2023): once with
records and once with patients as the unit of privacy. In distributed mode the site's sums are
attacked instead, with the noise of the honest sites for the claim against readers of the sums, and
with its own alone for the claim against everybody. The bound can refute a claim and never prove it.
It grows with the number of canaries, and stays far below epsilon even where the claim is tight.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
import torch
from rich import box
from rich.table import Table

from umbel_client.models.site_model import load_public
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.privacy.calibration import SiteNoise, noise_for
from umbel_client.privacy.shared_noise import shares_of
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.round import LocalTrainer
from umbel_common.canonical import Entropy, Value
from umbel_common.errors import ConfigError, VerificationError
from umbel_common.plans.plan import (
    FEWEST_NOISE_BITS,
    DifferentialPrivacy,
    DistributedPrivacy,
    NoPrivacy,
    TrainingPlan,
)
from umbel_simulations.audit.bound import epsilon_lower_bound
from umbel_simulations.audit.canaries import (
    AnyRecords,
    Unit,
    first_units,
    make_canaries,
    records_of_a_unit,
    site_records,
    unit_count,
    with_included,
)
from umbel_simulations.audit.game import (
    GameOutcome,
    OnRound,
    flip_coins,
    gather_evidence,
    gather_shared_evidence,
    step_by_step,
)
from umbel_simulations.backends.site_config import public_size
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.inputs.partition import partition
from umbel_simulations.inputs.sources import Example, load_source
from umbel_simulations.scenario.plan import make_plan
from umbel_simulations.scenario.scenario import Scenario

CONFIDENCE = 0.95
KNOWN_RECORDS = 500
"""The most records that the site has besides the canaries, in complete units. The claim holds for
every data set, so the auditor chooses one in which little hides a canary."""
GUESSES = 0.1
"""Share of the canaries that the attack guesses. It is fixed before the attack sees anything."""


Observer = Literal["readers", "everybody"]
"""Against whom a claim is: readers of the sums, or all other parties together."""

OnAuditRound = Callable[[Unit, Observer, int, int], None]
"""Called after each round or attempt with (unit, observer, rounds done, rounds); each has one
step."""


class AuditResult(Value, frozen=True):
    """The claim for one unit of privacy, and what an attack showed against it."""

    scenario: str
    site: str
    unit: str
    """`record`, or the column that names the patient of a record."""
    records: int
    """Number of records besides the canaries."""
    units: int
    """Number of units that these records belong to; equal to `records` where each is a unit."""
    steps: int
    """Number of steps; in distributed mode, the plan's most attempts."""
    sampling_rate: float
    noise_multiplier: float
    claimed_epsilon: float
    """The accountant's upper bound at `delta`."""
    delta: float
    canaries: int
    """Number of canary units: whole patients where patients are the unit."""
    included: int
    guesses: int
    correct: int
    confidence: float
    epsilon_lower_bound: float
    """The true epsilon is above this with probability `confidence`."""
    largest_bound: float
    """The lower bound if every guess were right: the most that this audit can show."""
    against: Observer = "everybody"
    """Against whom the claim is."""


@dataclass(frozen=True)
class Audited:
    """The site that is audited, before the unit of privacy is chosen."""

    site: str
    examples: Sequence[Example]
    plan: TrainingPlan
    """Its expected batch size counts records."""
    model: Path


@dataclass(frozen=True)
class Claim:
    """What a plan promises, against one kind of observer."""

    against: Observer
    noise: SiteNoise
    """The claimed noise, as this observer meets it."""
    vectors: int | None
    """Number of vectors in a sum whose noise it does not know; None: a site sends deltas."""


def audit_scenario(
    scenario: Scenario,
    canaries: int,
    entropy: Entropy,
    on_round: OnAuditRound,
    *,
    noise_share: float = 1.0,
) -> tuple[AuditResult, ...]:
    """Audits the smallest site of a scenario, for each unit.

    The plan's expected batch size counts units. Where patients are the unit, it is the number of
    patients that together have the scenario's number of records, so both audits have nearly the
    same sampling rate. In distributed mode the plan says the sampling rate, for either unit.

    Args:
        canaries: number of units whose presence the attack guesses, in each audit.
        entropy: source of coins, batches and noise.
        noise_share: share of the claimed noise that is really added, to a power of two in
            distributed mode. Below 1 the claim is false, and the audit must be able to show it.

    Returns:
        One result for each unit, record and patient; in distributed mode two for each, against
        readers of the sums and against everybody.

    Raises:
        ConfigError: the scenario claims no privacy.
        DataError, CalibrationError, PolicyRefusal: the site has too few units for the privacy of
            the scenario.
    """
    if isinstance(scenario.privacy, NoPrivacy):
        raise ConfigError(
            "without differential privacy there is no claim to audit",
            field="privacy.mode",
            found="none",
            accepted="local or distributed",
        )
    # One thread: more of them on busy cores slow each other down.
    torch.set_num_threads(1)
    audited = _smallest_site(scenario)
    results = []
    for unit in get_args(Unit):
        records = site_records(audited.examples, audited.plan.task, unit)
        known = first_units(records, KNOWN_RECORDS)
        plan = _counting(audited.plan, unit)
        for claim in claims_of(plan, public_size(unit_count(records))):
            game: Callable[..., GameOutcome]
            if claim.vectors is None:
                noise = share_of(claim.noise, noise_share)
                game = partial(play, step_by_step(plan), noise=noise)
            else:
                played = _with_noise(plan, noise_share)
                game = partial(play_shared, played, vectors=claim.vectors)
            outcome = game(
                model=audited.model,
                records=known,
                canaries=canaries,
                seed=scenario.seed,
                entropy=entropy,
                physical_batch_size=scenario.compute.physical_batch_size,
                device=scenario.compute.devices[0],
                on_round=partial(on_round, unit, claim.against),
            )
            results.append(
                judge(
                    outcome,
                    plan,
                    claim.noise,
                    scenario=scenario.name,
                    site=audited.site,
                    records=known,
                    against=claim.against,
                )
            )
    return tuple(results)


def claims_of(plan: TrainingPlan, public_size: int) -> tuple[Claim, ...]:
    """What a plan with differential privacy promises at a site: one claim, or two totals.

    Raises:
        DataError, CalibrationError, PolicyRefusal: see `noise_for`.
    """
    own = noise_for(plan, public_size)
    if not isinstance(plan.privacy, DistributedPrivacy):
        return (Claim("everybody", own, None),)
    readers = Claim("readers", claimed_noise(plan), plan.privacy.honest)
    return readers, Claim("everybody", own, 1)


def play(
    plan: TrainingPlan,
    model: Path,
    records: AnyRecords,
    noise: SiteNoise,
    *,
    canaries: int,
    seed: int,
    entropy: Entropy,
    physical_batch_size: int,
    on_round: OnRound,
    device: str = "cpu",
) -> GameOutcome:
    """One game: makes canaries, flips coins, trains a `step_by_step` plan, and attacks it.

    Args:
        model: folder of the base model.
        records: records that the attack knows; canaries have the same kind of unit.
        noise: sampling rate and noise that the site really uses.
        canaries: number of units.
        seed: public seed of the canaries' texts; coins, batches and noise come from `entropy`.
    """
    adapted = load_public(model, plan, device, trains=True)
    limit = BatchLimit(physical_batch_size)
    made = make_canaries(records, plan, canaries, seed)
    included = flip_coins(canaries, entropy)

    def prepared(chosen: AnyRecords) -> PreparedData:
        return prepare(adapted, model, chosen, limit, cache=None)

    data = prepared(with_included(records, made, included))
    trainer = LocalTrainer(adapted, data, noise, entropy, limit)
    evidence = gather_evidence(trainer, prepared(records), prepared(made), on_round)
    return GameOutcome(included, evidence)


def play_shared(
    plan: TrainingPlan,
    model: Path,
    records: AnyRecords,
    *,
    vectors: int,
    canaries: int,
    seed: int,
    entropy: Entropy,
    physical_batch_size: int,
    on_round: OnRound,
    device: str = "cpu",
    of_the_mean: bool = False,
) -> GameOutcome:
    """One game on a plan of distributed mode: the attack reads the sums of its most attempts.

    Args:
        vectors: number of vectors in each sum whose noise the attack does not know: where the mode
            keeps its word, the plan's `honest` against readers of the sums, and 1 against
            everybody.
        canaries, seed, entropy, physical_batch_size: see `play`.
        of_the_mean: see `gather_shared_evidence`.
    """
    assert isinstance(plan.privacy, DistributedPrivacy)
    adapted = load_public(model, plan, device, trains=True)
    limit = BatchLimit(physical_batch_size)
    made = make_canaries(records, plan, canaries, seed)
    included = flip_coins(canaries, entropy)
    noise = claimed_noise(plan)

    def prepared(chosen: AnyRecords) -> PreparedData:
        return prepare(adapted, model, chosen, limit, cache=None)

    def site(chosen: AnyRecords) -> LocalTrainer:
        return LocalTrainer(adapted, prepared(chosen), noise, entropy, limit)

    victim = site(with_included(records, made, included))
    others = [site(records.only(()))] * (vectors - 1)
    evidence = gather_shared_evidence(
        victim,
        others,
        prepared(records),
        prepared(made),
        attempts=plan.privacy.most_attempts,
        of_the_mean=of_the_mean,
        on_round=on_round,
    )
    return GameOutcome(included, evidence)


def claimed_noise(plan: TrainingPlan) -> SiteNoise:
    """The sampling rate and noise of a plan of distributed mode, against readers of the sums."""
    assert isinstance(plan.privacy, DistributedPrivacy)
    multiplier = shares_of(plan).noise_multiplier(plan.privacy.honest)
    return SiteNoise(plan.privacy.sampling_rate, multiplier)


def _with_noise(plan: TrainingPlan, share: float) -> TrainingPlan:
    """A plan of distributed mode whose sites add a share of its noise, to a power of two."""
    assert isinstance(plan.privacy, DistributedPrivacy)
    bits = plan.privacy.noise_bits + round(math.log2(share))
    privacy = msgspec.structs.replace(plan.privacy, noise_bits=max(bits, FEWEST_NOISE_BITS))
    return msgspec.structs.replace(plan, privacy=privacy)


def share_of(noise: SiteNoise, share: float) -> SiteNoise:
    """The same sampling rate with a share of the noise."""
    assert noise.noise_multiplier is not None
    return SiteNoise(noise.sampling_rate, noise.noise_multiplier * share)


def judge(
    outcome: GameOutcome,
    plan: TrainingPlan,
    noise: SiteNoise,
    *,
    scenario: str,
    site: str,
    records: AnyRecords,
    against: Observer = "everybody",
    share_of_guesses: float = GUESSES,
) -> AuditResult:
    """Counts the right guesses on the canaries with the strongest evidence, and bounds epsilon.

    Args:
        noise: the claimed noise.
        records: records that the attack knew.
        against: whom the claim is against.
        share_of_guesses: of the canaries; fixed before the attack sees anything.
    """
    assert isinstance(plan.privacy, DifferentialPrivacy)
    steps = plan.training.steps
    if isinstance(plan.privacy, DistributedPrivacy):
        steps = plan.privacy.most_attempts
    assert noise.noise_multiplier is not None
    delta, canaries = plan.privacy.delta, len(outcome.included)
    guesses = max(1, round(share_of_guesses * canaries))
    strongest = np.argsort(-np.abs(outcome.evidence), kind="stable")[:guesses]
    right = (outcome.evidence[strongest] > 0) == outcome.included[strongest]
    correct = int(right.sum())
    event = DpEvent(noise.noise_multiplier, noise.sampling_rate, steps)
    return AuditResult(
        scenario=scenario,
        site=site,
        unit=records.unit_column or "record",
        records=len(records),
        units=unit_count(records),
        steps=steps,
        sampling_rate=noise.sampling_rate,
        noise_multiplier=noise.noise_multiplier,
        claimed_epsilon=epsilon([event], delta),
        delta=delta,
        canaries=canaries,
        included=int(outcome.included.sum()),
        guesses=guesses,
        correct=correct,
        confidence=CONFIDENCE,
        epsilon_lower_bound=epsilon_lower_bound(canaries, guesses, correct, delta, CONFIDENCE),
        largest_bound=epsilon_lower_bound(canaries, guesses, guesses, delta, CONFIDENCE),
        against=against,
    )


def check(results: Sequence[AuditResult]) -> None:
    """Fails if an attack did better than the claim allows.

    Raises:
        VerificationError: a lower bound is above the claimed epsilon.
    """
    for result in results:
        if result.epsilon_lower_bound > result.claimed_epsilon:
            shown, confidence = result.epsilon_lower_bound, result.confidence
            raise VerificationError(
                "an attack refutes the claimed privacy",
                field=f"epsilon per {result.unit}, against {result.against},"
                f" at delta {result.delta:g}",
                found=f"above {shown:.3f} with probability {confidence:g}",
                accepted=f"at most {result.claimed_epsilon:.3f}",
                remedy="release nothing that this version trained, and report it (SECURITY.md)",
            )


def as_table(results: Sequence[AuditResult]) -> Table:
    """The claim and the attack side by side, with a row for each unit of privacy; in distributed
    mode, with one for each of its two claims."""
    first = results[0]
    shared = any(result.against == "readers" for result in results)
    table = Table(
        title=f"audit of {first.scenario}, {first.site}: {first.steps}"
        f" {'attempts' if shared else 'steps'}, epsilon at delta {first.delta:g}",
        caption=f"attack: epsilon is above this, with {first.confidence:.0%} confidence; at most:"
        " what the attack would show if all guesses were right"
        + ("; readers: who sees the sums and not the noise of the honest sites" if shared else ""),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("per", no_wrap=True)
    table.add_column("against", no_wrap=True)
    for heading in ("claim", "attack", "right", "canaries", "at most"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.unit,
            result.against,
            f"{result.claimed_epsilon:.3f}",
            f"{result.epsilon_lower_bound:.3f}",
            f"{result.correct} of {result.guesses}",
            f"{result.canaries:,}",
            f"{result.largest_bound:.3f}",
        )
    return table


def _smallest_site(scenario: Scenario) -> Audited:
    model = model_folder(scenario.model)
    corpus = load_source(scenario)
    sites = partition(corpus.train, scenario.sites, scenario.seed)
    site = min(sites, key=lambda name: len(sites[name]))
    largest = max(len(examples) for examples in sites.values())
    # What is summed and released beside the steps is not audited.
    scenario = msgspec.structs.replace(scenario, evaluation=None, release_gate=None)
    plan = make_plan(scenario, corpus.labels, model, largest_site=largest)
    return Audited(site, sites[site], plan, model)


def _counting(plan: TrainingPlan, unit: Unit) -> TrainingPlan:
    """The plan with its expected batch size counted in units."""
    batch = max(1, plan.training.expected_batch_size // records_of_a_unit(unit))
    training = msgspec.structs.replace(plan.training, expected_batch_size=batch)
    return msgspec.structs.replace(plan, training=training)
