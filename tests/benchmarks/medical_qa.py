"""`make utility-medical-qa`: the scenario medical-qa at three epsilons and several public seeds.

Each seed is another partition, sample of the test and initial adapter; noise is fresh in any case.
A quarter of an hour for each run on two cores. After each run it writes a small JSON file, which is
committed beside docs/benchmarks.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from umbel_simulations.scenario.file import SHIPPED

EPSILONS = ("inf", "8", "3")
SEEDS = (7, 8, 9)


def run(epsilon: str, seed: int, folder: Path) -> dict[str, Any]:
    """The summary of one run, and the processor time that it took."""
    scenario = (SHIPPED / "medical-qa.toml").read_text()
    planned = "\nepsilon = 8.0\n"
    assert planned in scenario
    file = folder / f"medical-qa-{epsilon}.toml"
    file.write_text(
        scenario if epsilon == "inf" else scenario.replace(planned, f"\nepsilon = {epsilon}.0\n")
    )
    script = Path(sys.executable).with_name("umbel-simulate")
    name = f"epsilon-{epsilon}-seed-{seed}"
    command = [script, "run", file, "--name", name, "--seed", str(seed), "--runs", folder, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [*command, *(["--no-dp"] if epsilon == "inf" else [])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary: dict[str, Any] = json.loads(result.stdout)
    summary["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return summary


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a run is kept."""
    scores = {row["name"]: row["score"] for row in summary["comparisons"]}
    spent = [site["epsilon"] for site in summary["sites"] if site["epsilon"] is not None]
    return {
        "perplexity": {name: round(score["perplexity"], 2) for name, score in scores.items()},
        "standard_error": round(summary["standard_error"], 2),
        "general_perplexity": {
            name: round(score["general_perplexity"], 2) for name, score in scores.items()
        },
        "to_federated_percent": {
            name: [round(100 * found["share"], 1), round(100 * found["error"], 1)]
            for name, found in summary["differences"].items()
        },
        "largest_epsilon": round(max(spent), 3) if spent else None,
        "seconds": summary["seconds"],
        "processor_seconds": round(summary["cpu"]),
    }


def means(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over the seeds of one epsilon."""
    return {
        measure: {
            name: round(statistics.mean(one[measure][name] for one in runs), 2)
            for name in runs[0][measure]
        }
        for measure in ("perplexity", "general_perplexity")
    }


def main(path: Path, epsilons: list[str], seeds: list[int]) -> None:
    """Runs what is asked for and writes `path`."""
    kept: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        for epsilon in epsilons:
            with tempfile.TemporaryDirectory() as folder:
                summary = run(epsilon, seed, Path(folder))
            kept.setdefault(epsilon, {})[str(seed)] = figures(summary)
            outcome = {
                "command": "make utility-medical-qa",
                "date": time.strftime("%Y-%m-%d"),
                "test_records": summary["test_records"],
                "runs": kept,
                "means": {name: means(list(runs.values())) for name, runs in kept.items()},
                "versions": summary["versions"],
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(outcome, indent=2) + "\n")
            print(epsilon, seed, json.dumps(kept[epsilon][str(seed)]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--epsilons", nargs="+", choices=EPSILONS, default=list(EPSILONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    asked = parser.parse_args()
    main(asked.path, asked.epsilons, asked.seeds)
