"""`umbel-simulate audit`: an attack's lower bound on epsilon beside the accountant's claim.

One training run of one of a scenario's sites, with canaries in its data (Steinke et al. 2023). The
bound can refute the claim and never prove it: it grows with the number of canaries, and stays far
below epsilon even where the claim is tight.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from umbel_client.accounting import Event, epsilon
from umbel_client.data import Records, load_records
from umbel_client.model import AdaptedModel
from umbel_client.precision import fastest_precision
from umbel_client.prepared import PreparedData, prepare
from umbel_client.site_job import SiteNoise, noise_for
from umbel_common.canonical import Entropy, Value
from umbel_common.errors import ConfigError, VerificationError
from umbel_common.plan import LocalPrivacy, TrainingPlan
from umbel_simulations.audit_bound import epsilon_lower_bound
from umbel_simulations.audit_game import (
    Outcome,
    Progress,
    flip_coins,
    gather_evidence,
    make_canaries,
    step_by_step,
    with_included,
)
from umbel_simulations.federation import public_size
from umbel_simulations.planning import make_plan
from umbel_simulations.population import partition, write_site_data
from umbel_simulations.scenario import Scenario, model_folder
from umbel_simulations.sources import Example, load_source

CONFIDENCE = 0.95
KNOWN_RECORDS = 500
"""Of the site, beside the canaries: the claim holds for every data set, so the auditor takes one in
which little hides a canary."""
GUESSES = 0.1
"""Share of the canaries that the attack guesses, fixed before it sees anything."""


class AuditResult(Value, frozen=True):
    """A claim, and what an attack could show against it."""

    scenario: str
    site: str
    unit: str
    """`record`, or the column that says whose record is whose."""
    records: int
    """Beside the canaries."""
    steps: int
    sampling_rate: float
    noise_multiplier: float
    claimed_epsilon: float
    """The accountant's upper bound at `delta`."""
    delta: float
    canaries: int
    included: int
    guesses: int
    correct: int
    confidence: float
    epsilon_lower_bound: float
    """True epsilon is above this with probability `confidence`."""
    largest_bound: float
    """What the lower bound would be if every guess were right: this audit can show no more."""


def audit_scenario(
    scenario: Scenario, canaries: int, entropy: Entropy, progress: Progress
) -> AuditResult:
    """Audits the smallest site of a scenario.

    Args:
        entropy: of coins, batches and noise.

    Raises:
        ConfigError: the scenario claims no privacy.
    """
    if not isinstance(scenario.privacy, LocalPrivacy):
        raise ConfigError(
            "without differential privacy there is no claim to audit",
            field="privacy.mode",
            found="none",
            accepted="local",
        )
    # One thread: more of them on busy cores slow each other down.
    torch.set_num_threads(1)
    model = model_folder(scenario.model)
    corpus = load_source(scenario)
    sites = partition(corpus.train, scenario.sites, scenario.seed)
    site = min(sites, key=lambda name: len(sites[name]))
    largest = max(len(examples) for examples in sites.values())
    plan = make_plan(scenario, corpus.labels, model, largest_site=largest)
    records = _records(sites[site][:KNOWN_RECORDS], plan)
    noise = noise_for(plan, public_size(len(sites[site])))
    outcome = play(
        step_by_step(plan),
        model,
        records,
        noise,
        canaries=canaries,
        seed=scenario.seed,
        entropy=entropy,
        physical_batch_size=scenario.compute.physical_batch_size,
        progress=progress,
    )
    return judge(outcome, plan, noise, scenario=scenario.name, site=site, records=records)


def play(
    plan: TrainingPlan,
    model: Path,
    records: Records,
    noise: SiteNoise,
    *,
    canaries: int,
    seed: int,
    entropy: Entropy,
    physical_batch_size: int,
    progress: Progress,
) -> Outcome:
    """One game: makes canaries, flips coins, trains a `step_by_step` plan, and attacks it.

    Args:
        model: folder of the base model.
        seed: public, of the canaries' texts; coins, batches and noise come from `entropy`.
    """
    adapted = AdaptedModel.load(model, plan, precision=fastest_precision())
    made = make_canaries(records, plan, canaries, seed)
    included = flip_coins(canaries, entropy)

    def prepared(chosen: Records) -> PreparedData:
        return prepare(adapted, model, chosen, cache=None, progress=lambda done, total: None)

    evidence = gather_evidence(
        adapted,
        plan,
        prepared(with_included(records, made, included)),
        prepared(records),
        prepared(made),
        noise,
        entropy=entropy,
        physical_batch_size=physical_batch_size,
        progress=progress,
    )
    return Outcome(included, evidence)


def judge(
    outcome: Outcome,
    plan: TrainingPlan,
    noise: SiteNoise,
    *,
    scenario: str,
    site: str,
    records: Records,
) -> AuditResult:
    """Counts right guesses, on the canaries with the strongest evidence, and bounds epsilon."""
    assert isinstance(plan.privacy, LocalPrivacy)
    assert noise.noise_multiplier is not None
    delta, canaries = plan.privacy.delta, len(outcome.included)
    guesses = max(1, round(GUESSES * canaries))
    strongest = np.argsort(-np.abs(outcome.evidence), kind="stable")[:guesses]
    right = (outcome.evidence[strongest] > 0) == outcome.included[strongest]
    correct = int(right.sum())
    event = Event(noise.noise_multiplier, noise.sampling_rate, plan.training.steps)
    return AuditResult(
        scenario=scenario,
        site=site,
        unit=records.unit_column or "record",
        records=len(records),
        steps=plan.training.steps,
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
    )


def check(result: AuditResult) -> None:
    """Raises:
    VerificationError: the attack did better than the claim allows.
    """
    if result.epsilon_lower_bound > result.claimed_epsilon:
        raise VerificationError(
            "an attack refutes the privacy that is claimed",
            field=f"epsilon per {result.unit} at delta {result.delta:g}",
            found=f"above {result.epsilon_lower_bound:.3f} with probability {result.confidence:g}",
            accepted=f"at most {result.claimed_epsilon:.3f}",
            remedy="release nothing trained by this version; report it",
        )


def as_text(result: AuditResult) -> str:
    """For people."""
    return "\n".join(
        (
            f"audit of {result.scenario}, {result.site}: {result.records} records,"
            f" {result.steps} steps, privacy per {result.unit}",
            f"  claim        epsilon {result.claimed_epsilon:.3f} at delta {result.delta:g}",
            f"  attack       epsilon above {result.epsilon_lower_bound:.3f},"
            f" {result.confidence:.0%} confidence: {result.correct} of {result.guesses} guesses"
            f" right, {result.canaries} canaries",
            f"  at the most  {result.largest_bound:.3f}, had every guess been right",
        )
    )


def _records(examples: Sequence[Example], plan: TrainingPlan) -> Records:
    """As the site itself would read them."""
    with TemporaryDirectory(prefix="umbel-audit-") as folder:
        write_site_data(Path(folder), examples)
        return load_records(Path(folder) / "data.jsonl", plan.task)
