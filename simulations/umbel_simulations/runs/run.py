"""Runs a scenario, from its records to its report."""

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from umbel_client.data.conversations import Turn
from umbel_common.adapters.vector import Vector, initial_vector
from umbel_common.plans.plan import CausalLm, TrainingPlan
from umbel_server.jobs.evaluator import ProcessEvaluator
from umbel_server.operator.config import EvaluationConfig
from umbel_simulations.backends.in_process import Federation, JobOutcome
from umbel_simulations.inputs.partition import site_data
from umbel_simulations.reporting import events
from umbel_simulations.reporting.recorder import OnEvent, Recorder, ServerObserver, SiteObserver
from umbel_simulations.reporting.report import write_report
from umbel_simulations.reporting.results import Answers, Comparison, Difference, RunSummary, Score
from umbel_simulations.runs.baselines import POOLED, train_baselines
from umbel_simulations.runs.judge import Judge
from umbel_simulations.runs.scores import difference, majority_score
from umbel_simulations.runs.setup import RunSetup, load_setup
from umbel_simulations.runs.summary import Findings, summarise
from umbel_simulations.runs.verify import verify_run
from umbel_simulations.scenario.plan import make_plan, with_start
from umbel_simulations.scenario.run_folder import begun_plan, claim, write
from umbel_simulations.scenario.scenario import Icd10Data, Scenario


def run_scenario(scenario: Scenario, folder: Path, on_event: OnEvent) -> RunSummary:
    """Runs a scenario in `folder`, or resumes it, and writes all files there.

    Raises:
        RunExists: the folder belongs to a finished run, or to another scenario.
        UmbelError: the reason why the run failed; the same call resumes it.
    """
    # One thread for each site: on busy cores, more threads slow each other down.
    torch.set_num_threads(1)
    setup = load_setup(scenario)
    claim(folder, scenario)
    setup = replace(setup, plan=begun_plan(folder, setup.plan))
    recorder = Recorder(folder / "metrics.jsonl", on_event)
    try:
        return Run(setup, folder, recorder).complete()
    finally:
        recorder.close()


