"""What large adapters cost on their way: `python tests/benchmarks/bench_transport.py` prints JSON.

A whole job of two rounds over the real processes: three sites' trainers and relays, the process
with the port and the one with the jobs. Only training is left out: a delta of random numbers takes
its place (`prepared_site.py`). A delta is 200 MB on the wire, and so is the adapter: float32, or
the ring of 32 bits.

Memory is a process' largest resident set (VmHWM, pages of files and libraries included) while the
job runs, less its resident set before, in deltas. A server is its two processes, a client the two
of the site that needed most; peaks are added although they come at different moments.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import msgspec
import prepared_site
from bench_masking import entry
from e2e.daemons import SITES, Clinics, Daemon
from support.homes import live_in, own_homes
from toy_federation import RANK, WIDTH, make_plan

from umbel_common.plans.plan import BaseModel, NoPrivacy, TrainingPlan
from umbel_common.trust.identity import sign
from umbel_host.files.model_digest import folder_digest
from umbel_server.storage.job_queue import JobState

MEGABYTES = 200
MANY_SITES, MANY_MEGABYTES = 9, 20
ROUNDS = 2
MOST_SECONDS = 1800.0
POLICY = 'approval = "none"\nallow_without_privacy = true'


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    own_homes()
    peaks, seconds = federation(SITES, MEGABYTES)
    many, _ = federation([f"site-{number}" for number in range(MANY_SITES)], MANY_MEGABYTES)
    few, _ = federation(SITES, MANY_MEGABYTES)
    server = peaks["port"] + peaks["rounds"]
    client = max(peaks[f"{name} relay"] + peaks[f"{name} trainer"] for name in SITES)
    parts = {
        "port": peaks["port"],
        "rounds": peaks["rounds"],
        "relay": max(peaks[f"{name} relay"] for name in SITES),
        "trainer": max(peaks[f"{name} trainer"] for name in SITES),
    }
    return {
        "server_memory_in_deltas": entry(server, "deltas of 200 MB", 3.0),
        "client_memory_in_deltas": entry(client, "deltas of 200 MB", 4.0),
        **{
            f"{name}_memory_in_deltas": entry(value, "deltas of 200 MB", None)
            for name, value in parts.items()
        },
        "server_memory_growth_3_to_9_sites_mb": entry(
            MANY_MEGABYTES * (many["port"] + many["rounds"] - few["port"] - few["rounds"]),
            "MB",
            None,
        ),
        "large_round_seconds": entry(seconds / ROUNDS, "s", None),
    }


def federation(sites: Sequence[str], megabytes: int) -> tuple[dict[str, float], float]:
    """Process -> its growth in deltas, over a job; and how many seconds that took."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        live_in(folder)
        model = empty_model(Path(folder))
        clinics = Clinics(Path(folder) / "c", model, POLICY, sites)
        clinics.limit(train_seconds=MOST_SECONDS, stage_seconds=MOST_SECONDS)
        for site in clinics.sites.values():
            site.trainer = Daemon.of(site.folder, prepared_site.__file__, str(site.config))
        plan = large_plan(model, megabytes, len(sites))
        try:
            clinics.port_process.start()
            clinics.rounds_process.start()
            for site in clinics.sites.values():
                # One after the other: many that import PyTorch at once take minutes.
                site.trainer.start()
                site.status()
                site.relay.start()
            time.sleep(10)
            processes = {
                "port": clinics.port_process.pid,
                "rounds": clinics.rounds_process.pid,
                **{f"{name} relay": site.relay.pid for name, site in clinics.sites.items()},
                **{f"{name} trainer": site.trainer.pid for name, site in clinics.sites.items()},
            }
            before = {name: forget_peak(pid) for name, pid in processes.items()}
            began = time.monotonic()
            clinics.queue.add(plan.job, sign(clinics.operator, plan))
            job = clinics.wait(plan.job, JobState.FINISHED, JobState.FAILED, seconds=MOST_SECONDS)
            assert job.state is JobState.FINISHED, (job.detail, clinics.logs())
            seconds = time.monotonic() - began
            after = {name: memory(pid, "VmHWM") for name, pid in processes.items()}
        finally:
            clinics.close()
    delta = 4 * plan.lora.size
    return {name: (after[name] - before[name]) / delta for name in processes}, seconds


def large_plan(model: Path, megabytes: int, sites: int) -> TrainingPlan:
    """A plan for so many sites whose adapter, and delta, is at least so large."""
    layers = -(-megabytes * 1_000_000 // (4 * 2 * RANK * WIDTH))
    plan = make_plan(sites // 2 + 1, 32, layers)
    return msgspec.structs.replace(
        plan,
        model=BaseModel(name="none", digest=folder_digest(model)),
        training=msgspec.structs.replace(plan.training, rounds=ROUNDS),
        privacy=NoPrivacy(),
        aggregation=msgspec.structs.replace(plan.aggregation, step=1e-6),
    )


def empty_model(folder: Path) -> Path:
    """What a site's configuration names, and nobody opens here."""
    model = folder / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text("{}")
    return model


def forget_peak(pid: int) -> int:
    """Resident bytes of a process, from which its peak is counted anew.

    Only root may do so: our processes hide their memory.
    """
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return memory(pid, "VmRSS")


def memory(pid: int, name: str) -> int:
    """A figure of the kernel's about a process' memory, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
