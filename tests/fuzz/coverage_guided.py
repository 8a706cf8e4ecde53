"""Atheris as an engine: one target in a process of its own, since libFuzzer ends it.

`python -m fuzz.coverage_guided TARGET [libFuzzer's options] [corpus folder]`
"""

import sys
from pathlib import Path

import atheris  # type: ignore[import-untyped]  # it publishes no types

INSTRUMENTED = ["umbel_common", "umbel_server", "fuzz"]
"""Packages to instrument; the targets too, where each change to an honest message is a branch."""

with atheris.instrument_imports(include=INSTRUMENTED):  # pyright: ignore[reportAttributeAccessIssue]  # nor names
    from fuzz.target import Place, Tally
    from fuzz.targets import TARGETS


def main(arguments: list[str]) -> None:
    """Runs until libFuzzer ends it; a finding ends the process with another status."""
    target = TARGETS[arguments[1]]
    prove = target.make(Place(folder=Path(), model=Path))
    tally = Tally()

    def one_input(data: bytes) -> None:
        tally.feed(target, prove, data)

    atheris.Setup([arguments[0], *arguments[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
