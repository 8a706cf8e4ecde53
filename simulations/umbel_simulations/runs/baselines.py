"""Trains adapters to compare with the federated one, at the same number of steps and epsilon.

`local-only`: each site alone. `pooled`: all records in one place, which nobody is allowed to have.
Both use the sites' own training loop. Neither is a federation, so no protocol runs.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import msgspec
import numpy as np

from umbel_client.data.records import columns_of, load_records
from umbel_client.data.tokens import Tokens
from umbel_client.data.units import Units
from umbel_client.models.site_model import load_public
from umbel_client.privacy.calibration import noise_alone, plan_alone
from umbel_client.site.config import ClientConfig
from umbel_client.tasks.frozen_cache import FrozenCache
from umbel_client.tasks.label_names import computed_start
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import Entropy
from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan
from umbel_simulations.reporting.recorder import Stopped

OnBaselineRound = Callable[[str, int, int], None]
"""Called after each round with (party, rounds done, rounds)."""

POOLED = "pooled"


@dataclass(frozen=True)
class Party:
    """Someone who trains alone."""

    name: str
    plan: TrainingPlan
    data: PreparedData
    public_size: int
    entropy: Entropy


def train_baselines(
    plan: TrainingPlan,
    model: Path,
    configs: Mapping[str, ClientConfig],
    *,
    names: Sequence[str],
    entropy: Callable[[str], Entropy],
    physical_batch_size: int,
    workers: int,
    on_round: OnBaselineRound,
    devices: Sequence[str],
) -> dict[str, Vector]:
    """Trains each of `names` (sites and `POOLED`) alone, and returns the adapters by name.

    Args:
        configs: each site's configuration, whose data, cache and device it uses.
        devices: over which those who train are dealt.
    """
    limit = BatchLimit(physical_batch_size)
    data = {site: _site_data(plan, model, config, limit) for site, config in configs.items()}
    parties = []
    for name in names:
        if name == POOLED:
            size = sum(config.data.public_size for config in configs.values())
            pooled = _pooled_plan(plan_alone(plan, size), len(data))
            parties.append(Party(name, pooled, _pool(data), size, entropy(name)))
        else:
            size = configs[name].data.public_size
            alone = plan_alone(plan, size)
            parties.append(Party(name, alone, data[name], size, entropy(f"{name} alone")))
    # The largest first, because it takes longest.
    parties.sort(key=lambda party: len(party.data), reverse=True)
    stop = threading.Event()
    with ThreadPoolExecutor(workers, thread_name_prefix="baseline") as pool:
        futures = {
            party.name: pool.submit(
                _train, party, model, physical_batch_size, on_round, stop, device
            )
            for party, device in zip(parties, cycle(devices), strict=False)
        }
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _train(
    party: Party,
    model: Path,
    physical_batch_size: int,
    on_round: OnBaselineRound,
    stop: threading.Event,
    device: str,
) -> Vector:
    plan = party.plan
    adapted = load_public(model, plan, device, trains=True)
    # The comparison is at one (epsilon, delta), also for the pooled records, where a site would
    # refuse this delta as too large for their number: nobody releases what is trained here.
    noise = noise_alone(plan, party.public_size)

    def on_step(step: int, steps: int) -> None:
        if stop.is_set():
            raise Stopped

    adapter = computed_start(adapted, model, plan)
    trainer = LocalTrainer(
        adapted, party.data, noise, party.entropy, BatchLimit(physical_batch_size)
    )
    for number, after, _ in trainer.rounds(adapter, on_step):
        adapter = after
        on_round(party.name, number, plan.training.rounds)
    return adapter


def _site_data(
    plan: TrainingPlan, model: Path, config: ClientConfig, limit: BatchLimit
) -> PreparedData:
    return prepare(
        load_public(model, plan, config.model.device),
        model,
        load_records(Path(config.data.path), plan.task, **columns_of(config.data)),
        limit,
        cache=config.state_folder.cache,
    )


def _pooled_plan(plan: TrainingPlan, sites: int) -> TrainingPlan:
    """The plan with as many records in a step as all sites have together. In distributed mode it
    has them already."""
    if isinstance(plan.privacy, DistributedPrivacy):
        return plan
    training = msgspec.structs.replace(
        plan.training, expected_batch_size=plan.training.expected_batch_size * sites
    )
    return msgspec.structs.replace(plan, training=training)


def _pool(sites: Mapping[str, PreparedData]) -> PreparedData:
    """The records of all sites as one data set, with what the sites have already computed."""
    parts = [sites[site] for site in sorted(sites)]
    prefixes = [part.prefix for part in parts if part.prefix is not None]
    lengths = np.concatenate([part.tokens.lengths for part in parts])
    firsts = np.cumsum([0, *(part.unit_count for part in parts)])[:-1]
    owners = [
        part.units.of_record + first
        for part, first in zip(parts, firsts, strict=True)
        if part.units is not None
    ]
    return PreparedData(
        tokens=Tokens(
            ids=np.concatenate([part.tokens.ids for part in parts]),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            pad_id=parts[0].tokens.pad_id,
        ),
        labels=np.concatenate([part.labels for part in parts]),
        prefix=FrozenCache(
            values=np.concatenate([prefix.values for prefix in prefixes]),
            pooled=prefixes[0].pooled,
        )
        if len(prefixes) == len(parts)
        else None,
        # A name may be that of two units at two sites.
        units=Units(np.concatenate(owners)) if owners else None,
        longest=parts[0].longest,
    )
