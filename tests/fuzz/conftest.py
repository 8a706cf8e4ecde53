"""Prints the table of a fuzzing run, and writes its file."""

import json

import pytest
from fuzz.record import RECORD, full_run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if full_run():
        path = config.rootpath / "docs" / "benchmarks" / "fuzz.json"
        path.write_text(json.dumps(RECORD.document(), indent=2) + "\n")
        terminalreporter.section("fuzzing")
        for line in RECORD.table():
            terminalreporter.write_line(line)
