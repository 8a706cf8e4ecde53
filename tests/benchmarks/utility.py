"""`make utility`: the quickstart under several public seeds, so that nobody has to believe one run.

Each seed is another partition, test sample and initial adapter; noise is fresh in any case. Minutes
for each seed; writes a small JSON file that is committed beside docs/benchmarks.md.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SEEDS = (7, 8, 9)


def run(seed: int, folder: Path) -> dict[str, Any]:
    """The summary of one run."""
    script = Path(sys.executable).with_name("umbel-simulate")
    command = [script, "run", "quickstart", "--seed", str(seed), "--runs", folder, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


def main(path: Path) -> None:
    """Runs all seeds and writes `path`."""
    with tempfile.TemporaryDirectory() as folder:
        summaries = {seed: run(seed, Path(folder)) for seed in SEEDS}
    names = [row["name"] for row in summaries[SEEDS[0]]["comparisons"]]
    accuracy = {
        name: {
            str(seed): next(
                round(100 * row["score"]["accuracy"], 1)
                for row in summary["comparisons"]
                if row["name"] == name
            )
            for seed, summary in summaries.items()
        }
        for name in names
    }
    first = summaries[SEEDS[0]]
    outcome = {
        "command": "make utility",
        "accuracy_percent": {
            name: {**scores, "mean": round(statistics.mean(scores.values()), 1)}
            for name, scores in accuracy.items()
        },
        "standard_error_of_one_accuracy": round(100 * first["standard_error"], 1),
        "largest_epsilon": {
            str(seed): round(max(site["epsilon"] for site in summary["sites"]), 3)
            for seed, summary in summaries.items()
        },
        "seconds": {str(seed): summary["seconds"] for seed, summary in summaries.items()},
        "versions": first["versions"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome, indent=2) + "\n")
    print(json.dumps(outcome["accuracy_percent"], indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
