"""What is fuzzed: a property of any string of bytes, and the errors that it may end with."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from umbel_common.errors import UmbelError

Property: TypeAlias = Callable[[bytes], None]
"""Returns, or raises a documented error. Anything else, a failed assertion too, is a finding."""


@dataclass(frozen=True)
class Place:
    """What a target may need from where it runs."""

    folder: Path
    """Empty, and its own."""
    model: Callable[[], Path]
    """The folder of a tiny model."""


@dataclass(frozen=True)
class Target:
    """One thing that takes what strangers send."""

    name: str
    make: Callable[[Place], Property]
    accepted: tuple[type[UmbelError], ...]
    """The errors that are documented; no other may come out, not even one derived from them."""
    share: int
    """Inputs in CI."""
    inputs: int
    """Inputs by Hypothesis in `make fuzz`."""
    guided: int = 0
    """Inputs by atheris in `make fuzz`; 0: none, since it is no place for a long state."""


@dataclass
class Tally:
    """What became of the inputs of one target."""

    inputs: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """By reason code, or by class where an error has none."""
    edges: int | None = None
    """Branches of the code that a coverage-guided search reached."""

    def feed(self, target: Target, prove: Property, data: bytes) -> None:
        """One input.

        Raises:
            Exception: whatever is not documented.
        """
        self.inputs += 1
        try:
            prove(data)
        except target.accepted as error:
            if type(error) not in target.accepted:
                raise
            self.refusals[getattr(error, "check", type(error).__name__)] += 1
