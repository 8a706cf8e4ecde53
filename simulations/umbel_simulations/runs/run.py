"""A scenario from its file to its report."""

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import torch

from umbel_client.privacy.calibration import noise_for
from umbel_common.adapters.vector import Vector, initial_vector, size_of
from umbel_common.errors import UmbelError
from umbel_common.plans.plan import CausalLm, LocalPrivacy, TrainingPlan
from umbel_common.protocol.transcript import VerifiedJob, verify_transcript
from umbel_simulations.backends.in_process import Federation, JobOutcome, public_size
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.inputs.partition import partition
from umbel_simulations.inputs.sources import Corpus, Example, load_source
from umbel_simulations.reporting import events
from umbel_simulations.reporting.live import score_of
from umbel_simulations.reporting.measures import ACCURACY, measure_of
from umbel_simulations.reporting.recorder import (
    Recorder,
    ServerObserver,
    SiteObserver,
    read_metrics,
)
from umbel_simulations.reporting.report import write_report
from umbel_simulations.reporting.results import (
    Answers,
    Comparison,
    CurvePoint,
    Difference,
    RunSummary,
    Score,
    SiteResult,
)
from umbel_simulations.runs.baselines import POOLED, train_baselines
from umbel_simulations.runs.judge import Judge
from umbel_simulations.runs.scores import difference, majority_score
from umbel_simulations.runs.verify import verify_run
from umbel_simulations.scenario.plan import make_plan
from umbel_simulations.scenario.run_folder import claim, read_signed, write
from umbel_simulations.scenario.scenario import HpoData, Scenario

VERSIONS_OF = ("umbel", "torch", "transformers", "peft", "opacus", "flwr", "cryptography")


def run_scenario(
    scenario: Scenario, folder: Path, show: Callable[[events.AnyEvent], None]
) -> RunSummary:
    """Runs a scenario, or what is left of it, in `folder`, and writes everything there.

    Raises:
        RunExists: the folder belongs to a finished run, or to another scenario.
        UmbelError: whatever made the run fail; the same call resumes it.
    """
    # One thread for each site: more of them on busy cores slow each other down.
    torch.set_num_threads(1)
    model = model_folder(scenario.model)
    corpus = load_source(scenario)
    sites = partition(corpus.train, scenario.sites, scenario.seed)
    largest = max(len(examples) for examples in sites.values())
    plan = make_plan(scenario, corpus.labels, model, largest_site=largest)
    check_sites(plan, sites)
    claim(folder, scenario)
    recorder = Recorder(folder / "metrics.jsonl", show)
    try:
        return Run(scenario, folder, recorder, model, corpus, sites, plan).complete()
    finally:
        recorder.close()


def check_sites(plan: TrainingPlan, sites: Mapping[str, Sequence[Example]]) -> None:
    """Finds out before anything is written what a site would refuse the plan for.

    Raises:
        DataError: a site has too few records.
        CalibrationError, PolicyRefusal: a site cannot have the plan's privacy.
    """
    for site, examples in sites.items():
        try:
            noise_for(plan, public_size(len(examples)))
        except UmbelError as error:
            error.field = f"{site}, {error.field}"
            raise


