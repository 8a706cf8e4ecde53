"""A target of fuzzing: a property of any string of bytes, and the errors that it may raise."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from umbel_common.errors import UmbelError

Property: TypeAlias = Callable[[bytes], None]
"""A function that returns or raises a documented error; anything else, also a failed assertion, is
a finding."""


@dataclass(frozen=True)
class Place:
    """What a target may need from its surroundings."""

    folder: Path
    """A folder of the target's own, empty."""
    model: Callable[[], Path]
    """A function that returns the folder of a tiny model."""


@dataclass(frozen=True)
class Target:
    """A part of the product that takes what strangers send."""

    name: str
    make: Callable[[Place], Property]
    accepted: tuple[type[UmbelError], ...]
    """Documented errors; no other may come out, not even one derived from them."""
    share: int
    """Number of inputs in CI."""
    inputs: int
    """Number of inputs by Hypothesis in `make fuzz`."""
    guided: int = 0
    """Number of inputs by atheris in `make fuzz`; 0 for a target with a long state, which does not
    suit atheris."""


@dataclass
class Tally:
    """The results of the inputs of one target."""

    inputs: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """Number of refusals, by reason code, or by class for an error without one."""
    edges: int | None = None
    """Number of branches that a coverage-guided search reached; None: another engine."""

    def feed(self, target: Target, prove: Property, data: bytes) -> None:
        """Gives the target one input.

        Raises:
            Exception: any error that is not documented.
        """
        self.inputs += 1
        try:
            prove(data)
        except target.accepted as error:
            if type(error) not in target.accepted:
                raise
            self.refusals[getattr(error, "check", type(error).__name__)] += 1
