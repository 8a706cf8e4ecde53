"""`make modes`: what shared noise is worth, beside local mode and beside all records in one place.

The quickstart's texts, encoder and head, on cached features, with the product's own training: each
site's noisy sum or delta, the sum over sites, and the server's step. Masks cancel in a sum, so none
are made. Each seed divides the records anew, and draws batches and noise anew. A row that is in the
file already is not computed again, so an interrupted run continues. Writes a JSON file that is
committed beside docs/benchmarks.md.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from umbel_client.data.records import load_records
from umbel_client.data.tokens import Ints, Tokens
from umbel_client.evaluation.losses import predicted_labels
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.site_model import load_public
from umbel_client.planning.distributed import DraftDistributed
from umbel_client.privacy.calibration import SiteNoise, noise_for, plan_alone
from umbel_client.storage.deltas import OptimizerState
from umbel_client.tasks.frozen_cache import FrozenCache
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.fedsvd import next_adapter
from umbel_common.adapters.server_step import ServerState
from umbel_common.adapters.vector import Vector, initial_vector
from umbel_common.plans.plan import DistributedPrivacy, LocalPrivacy, TrainingPlan, second_version
from umbel_common.plans.server_optimizer import Average, Schedule, ServerSgd
from umbel_simulations.inputs.partition import partition, site_data
from umbel_simulations.inputs.sources import Example
from umbel_simulations.runs.setup import load_setup
from umbel_simulations.scenario.file import find_scenario
from umbel_simulations.scenario.plan import make_plan
from umbel_simulations.scenario.scenario import AggregationSettings, Scenario, Sites

DELTA = 1e-5
BATCH = 1_920
"""Mean number of records in a step, of all sites together."""
ROUNDS = 30
ROWS = 96
SEEDS = range(10)
SIZES = (300, 1_000, 3_000, 10_000)
"""Records of the sites of the second table; their labels differ by Dirichlet shares of 0.5."""
SIZE_SEEDS = range(3)
FACTORS = (1.0, 0.3, 0.1)
"""Learning rates of a site alone and of local mode, as shares of the usual one. The best is chosen
on the test records, which flatters both."""
LOCAL_BATCHES = (50, 200)
"""Mean records in a step of a site in local mode; the best is chosen likewise."""
STUDENT = 2.262
"""Quantile of Student's t distribution: an interval of 95 % over ten seeds."""


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    mode: str
    sites: int
    honest: int
    epsilon: float

    @property
    def name(self) -> str:
        """Its name in the file."""
        where = "one place" if self.mode == "pooled" else f"{self.sites} sites"
        shared = f", h = {self.honest}" if self.mode == "distributed" else ""
        return f"{self.mode}, {where}{shared}, epsilon {self.epsilon:g}"


SETTINGS = [
    Setting(mode, sites, honest, epsilon)
    for epsilon in (1.0, 3.0)
    for mode, sites, honest in (
        ("pooled", 4, 3),
        ("distributed", 4, 3),
        ("distributed", 10, 7),
        ("local, Adam", 4, 0),
        ("local, SGD", 4, 0),
        ("local, Adam", 10, 0),
        ("local, SGD", 10, 0),
    )
]


