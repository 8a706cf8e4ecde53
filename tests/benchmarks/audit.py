"""`make audit`: attacks on the quickstart, so that nobody has to believe epsilon alone.

Several audits with fresh coins and noise, per record and per patient; the same at a claim small
enough to be refuted, with its noise and with next to none; the same with sites that share their
noise; and the span check with and without differential privacy. Minutes; writes a small JSON file
that is committed beside docs/benchmarks.md.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from umbel_client.data.records import Record, Records
from umbel_client.planning.distributed import DraftDistributed
from umbel_common.plans.server_optimizer import ServerSgd
from umbel_simulations.audit.inversion import exposed, invert
from umbel_simulations.audit.one_run import audit_scenario
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.inputs.sources import load_source
from umbel_simulations.scenario.file import find_scenario
from umbel_simulations.scenario.plan import make_plan
from umbel_simulations.scenario.scenario import Scenario

SCENARIO = "quickstart"
CANARIES = 1000
AUDITS = 3
CONTROL_EPSILON = 1.0
"""A claim that so many canaries can refute, unlike the quickstart's own."""
NOISE_SHARES = (1.0, 1e-4)
"""Of the claimed noise, what the control adds: all, and next to none; training refuses none."""
BATCHES = ((8, 1), (64, 4), (128, 8))
"""(rank, records): the inputs of so many records stay below the rank."""


def audit() -> dict[str, Any]:
    """The results of one `umbel-simulate audit`, a row for each unit, and its seconds."""
    script = Path(sys.executable).with_name("umbel-simulate")
    command = [script, "audit", SCENARIO, "--canaries", str(CANARIES), "--json"]
    began = time.monotonic()
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"seconds": round(time.monotonic() - began), "rows": json.loads(finished.stdout)}


def control(noise_share: float) -> dict[str, Any]:
    """The same audit of a smaller claim, with a share of the noise that it needs."""
    scenario = find_scenario(SCENARIO)
    privacy = msgspec.structs.replace(scenario.privacy, epsilon=CONTROL_EPSILON)
    return timed(msgspec.structs.replace(scenario, privacy=privacy), noise_share)


def timed(scenario: Scenario, noise_share: float) -> dict[str, Any]:
    """An audit with a share of the noise that the scenario claims, and its seconds."""
    began = time.monotonic()
    rows = audit_scenario(scenario, CANARIES, os.urandom, lambda *_: None, noise_share=noise_share)
    seconds = round(time.monotonic() - began)
    return {"noise_share": noise_share, "seconds": seconds, "rows": msgspec.to_builtins(rows)}


def sharing(epsilon: float) -> Scenario:
    """The quickstart with sites that share their noise: of four, one may drop out and one collude.

    A batch has the quickstart's share of all records. Ten rounds: an attempt is as slow as a step
    of the quickstart, and each audit reads the sums of all attempts four times.
    """
    scenario = find_scenario(SCENARIO)
    replace = msgspec.structs.replace
    privacy = DraftDistributed(
        epsilon=epsilon,
        delta=scenario.privacy.delta,
        clip_norm=1.0,
        sampling_rate=0.0927,
        honest=2,
        least_survivors=3,
    )
    return replace(
        scenario,
        privacy=privacy,
        training=replace(
            scenario.training, rounds=10, local_steps=1, optimizer="none", final_learning_rate=1.0
        ),
        aggregation=replace(scenario.aggregation, clip_range=None, step=None),
        server=ServerSgd(adapter_learning_rate=0.1, head_learning_rate=4.0),
    )


def shared() -> list[dict[str, Any]]:
    """Audits of sums: of the quickstart's claim, and of the smaller one with both shares."""
    found = [timed(sharing(8.0), 1.0)]
    return found + [timed(sharing(CONTROL_EPSILON), share) for share in NOISE_SHARES]


def inversions() -> list[dict[str, Any]]:
    """The span check on one step of some records, without and with privacy."""
    torch.set_num_threads(1)
    scenario = find_scenario(SCENARIO)
    model, corpus = model_folder(scenario.model), load_source(scenario)
    plan = make_plan(scenario, corpus.labels, model, largest_site=len(corpus.train))
    rows = []
    for rank, count in BATCHES:
        chosen = corpus.train[:: len(corpus.train) // count][:count]
        records = Records(
            records=tuple(
                Record(text=example.text, label=corpus.labels.index(example.label))
                for example in chosen
            ),
            source=bytes(32),
        )
        for private in (False, True):
            result = invert(exposed(plan, model, rank), model, records, os.urandom, private=private)
            rows.append({"rank": rank, **msgspec.to_builtins(result)})
    return rows


def main(path: Path) -> None:
    """Runs all attacks and writes `path`."""
    outcome = {
        "command": "make audit",
        "inversions": inversions(),
        "audits": [audit() for _ in range(AUDITS)],
        "controls": [control(share) for share in NOISE_SHARES],
        "shared": shared(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome, indent=2) + "\n")
    print(json.dumps(outcome, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
