"""`make test-full`: every test but those of `make soak`, and a small JSON file of what they showed.

The file names the commit that was tested, and whether the working tree was that commit.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ["-m", "not soak", "-n", "2", "--dist", "loadfile"]
"""The last two are those of `make test`."""


class Recorder:
    """A pytest plugin that remembers how each test ended, and which tests are marked `full`."""

    def __init__(self) -> None:
        self._outcomes: dict[str, str] = {}
        self._full: set[str] = set()
        self._reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Pytest calls this for a test's preparation, for the test, and for its clean-up."""
        name = report.nodeid.removeprefix("tests/")
        if self._outcomes.setdefault(name, report.outcome) == "passed":
            self._outcomes[name] = report.outcome
        if "full" in report.keywords:
            self._full.add(name)
        if report.skipped and isinstance(report.longrepr, tuple):
            self._reasons[name] = report.longrepr[2].removeprefix("Skipped: ")

    def results(self) -> dict[str, Any]:
        """Counts of all tests and of those marked `full`, and every test that did not pass."""
        return {
            "tests": dict(Counter(self._outcomes.values())),
            "marked_full": dict(Counter(self._outcomes[name] for name in self._full)),
            "failed": sorted(name for name, end in self._outcomes.items() if end == "failed"),
            "skipped": dict(sorted(self._reasons.items())),
        }


def git(*arguments: str) -> str:
    """What a git command prints."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(path: Path, selected: list[str]) -> int:
    """Runs the tests, writes `path` and returns pytest's exit code.

    Args:
        selected: files and options for pytest; empty for all tests.
    """
    recorder = Recorder()
    tested = {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    began = time.monotonic()
    code = pytest.main([*OPTIONS, *selected], plugins=[recorder])
    document = {
        "command": "make test-full",
        "pytest": [*OPTIONS, *selected],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **tested,
        "cores": os.cpu_count(),
        "seconds": round(time.monotonic() - began),
        **recorder.results(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
