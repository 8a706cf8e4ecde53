"""Where the time of a secure round goes: `python tests/benchmarks/round_times.py FILE NAME`.

The processes of `bench_round.py`, with a port that notes its requests (`timed_port.py`). It adds to
FILE, under NAME, for 3 and for 10 sites: milliseconds of wall clock by stage, the number and the
mean milliseconds of each kind of request a round, and milliseconds of CPU a round by process. The
first round is left out, and the last.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from e2e.daemons import Clinics, Daemon
from tiny_clinics import run, start, tiny_clinics

from umbel_server.messaging.carrier import CarrierLink
from umbel_server.messaging.link import Step

STAGES = ("train", "share", "mask", "confirm", "unmask")
"""A round that its sites prepared has no stage of sharing."""
ROUNDS = {3: 12, 10: 6}
_TICK = os.sysconf("SC_CLK_TCK")


class Timed:
    """A link that remembers when each stage began and ended, and each process' CPU then."""

    def __init__(self, link: CarrierLink, processes: dict[str, int]) -> None:
        self._link = link
        self._processes = processes
        self.stages: dict[tuple[int, str], tuple[float, float]] = {}
        self.moments: dict[int, float] = {}
        self.cpu: dict[int, dict[str, float]] = {}

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """See `Link`."""
        if step.stage == "train":
            self.moments[step.round] = time.time()
            self.cpu[step.round] = {name: cpu(pid) for name, pid in self._processes.items()}
        began = time.monotonic()
        for answer in self._link.exchange(step, requests, seconds):
            # Until the last reply: whoever asks need not wait for the end.
            self.stages[step.round, step.stage] = began, time.monotonic()
            yield answer


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has had."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return sum(map(int, text.rpartition(")")[2].split()[11:13])) / _TICK


def measure(sites: int) -> dict[str, Any]:
    """The figures for so many sites."""
    with tiny_clinics(sites, ROUNDS[sites]) as clinics, tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "times.json"
        clinics.port_process = Daemon.of(
            clinics.operator_folder,
            str(Path(__file__).parent / "timed_port.py"),
            str(clinics.operator_folder / "server.toml"),
            str(noted),
        )
        return _measured(clinics, noted, ROUNDS[sites])


def _measured(clinics: Clinics, noted: Path, rounds: int) -> dict[str, Any]:
    start(clinics, rounds)
    processes = {"port": clinics.port_process.pid, "rounds": os.getpid()}
    for name, site in clinics.sites.items():
        processes |= {f"{name} relay": site.relay.pid, f"{name} trainer": site.trainer.pid}
    links: list[Timed] = []

    def watched(link: CarrierLink) -> Timed:
        links.append(Timed(link, processes))
        return links[-1]

    run(clinics, watched)
    clinics.port_process.stop()
    return _figures(links[-1], json.loads(noted.read_text()), rounds, len(clinics.sites))


def _figures(
    link: Timed, times: dict[str, list[tuple[float, float]]], rounds: int, sites: int
) -> dict[str, Any]:
    counted = range(2, rounds)
    begin, end = link.moments[2], link.moments[rounds]
    stages = {
        stage: 1000
        * statistics.median(
            link.stages[number, stage][1] - link.stages[number, stage][0] for number in counted
        )
        for stage in STAGES
        if (2, stage) in link.stages
    }
    whole = [
        link.stages[number, "unmask"][1] - link.stages[number, "train"][0] for number in counted
    ]
    between = [
        link.stages[number + 1, "train"][0] - link.stages[number, "unmask"][1] for number in counted
    ]
    requests = {}
    for name, taken in sorted(times.items()):
        seconds = [one for moment, one in taken if begin <= moment < end]
        if seconds:
            requests[name] = {
                "a_round": round(len(seconds) / len(counted), 1),
                "mean_ms": round(1000 * statistics.mean(seconds), 2),
                "ms_a_round": round(1000 * sum(seconds) / len(counted), 1),
            }
    spent = {
        name: 1000 * (link.cpu[rounds][name] - link.cpu[2][name]) / len(counted)
        for name in link.cpu[2]
    }
    kinds = {
        "port": spent["port"],
        "rounds": spent["rounds"],
        "a relay": sum(ms for name, ms in spent.items() if name.endswith("relay")) / sites,
        "a trainer": sum(ms for name, ms in spent.items() if name.endswith("trainer")) / sites,
    }
    return {
        "round_ms": round(1000 * statistics.median(whole)),
        "between_rounds_ms": round(1000 * statistics.median(between)),
        "stage_ms": {name: round(ms) for name, ms in stages.items()},
        "requests": requests,
        "cpu_ms_a_round": {name: round(ms, 1) for name, ms in kinds.items()},
    }


def main(path: Path, name: str, sites: list[int]) -> None:
    """Adds the figures to the file."""
    found = json.loads(path.read_text()) if path.exists() else {}
    for count in sites:
        figures = measure(count)
        found.setdefault(name, {})[f"{count} sites"] = figures
        print(json.dumps(figures, indent=2), flush=True)
    found["machine"] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(one) for one in sys.argv[3:]] or list(ROUNDS))
