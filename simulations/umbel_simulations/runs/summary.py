"""The summary of a finished run, put together from its outcome, its events and its transcript."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from umbel_common.adapters.vector import size_of
from umbel_common.plans.plan import DifferentialPrivacy
from umbel_common.protocol.verification import VerifiedJob, verify_transcript
from umbel_simulations.backends.in_process import Federation, JobOutcome
from umbel_simulations.inputs.partition import unit_count
from umbel_simulations.reporting import events
from umbel_simulations.reporting.measures import ACCURACY, measure_of
from umbel_simulations.reporting.recorder import read_metrics
from umbel_simulations.reporting.results import (
    Answers,
    Comparison,
    CurvePoint,
    Difference,
    RunSummary,
    Score,
    SiteResult,
)
from umbel_simulations.runs.judge import Judge
from umbel_simulations.runs.setup import RunSetup
from umbel_simulations.scenario.run_folder import read_signed

VERSIONS_OF = ("umbel", "torch", "transformers", "peft", "opacus", "flwr", "cryptography")


@dataclass(frozen=True)
class Findings:
    """What the comparisons of a run found."""

    comparisons: list[Comparison]
    answers: list[Answers]
    differences: dict[str, Difference]


def summarise(
    setup: RunSetup,
    folder: Path,
    outcome: JobOutcome,
    findings: Findings,
    judge: Judge,
    seconds: dict[str, float],
) -> RunSummary:
    """The summary of the run in `folder`.

    Args:
        seconds: wall time of each phase.
    """
    scenario, plan, corpus = setup.scenario, setup.plan, setup.corpus
    kept = read_metrics(folder / "metrics.jsonl")
    federation = Federation(folder, scenario)
    job = verify_transcript(
        read_signed(folder / "transcript.jsonl"), federation.roster(), start=setup.start
    )
    federated = next(row.score for row in findings.comparisons if row.name == "federated")
    return RunSummary(
        name=folder.name,
        scenario=scenario.name,
        seed=scenario.seed,
        insecure_test_seed=scenario.insecure_test_seed,
        model=plan.model.name,
        data=corpus.name,
        test_records=len(corpus.test),
        method=plan.lora.method,
        privacy=str(plan.privacy.__struct_config__.tag),
        rounds=plan.training.rounds,
        local_steps=plan.training.local_steps,
        trained_parameters=size_of(plan.trained_tensors(1)),
        standard_error=_standard_error(federated, len(corpus.test)),
        comparisons=findings.comparisons,
        curve=_curve(setup, federation, job, kept, judge),
        sites=[_site_result(setup, site, outcome, kept) for site in sorted(setup.sites)],
        aborted_attempts=job.aborted_attempts,
        adapter_digest=outcome.release.adapter.hex(),
        transcript_head=job.head.hex(),
        seconds=seconds,
        versions={name: version(name) for name in VERSIONS_OF},
        answers=findings.answers,
        differences=findings.differences,
        counted=[
            f"round {number}: {text}"
            for number, text in {
                event.round: event.text for event in kept if isinstance(event, events.SitesCounted)
            }.items()
        ],
        held_back=list(job.held_back),
    )


def _curve(
    setup: RunSetup,
    federation: Federation,
    job: VerifiedJob,
    kept: Sequence[events.AnyEvent],
    judge: Judge,
) -> list[CurvePoint]:
    """A point for each release.

    A release whose event was lost, because the run was killed, is scored again.
    """
    known = {event.round: event for event in kept if isinstance(event, events.RoundReleased)}
    unspent = 0.0 if isinstance(setup.plan.privacy, DifferentialPrivacy) else None
    points = []
    for release in job.releases:
        event = known.get(release.round)
        if event is not None:
            score, epsilon = event.score, event.epsilon
        else:
            score = judge(federation.registry().load(setup.plan, release.adapter))
            epsilon = dict.fromkeys(setup.sites, unspent if release.round == 0 else None)
        points.append(CurvePoint(round=release.round, score=score, epsilon=epsilon))
    return points


def _site_result(
    setup: RunSetup, site: str, outcome: JobOutcome, kept: Sequence[events.AnyEvent]
) -> SiteResult:
    answers = [e for e in kept if isinstance(e, events.SiteStage) and e.site == site]
    privacy = setup.plan.privacy if isinstance(setup.plan.privacy, DifferentialPrivacy) else None
    status = outcome.status[site]
    examples = setup.sites[site]
    masked = sum(answer.masked_bytes for answer in answers)
    clear = sum(answer.clear_bytes for answer in answers)
    return SiteResult(
        name=site,
        records=len(examples),
        labels=dict(Counter(example.label or example.group for example in examples)),
        epsilon=status.epsilon,
        delta=None if privacy is None else privacy.delta,
        noise_multiplier=status.noise.noise_multiplier,
        sampling_rate=status.noise.sampling_rate,
        sent_clear_bytes=clear,
        sent_masked_bytes=masked,
        sent_protocol_bytes=sum(answer.sent_bytes for answer in answers) - masked - clear,
        received_bytes=sum(answer.received_bytes for answer in answers),
        units=unit_count(examples) if any(example.unit for example in examples) else None,
        shared_epsilon=None if status.shared is None else status.shared.epsilon,
    )


def _standard_error(score: Score, records: int) -> float:
    """In units of the score: a share, or a perplexity."""
    measure = measure_of(score)
    return measure.error(score, records) / (100 if measure is ACCURACY else 1)