class Bench:
    """The texts' features, and what is trained on them."""

    def __init__(self) -> None:
        self._scenario = find_scenario("quickstart")
        setup = load_setup(self._scenario)
        self._corpus, self._folder = setup.corpus, setup.model
        self._model = load_public(self._folder, self.plan(SETTINGS[0]), "cpu", trains=True)
        self._train = self._features(self._corpus.train)
        self._test = self._features(self._corpus.test)
        self._place = {id(one): number for number, one in enumerate(self._corpus.train)}

    def accuracy(self, setting: Setting, seed: int) -> float:
        """Accuracy of the last adapter on the test records, in percent."""
        plan = self.plan(setting)
        if setting.mode == "pooled":
            sites = [self._train]
        else:
            dealt = partition(self._corpus.train, self._sites(setting.sites), seed)
            sites = [self._part(part) for part in dealt.values()]
        self._model.follow(plan)
        self._model.set_vector(trained(self._model, plan, sites))
        found = predicted_labels(self._model, self._test, BatchLimit(ROWS))
        return 100 * float((found == self._test.labels).mean())

    def by_size(self, epsilon: float, seed: int) -> dict[str, list[float]]:
        """For each mode, accuracies in percent on the test records, weighted to the labels of each
        site of `SIZES`."""
        sites = self._unequal(np.random.default_rng(seed))
        records, count = sum(SIZES), len(SIZES)
        batch = round(BATCH / len(self._train) * records)
        shared = self.plan(Setting("distributed", count, count - 1, epsilon), records, batch)
        local = []
        for size in LOCAL_BATCHES:
            plan = self.plan(Setting("local, SGD", count, 0, epsilon), records, size * count)
            local += [self._by_labels(_slower(plan, factor), sites, sites) for factor in FACTORS]
        alone = []
        for site in sites:
            plan = plan_alone(shared, len(site))
            tried = (self._by_labels(_slower(plan, factor), [site], [site]) for factor in FACTORS)
            alone.append(max(found[0] for found in tried))
        return {
            "alone": alone,
            "local mode": max(local, key=sum),
            "distributed mode": self._by_labels(shared, sites, sites),
        }

    def _by_labels(
        self, plan: TrainingPlan, sites: Sequence[PreparedData], asked: Sequence[PreparedData]
    ) -> list[float]:
        """What the sites train together, scored by the labels of each of `asked`."""
        self._model.follow(plan)
        self._model.set_vector(trained(self._model, plan, sites))
        labels = self._test.labels
        right = predicted_labels(self._model, self._test, BatchLimit(ROWS)) == labels
        there = np.bincount(labels, minlength=len(self._corpus.labels))
        found = []
        for site in asked:
            own = np.bincount(site.labels, minlength=len(self._corpus.labels))
            weights = (own / np.maximum(there, 1))[labels]
            found.append(round(100 * float((right * weights).sum() / weights.sum()), 2))
        return found

    def _unequal(self, generator: np.random.Generator) -> list[PreparedData]:
        """Sites of `SIZES` records; no record is at two of them."""
        labels = self._train.labels
        counts = np.bincount(labels)
        left, sites = np.arange(len(labels)), []
        for size in SIZES:
            shares = generator.dirichlet(np.full(len(counts), 0.5)) / counts
            weights = shares[labels[left]] + 1e-9
            chosen = generator.choice(left, size, replace=False, p=weights / weights.sum())
            sites.append(self._rows(chosen))
            left = np.setdiff1d(left, chosen)
        return sites

    def plan(
        self, setting: Setting, records: int | None = None, batch: int = BATCH
    ) -> TrainingPlan:
        """The plan of a setting, by the code that makes a scenario's.

        Args:
            records: of all sites together; None: every training record.
            batch: mean number of records in a step, of all sites together.
        """
        records = len(self._corpus.train) if records is None else records
        scenario = msgspec.structs.replace(self._scenario, sites=self._sites(setting.sites))
        shared = setting.mode in ("distributed", "pooled")
        scenario = (_shared if shared else _local)(scenario, setting, records, batch)
        plan = make_plan(
            scenario, self._corpus.labels, self._folder, largest_site=0, head_only=True
        )
        return plan_alone(plan, records) if setting.mode == "pooled" else plan

    def _sites(self, count: int) -> Sites:
        return msgspec.structs.replace(self._scenario.sites, count=count, minimum_records=300)

    def _features(self, examples: Sequence[Example]) -> PreparedData:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "records.jsonl"
            path.write_bytes(site_data(examples))
            records = load_records(path, self._model.plan.task)
            return prepare(self._model, self._folder, records, BatchLimit(ROWS), cache=None)

    def _part(self, examples: Sequence[Example]) -> PreparedData:
        return self._rows(np.array([self._place[id(one)] for one in examples]))

    def _rows(self, chosen: Ints) -> PreparedData:
        """The training records of these places."""
        whole = self._train
        assert whole.prefix is not None
        rows = [
            whole.tokens.ids[whole.tokens.starts[n] : whole.tokens.starts[n + 1]] for n in chosen
        ]
        starts = np.cumsum([0, *map(len, rows)])
        return PreparedData(
            Tokens(np.concatenate(rows), starts.astype(np.int64), whole.tokens.pad_id),
            whole.labels[chosen],
            FrozenCache(whole.prefix.values[chosen], whole.prefix.pooled),
            longest=whole.longest,
        )