@dataclass
class Run:
    """One run and its steps, in their order in `complete`."""

    scenario: Scenario
    folder: Path
    recorder: Recorder
    model: Path
    corpus: Corpus
    sites: Mapping[str, Sequence[Example]]
    plan: TrainingPlan
    seconds: dict[str, float] = field(default_factory=dict)
    alone: dict[str, Vector] = field(default_factory=dict)
    """What was trained without a federation, by name."""

    def complete(self) -> RunSummary:
        """From the first key to the report."""
        self.recorder.emit(
            events.Started(
                seconds=self.recorder.seconds(),
                name=self.folder.name,
                sites={site: len(examples) for site, examples in self.sites.items()},
                rounds=self.plan.training.rounds,
                steps=self.plan.training.steps,
            )
        )
        with self._timed("preparation"):
            judge = Judge(
                self.plan,
                self.model,
                self.corpus.test,
                self.folder / "public",
                general=self.corpus.general,
            )
        federation = Federation(self.folder, self.scenario)
        with self._timed("federation"):
            outcome = self._federate(federation, self.plan, self.recorder, judge)
        with self._timed("comparisons"):
            self.alone = self._train_baselines(federation)
            comparisons = list(self._comparisons(judge, outcome))
            answers = self._answers(judge, outcome)
            differences = self._differences(judge, outcome)
        site = next(iter(self.sites))
        shutil.copytree(
            federation.site_folder(site) / "state" / "adapters" / self.plan.job,
            self.folder / "adapter",
            dirs_exist_ok=True,
        )
        summary = self._summary(outcome, comparisons, answers, differences, judge)
        write_report(summary, self.folder / "report.html")
        # Last: its presence says that the run is finished.
        write(
            self.folder / "summary.json",
            msgspec.json.format(msgspec.json.encode(summary), indent=2),
        )
        verify_run(self.folder)
        return summary

    def _federate(
        self, federation: Federation, plan: TrainingPlan, recorder: Recorder, judge: Judge
    ) -> JobOutcome:
        federation.set_up(self.sites, self.corpus.labels, self.model)
        stop = threading.Event()
        observers = {site: SiteObserver(site, recorder, stop) for site in self.sites}
        return federation.run(
            plan,
            observers,
            ServerObserver(recorder, observers, judge),
            workers=self._workers,
            dropouts=self.scenario.faults.dropouts,
            stop=stop,
        )

    def _answers(self, judge: Judge, outcome: JobOutcome) -> list[Answers]:
        """Some test questions, answered by each model that there is."""
        data = self.scenario.data
        if not isinstance(data, HpoData) or not data.answers:
            return []
        asked = self.corpus.test[: data.answers]
        questions = [example.text for example in asked]
        models = {"base": initial_vector(self.plan)}
        first = next(iter(self.sites))
        if first in self.alone:
            models[f"{first} alone"] = self.alone[first]
        models["federated"] = outcome.adapter
        if POOLED in self.alone:
            models[POOLED] = self.alone[POOLED]
        found = {name: judge.answer(adapter, questions) for name, adapter in models.items()}
        return [
            Answers(
                prompt=example.text,
                reference=example.answer,
                found={name: texts[index] for name, texts in found.items()},
            )
            for index, example in enumerate(asked)
        ]

    def _differences(self, judge: Judge, outcome: JobOutcome) -> dict[str, Difference]:
        """Each comparison of language models against the federated adapter."""
        if not isinstance(self.plan.task, CausalLm):
            return {}
        losses = {}
        if "base" in self.scenario.baselines:
            losses["base"] = judge.losses(initial_vector(self.plan))
        alone = [judge.losses(self.alone[site]) for site in self.sites if site in self.alone]
        if alone:
            losses["local-only"] = np.mean(alone, axis=0)
        if POOLED in self.alone:
            losses[POOLED] = judge.losses(self.alone[POOLED])
        federated = judge.losses(outcome.adapter)
        return {name: difference(found, federated) for name, found in losses.items()}

    def _comparisons(self, judge: Judge, outcome: JobOutcome) -> Iterator[Comparison]:
        wanted = self.scenario.baselines
        if "base" in wanted:
            yield Comparison(
                name="base",
                description="the model as it was, without an adapter",
                score=judge(initial_vector(self.plan)),
            )
        if "majority" in wanted:
            yield Comparison(
                name="majority",
                description="always the commonest label of the test set",
                score=majority_score(self.corpus),
            )
        if "head-only" in wanted:
            yield Comparison(
                name="head-only",
                description="federated, head only on the frozen model, no adapter",
                score=self._head_only(),
            )
        alone = {name: judge(adapter) for name, adapter in self.alone.items()}
        if "local-only" in wanted:
            parts = {site: alone[site] for site in self.sites}
            yield Comparison(
                name="local-only",
                description="mean over sites that each train alone",
                score=_mean(list(parts.values())),
                parts=parts,
            )
        yield Comparison(
            name="federated",
            description="the adapter of this run",
            score=judge(outcome.adapter),
        )
        if "pooled" in wanted:
            yield Comparison(
                name="pooled",
                description="all records in one place, without federation",
                score=alone[POOLED],
            )

    def _head_only(self) -> Score:
        """The same federation without an adapter: same protocol, same epsilon, its own ledgers."""
        folder = self.folder / "baselines" / "head-only"
        folder.mkdir(parents=True, exist_ok=True)
        largest = max(len(examples) for examples in self.sites.values())
        plan = make_plan(
            self.scenario, self.corpus.labels, self.model, largest_site=largest, head_only=True
        )
        rounds = plan.training.rounds

        def show(event: events.AnyEvent) -> None:
            if isinstance(event, events.RoundReleased):
                self._baseline_step("head-only", event.round, rounds)

        recorder = Recorder(folder / "metrics.jsonl", show)
        judge = Judge(plan, self.model, self.corpus.test, folder / "public")
        try:
            federation = Federation(folder, self.scenario)
            return judge(self._federate(federation, plan, recorder, judge).adapter)
        finally:
            recorder.close()

    def _train_baselines(self, federation: Federation) -> dict[str, Vector]:
        """Adapters of the sites, and of all records in one place, as far as they are wanted."""
        wanted = self.scenario.baselines
        names = [
            *(self.sites if "local-only" in wanted else ()),
            *([POOLED] if "pooled" in wanted else []),
        ]
        if not names:
            return {}
        return train_baselines(
            self.plan,
            self.model,
            {site: federation.site_config(site) for site in self.sites},
            names=names,
            entropy=federation.entropy,
            physical_batch_size=self.scenario.compute.physical_batch_size,
            workers=self._workers,
            on_round=self._baseline_step,
        )

    def _baseline_step(self, name: str, done: int, total: int) -> None:
        self.recorder.emit(
            events.BaselineStep(seconds=self.recorder.seconds(), name=name, done=done, total=total)
        )

    @property
    def _workers(self) -> int:
        return self.scenario.compute.workers or os.cpu_count() or 1

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = self.recorder.seconds()
        yield
        self.seconds[phase] = round(self.recorder.seconds() - began, 1)

    def _summary(
        self,
        outcome: JobOutcome,
        comparisons: list[Comparison],
        answers: list[Answers],
        differences: dict[str, Difference],
        judge: Judge,
    ) -> RunSummary:
        kept = read_metrics(self.folder / "metrics.jsonl")
        federation = Federation(self.folder, self.scenario)
        job = verify_transcript(read_signed(self.folder / "transcript.jsonl"), federation.roster())
        federated = next(row.score for row in comparisons if row.name == "federated")
        return RunSummary(
            name=self.folder.name,
            scenario=self.scenario.name,
            seed=self.scenario.seed,
            insecure_test_seed=self.scenario.insecure_test_seed,
            model=self.plan.model.name,
            data=self.corpus.name,
            test_records=len(self.corpus.test),
            method=self.plan.lora.method,
            privacy="local" if isinstance(self.plan.privacy, LocalPrivacy) else "none",
            rounds=self.plan.training.rounds,
            local_steps=self.plan.training.local_steps,
            trained_parameters=size_of(self.plan.trained_tensors(1)),
            standard_error=_standard_error(federated, len(self.corpus.test)),
            comparisons=comparisons,
            curve=self._curve(federation, job, kept, judge),
            sites=[self._site(site, outcome, kept) for site in sorted(self.sites)],
            aborted_attempts=job.aborted_attempts,
            adapter_digest=outcome.release.adapter.hex(),
            transcript_head=job.head.hex(),
            seconds={**self.seconds, "total": round(self.recorder.seconds(), 1)},
            versions={name: version(name) for name in VERSIONS_OF},
            answers=answers,
            differences=differences,
        )

    def _curve(
        self, federation: Federation, job: VerifiedJob, kept: list[events.AnyEvent], judge: Judge
    ) -> list[CurvePoint]:
        """A point for each release; one whose event was lost with a killed run is scored again."""
        known = {event.round: event for event in kept if isinstance(event, events.RoundReleased)}
        unspent = 0.0 if isinstance(self.plan.privacy, LocalPrivacy) else None
        points = []
        for release in job.releases:
            event = known.get(release.round)
            if event is not None:
                score = score_of(event)
                epsilon = event.epsilon
            else:
                score = judge(federation.registry().load(self.plan, release.adapter))
                epsilon = dict.fromkeys(self.sites, unspent if release.round == 0 else None)
            points.append(CurvePoint(round=release.round, score=score, epsilon=epsilon))
        return points

    def _site(self, site: str, outcome: JobOutcome, kept: list[events.AnyEvent]) -> SiteResult:
        answers = [e for e in kept if isinstance(e, events.SiteStage) and e.site == site]
        privacy = self.plan.privacy if isinstance(self.plan.privacy, LocalPrivacy) else None
        status = outcome.status[site]
        masked = sum(answer.masked_bytes for answer in answers)
        clear = sum(answer.clear_bytes for answer in answers)
        return SiteResult(
            name=site,
            records=len(self.sites[site]),
            labels=dict(Counter(example.label or example.group for example in self.sites[site])),
            epsilon=status.epsilon,
            delta=None if privacy is None else privacy.delta,
            noise_multiplier=status.noise.noise_multiplier,
            sampling_rate=status.noise.sampling_rate,
            sent_clear_bytes=clear,
            sent_masked_bytes=masked,
            sent_protocol_bytes=sum(answer.sent_bytes for answer in answers) - masked - clear,
            received_bytes=sum(answer.received_bytes for answer in answers),
        )


def _mean(scores: Sequence[Score]) -> Score:
    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Score(
        accuracy=mean([score.accuracy for score in scores]),
        macro_f1=mean([score.macro_f1 for score in scores]),
        perplexity=mean([score.perplexity for score in scores]),
        perplexity_error=mean([score.perplexity_error for score in scores]),
        general_perplexity=mean([score.general_perplexity for score in scores]),
    )


def _standard_error(score: Score, records: int) -> float:
    """In units of the score: a share, or a perplexity."""
    measure = measure_of(score)
    return measure.error(score, records) / (100 if measure is ACCURACY else 1)
