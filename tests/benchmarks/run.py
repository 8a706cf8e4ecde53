"""`make bench`: runs every benchmark, writes one JSON file, and fails if a target is missed."""

import json
import sys
from pathlib import Path
from typing import Any

import bench_crypto
import bench_dp_step
import bench_load
import bench_long_context
import bench_lost_rounds
import bench_masking
import bench_memory
import bench_noise
import bench_relays
import bench_round
import bench_secagg_plus
import bench_transport
import bench_wire

BENCHES = (
    bench_masking,
    bench_lost_rounds,
    bench_crypto,
    bench_wire,
    bench_memory,
    bench_load,
    bench_long_context,
    bench_dp_step,
    bench_noise,
    bench_secagg_plus,
    bench_round,
    bench_relays,
    bench_transport,
)


def main(path: Path) -> int:
    """Measures, writes `path` after each part, prints a line for each figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, Any]] = {}
    for bench in BENCHES:
        figures |= bench.measure()
        path.write_text(json.dumps(figures, indent=2) + "\n")
    for name, figure in figures.items():
        target = "" if figure["target"] is None else f" (target {figure['target']:g})"
        verdict = {True: "holds", False: "MISSED", None: ""}[figure["holds"]]
        print(f"{name:40} {figure['value']:10.4g} {figure['unit']}{target} {verdict}")
    return 1 if any(figure["holds"] is False for figure in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
