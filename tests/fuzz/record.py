"""The record of a fuzzing run: inputs, seconds and findings of each target, and the versions."""

import os
import platform
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any

from fuzz.target import Tally

PACKAGES = ("umbel", "hypothesis", "atheris", "msgspec", "cryptography", "numpy")


def full_run() -> bool:
    """Whether this run is `make fuzz`; if not, it is the short share of CI."""
    return os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"


@dataclass
class Record:
    """The rows of one run."""

    seed: int = field(default_factory=lambda: int(os.environ.get("FUZZ_SEED", 0)) or default_seed())
    rows: list[dict[str, Any]] = field(default_factory=list)
    sizes: Counter[int] = field(default_factory=Counter)
    """Number of attempts whose sum was compared with the plaintext, by number of sites."""
    inexact: int = 0
    attempt_seconds: float = 0.0

    @contextmanager
    def row(self, target: str, engine: str) -> Iterator[Tally]:
        """Times one target; notes a finding and lets it fail the test."""
        tally, start, failures = Tally(), perf_counter(), 1
        try:
            yield tally
            failures = 0
        finally:
            self.rows.append(
                {
                    "target": target,
                    "engine": engine,
                    "inputs": tally.inputs,
                    "refused": dict(tally.refusals.most_common()),
                    "edges": tally.edges,
                    "failures": failures,
                    "seconds": round(perf_counter() - start, 1),
                }
            )

    @contextmanager
    def attempts(self) -> Iterator[Counter[int]]:
        """Times attempts whose sums are compared, and counts them by number of sites."""
        counted: Counter[int] = Counter()
        start, failures = perf_counter(), 1
        try:
            yield counted
            failures = 0
        finally:
            self.sizes += counted
            self.inexact += failures
            self.attempt_seconds += perf_counter() - start

    def document(self) -> dict[str, Any]:
        """The content of fuzz.json."""
        return {
            "command": "make fuzz",
            "seed": self.seed,
            "python": platform.python_version(),
            "versions": _versions(),
            "inputs": sum(row["inputs"] for row in self.rows),
            "failures": sum(row["failures"] for row in self.rows),
            "seconds": round(sum(row["seconds"] for row in self.rows), 1),
            "targets": self.rows,
            "exactness": {
                "attempts": self.sizes.total(),
                "failures": self.inexact,
                "seconds": round(self.attempt_seconds, 1),
                "attempts_by_sites": {str(size): self.sizes[size] for size in sorted(self.sizes)},
            },
        }

    def table(self) -> Iterator[str]:
        """The record as lines for a terminal."""
        yield f"{'target':32} {'engine':10} {'inputs':>9} {'refused':>9} {'found':>5} {'s':>7}"
        for row in self.rows:
            refused = sum(row["refused"].values()) if row["refused"] else "-"
            yield (
                f"{row['target']:32} {row['engine']:10} {row['inputs']:>9,} {refused:>9} "
                f"{row['failures']:>5} {row['seconds']:>7.1f}"
            )
        document = self.document()
        yield f"{document['inputs']:,} inputs, {document['failures']} findings, seed {self.seed}"
        if self.sizes:
            yield (
                f"{self.sizes.total():,} attempts of {min(self.sizes)} to {max(self.sizes)} sites, "
                f"{self.inexact} with another sum than the plaintext's, "
                f"{self.attempt_seconds:.0f} s"
            )


def default_seed() -> int:
    """A new seed for each full run, which shows it; in CI always the same one, so that no change is
    blamed for what chance found."""
    return secrets.randbelow(2**31) if full_run() else 1


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


RECORD = Record()
"""The record of this process."""
