"""`make soak`: the tests that take minutes each, and a small JSON file of how they ended."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest


class Recorder:
    """A pytest plugin that remembers each test's end, its seconds and what it printed."""

    def __init__(self) -> None:
        self._tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for a test's preparation, for itself, and for what comes after it."""
        name = report.nodeid.removeprefix("tests/")
        test = self._tests.setdefault(name, {"outcome": "passed", "seconds": 0.0, "said": []})
        test["seconds"] = round(test["seconds"] + report.duration, 1)
        if report.outcome != "passed" and test["outcome"] == "passed":
            test["outcome"] = report.outcome
        if report.when == "call":
            test["said"] = report.capstdout.split("\n")[1:-1]

    def document(self, seconds: float) -> dict[str, Any]:
        """What is written."""
        return {
            "command": "make soak",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": round(seconds),
            "tests": self._tests,
        }


def main(path: Path) -> int:
    """Runs them, writes `path`; returns pytest's exit code."""
    recorder, began = Recorder(), time.monotonic()
    code = pytest.main(["-m", "soak"], plugins=[recorder])
    document = recorder.document(time.monotonic() - began)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
