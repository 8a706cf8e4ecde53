"""The two kinds of scores, accuracy and perplexity, and how each is shown to people."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from umbel_simulations.reporting.results import Score


@dataclass(frozen=True)
class Measure:
    """The main figure of a score and its second figure, in the units that people read."""

    name: str
    """Name within a sentence."""
    unit: str
    """Text after a figure: ` %`, or nothing."""
    read_value: Callable[[Score], float]
    other_name: str
    read_other: Callable[[Score], float | None]
    """Reads the second figure, which has a column of its own; None if the score lacks it."""
    higher_is_better: bool

    @property
    def heading(self) -> str:
        """Heading of a column or label of an axis."""
        return f"{self.name}{self.unit}"

    def error(self, score: Score, records: int) -> float:
        """Standard error of the value: that of a proportion, or the one in the score."""
        if score.perplexity is not None:
            return score.perplexity_error or 0.0
        share = score.accuracy or 0.0
        return 100 * math.sqrt(share * (1 - share) / max(records, 1))

    def show(self, score: Score) -> str:
        """The value without its unit."""
        return f"{self.read_value(score):.1f}"

    def show_other(self, score: Score) -> str:
        """The second figure without its unit, or a dash."""
        found = self.read_other(score)
        return "\N{EN DASH}" if found is None else f"{found:.1f}"


def _percent(share: float | None) -> float:
    return 100 * (share or 0.0)


ACCURACY = Measure(
    name="accuracy",
    unit=" %",
    read_value=lambda score: _percent(score.accuracy),
    other_name="macro-F1 %",
    read_other=lambda score: _percent(score.macro_f1),
    higher_is_better=True,
)
PERPLEXITY = Measure(
    name="perplexity",
    unit="",
    read_value=lambda score: score.perplexity or 0.0,
    other_name="general text",
    read_other=lambda score: score.general_perplexity,
    higher_is_better=False,
)


def measure_of(score: Score) -> Measure:
    """The measure of a score."""
    return ACCURACY if score.perplexity is None else PERPLEXITY