def _shared(scenario: Scenario, setting: Setting, records: int, batch: int) -> Scenario:
    """Distributed mode; the rate and the rounds as docs/operator.md advises."""
    rate = (300 if setting.epsilon >= 3 else 100) / ROUNDS
    training = msgspec.structs.replace(
        scenario.training,
        rounds=ROUNDS,
        local_steps=1,
        expected_batch_size=batch,
        optimizer="none",
        final_learning_rate=1.0,
    )
    return msgspec.structs.replace(
        scenario,
        training=training,
        server=ServerSgd(adapter_learning_rate=rate, momentum=0.9, schedule=Schedule(final=0.1)),
        privacy=DraftDistributed(
            epsilon=setting.epsilon,
            delta=DELTA,
            clip_norm=1.0,
            sampling_rate=batch / records,
            honest=setting.honest,
            least_survivors=setting.honest + 1,
            spare_attempts=0,
        ),
        aggregation=AggregationSettings(threshold=setting.sites // 2 + 1),
    )


def _local(scenario: Scenario, setting: Setting, _records: int, batch: int) -> Scenario:
    """Local mode as the quickstart is shipped, or with gradient descent."""
    changes: dict[str, Any] = {"expected_batch_size": batch // setting.sites}
    if setting.mode == "local, SGD":
        changes |= {"optimizer": "sgd", "momentum": 0.9, "head_learning_rate": 3.3}
    return msgspec.structs.replace(
        scenario,
        training=msgspec.structs.replace(scenario.training, **changes),
        privacy=LocalPrivacy(epsilon=setting.epsilon, delta=DELTA, clip_norm=1.0),
        aggregation=AggregationSettings(threshold=setting.sites // 2 + 1, clip_range=10.0),
        server=Average(),
    )


def _slower(plan: TrainingPlan, factor: float) -> TrainingPlan:
    """The plan with a share of its learning rate, the server's or that of the head at a site."""
    server = plan.server
    if isinstance(server, ServerSgd):
        rate = factor * server.adapter_learning_rate
        return second_version(
            plan, server=msgspec.structs.replace(server, adapter_learning_rate=rate)
        )
    optimizer = plan.training.site_optimizer
    rate = factor * (optimizer.head_learning_rate or optimizer.adapter_learning_rate)
    optimizer = msgspec.structs.replace(optimizer, head_learning_rate=rate)
    training = msgspec.structs.replace(plan.training, optimizer=optimizer)
    return msgspec.structs.replace(plan, training=training)


def trained(model: AdaptedModel, plan: TrainingPlan, sites: Sequence[PreparedData]) -> Vector:
    """The adapter after all rounds: what the sites send, summed, and the server's steps."""
    adapter, state = initial_vector(plan), ServerState()
    privacy, aggregation = plan.privacy, plan.aggregation
    shared = isinstance(privacy, DistributedPrivacy)
    trainers = []
    for data in sites:
        noise = SiteNoise(1.0, 1.0) if shared else noise_for(plan, len(data))
        trainers.append(LocalTrainer(model, data, noise, os.urandom, BatchLimit(ROWS)))
    moments: list[OptimizerState | None] = [None] * len(sites)
    for number in range(1, plan.training.rounds + 1):
        total: Any = 0
        for place, trainer in enumerate(trainers):
            if shared:
                total = total + trainer.noisy_sum(number, adapter)
                continue
            result = trainer.round(number, adapter, moments[place])
            moments[place] = result.state
            limit = aggregation.clip_range
            clipped = np.clip(result.delta.astype(np.float64), -limit, limit)
            total = total + np.rint(clipped / aggregation.step).astype(np.int64)
        next_adapter(plan, number, total, len(sites), adapter, state)
    return adapter


def main(path: Path) -> None:
    """Computes the rows that `path` lacks, and writes it after each."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    by_size: dict[str, dict[str, list[float]]] = {}
    if path.exists():
        former = json.loads(path.read_text())
        found = former["accuracy_percent_by_seed"]
        by_size = former.get("accuracy_percent_by_size", {})
    bench = Bench()
    for seed in SEEDS:
        for setting in SETTINGS:
            done = found.setdefault(setting.name, [])
            if len(done) <= seed:
                done.append(round(bench.accuracy(setting, seed), 2))
                print(seed, setting.name, done[-1], flush=True)
                path.write_text(json.dumps(report(found, by_size), indent=2) + "\n")
    for seed in SIZE_SEEDS:
        for epsilon in (1.0, 8.0):
            name = f"epsilon {epsilon:g}, seed {seed}"
            if name not in by_size:
                by_size[name] = bench.by_size(epsilon, seed)
                print(name, by_size[name], flush=True)
                path.write_text(json.dumps(report(found, by_size), indent=2) + "\n")


def report(
    found: dict[str, list[float]], by_size: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    """What is committed: each accuracy, and means with intervals of 95 %."""
    means = {
        name: {
            "mean": round(statistics.mean(values), 2),
            "interval": round(STUDENT * statistics.stdev(values) / len(values) ** 0.5, 2)
            if len(values) == len(SEEDS)
            else None,
            "seeds": len(values),
        }
        for name, values in found.items()
        if values
    }
    return {
        "command": "make modes",
        "machine": platform.processor() or platform.machine(),
        "accuracy_percent": means,
        "accuracy_percent_by_seed": found,
        "sizes": SIZES,
        "accuracy_percent_by_size": by_size,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