@dataclass
class Run:
    """One run. `complete` has its steps in order."""

    setup: RunSetup
    folder: Path
    recorder: Recorder
    seconds: dict[str, float] = field(default_factory=dict)
    alone: dict[str, Vector] = field(default_factory=dict)
    """Adapters that were trained without a federation, by name."""

    def complete(self) -> RunSummary:
        """Takes the run from the first key to the report."""
        self.recorder.emit(
            events.Started(
                seconds=self.recorder.seconds(),
                name=self.folder.name,
                sites={site: len(examples) for site, examples in self.setup.sites.items()},
                rounds=self.setup.plan.training.rounds,
                steps=self.setup.plan.training.steps,
            )
        )
        with self._timed("preparation"):
            judge = Judge(
                self.setup.plan,
                self.setup.model,
                self.setup.corpus.test,
                self.folder / "public",
                general=self.setup.corpus.general,
                device=self.setup.scenario.compute.devices[0],
            )
        federation = Federation(self.folder, self.setup.scenario)
        with self._timed("federation"):
            outcome = self._federate(
                federation, self.setup.plan, self.setup.start, self.recorder, judge
            )
        with self._timed("comparisons"):
            self.alone = self._train_baselines(federation)
            findings = Findings(
                comparisons=list(self._comparisons(judge, outcome)),
                answers=self._answers(judge, outcome),
                differences=self._differences(judge, outcome),
            )
        site = next(iter(self.setup.sites))
        shutil.copytree(
            federation.site_folder(site) / "state" / "adapters" / self.setup.plan.job,
            self.folder / "adapter",
            dirs_exist_ok=True,
        )
        seconds = {**self.seconds, "total": round(self.recorder.seconds(), 1)}
        summary = summarise(self.setup, self.folder, outcome, findings, judge, seconds)
        write_report(summary, self.folder / "report.html")
        # Last, because a run with a summary counts as finished.
        write(
            self.folder / "summary.json",
            msgspec.json.format(msgspec.json.encode(summary), indent=2),
        )
        verify_run(self.folder)
        return summary

    def _federate(
        self,
        federation: Federation,
        plan: TrainingPlan,
        start: Vector | None,
        recorder: Recorder,
        judge: Judge,
    ) -> JobOutcome:
        """Runs a plan's job among the sites.

        Args:
            start: the tensor that the plan names as its start, if it names one.
            judge: its folder has the public records that a release gate asks.
        """
        federation.set_up(self.setup.sites, self.setup.corpus.labels, self.setup.model)
        stop = threading.Event()
        observers = {site: SiteObserver(site, recorder, stop) for site in self.setup.sites}
        return federation.run(
            plan,
            observers,
            ServerObserver(recorder, observers, judge),
            workers=self._workers,
            dropouts=self.setup.scenario.faults.dropouts,
            stop=stop,
            evaluator=None if plan.release_gate is None else self._evaluator(judge),
            start=start,
        )

    def _evaluator(self, judge: Judge) -> ProcessEvaluator:
        """What asks a release gate, as an operator's server has it."""
        config = EvaluationConfig(
            holdout=str(judge.records.absolute()),
            model=str(self.setup.model),
            answers=0,
            device=self.setup.scenario.compute.devices[0],
        )
        return ProcessEvaluator(config, judge.records.parent.absolute() / "scratch")

    def _answers(self, judge: Judge, outcome: JobOutcome) -> list[Answers]:
        """Some test questions, with the answer of each model."""
        data = self.setup.scenario.data
        if isinstance(data, Icd10Data) or not data.answers:
            return []
        asked = [example for example in self.setup.corpus.test if example.answer][: data.answers]
        if not asked:
            return []
        questions = [example.turns[:-1] or (Turn("user", example.text),) for example in asked]
        models = {"base": initial_vector(self.setup.plan)}
        first = next(iter(self.setup.sites))
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
        if not isinstance(self.setup.plan.task, CausalLm):
            return {}
        losses = {}
        if "base" in self.setup.scenario.baselines:
            losses["base"] = judge.losses(initial_vector(self.setup.plan))
        alone = [judge.losses(self.alone[site]) for site in self.setup.sites if site in self.alone]
        if alone:
            losses["local-only"] = np.mean(alone, axis=0)
        if POOLED in self.alone:
            losses[POOLED] = judge.losses(self.alone[POOLED])
        federated = judge.losses(outcome.adapter)
        return {name: difference(found, federated) for name, found in losses.items()}

    def _comparisons(self, judge: Judge, outcome: JobOutcome) -> Iterator[Comparison]:
        wanted = self.setup.scenario.baselines
        if "base" in wanted:
            yield Comparison(
                name="base",
                description="the base model without an adapter",
                score=judge(initial_vector(self.setup.plan)),
            )
        if "majority" in wanted:
            yield Comparison(
                name="majority",
                description="always the test set's commonest label",
                score=majority_score(self.setup.corpus),
            )
        if "head-only" in wanted:
            yield Comparison(
                name="head-only",
                description="federated, only the head is trained",
                score=self._head_only(),
            )
        alone = {name: judge(adapter) for name, adapter in self.alone.items()}
        if "local-only" in wanted:
            parts = {site: alone[site] for site in self.setup.sites}
            yield Comparison(
                name="local-only",
                description="each site trains alone (mean)",
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
                description="all records in one place",
                score=alone[POOLED],
            )

    def _head_only(self) -> Score:
        """Scores the same federation without an adapter: same protocol and epsilon, own ledgers."""
        folder = self.folder / "baselines" / "head-only"
        folder.mkdir(parents=True, exist_ok=True)
        largest = max(len(examples) for examples in self.setup.sites.values())
        plan = make_plan(
            self.setup.scenario,
            self.setup.corpus.labels,
            self.setup.model,
            largest_site=largest,
            holdout=site_data(self.setup.corpus.test),
            head_only=True,
        )
        plan, start = with_start(
            plan, self.setup.scenario, self.setup.corpus.titles, self.setup.model
        )
        plan = begun_plan(folder, plan)
        rounds = plan.training.rounds

        def on_event(event: events.AnyEvent) -> None:
            if isinstance(event, events.RoundReleased):
                self._baseline_step("head-only", event.round, rounds)

        recorder = Recorder(folder / "metrics.jsonl", on_event)
        judge = Judge(
            plan,
            self.setup.model,
            self.setup.corpus.test,
            folder / "public",
            device=self.setup.scenario.compute.devices[0],
        )
        try:
            federation = Federation(folder, self.setup.scenario)
            return judge(self._federate(federation, plan, start, recorder, judge).adapter)
        finally:
            recorder.close()

    def _train_baselines(self, federation: Federation) -> dict[str, Vector]:
        """Trains the wanted adapters: each site alone, and all records in one place."""
        wanted = self.setup.scenario.baselines
        names = [
            *(self.setup.sites if "local-only" in wanted else ()),
            *([POOLED] if "pooled" in wanted else []),
        ]
        if not names:
            return {}
        return train_baselines(
            self.setup.plan,
            self.setup.model,
            {site: federation.site_config(site) for site in self.setup.sites},
            names=names,
            entropy=federation.entropy,
            physical_batch_size=self.setup.scenario.compute.physical_batch_size,
            workers=self._workers,
            on_round=self._baseline_step,
            devices=self.setup.scenario.compute.devices,
        )

    def _baseline_step(self, name: str, done: int, total: int) -> None:
        self.recorder.emit(
            events.BaselineStep(seconds=self.recorder.seconds(), name=name, done=done, total=total)
        )

    @property
    def _workers(self) -> int:
        return self.setup.scenario.compute.workers or os.cpu_count() or 1

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = self.recorder.seconds()
        yield
        self.seconds[phase] = round(self.recorder.seconds() - began, 1)


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
