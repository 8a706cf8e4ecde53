"""What a score is about: how it is shown, how sure it is, and which way is better."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from umbel_simulations.reporting.results import Score


@dataclass(frozen=True)
class Measure:
    """One figure of a score, in the unit in which people read it."""

    name: str
    """In a sentence."""
    unit: str
    """Behind a figure: ` %`, or nothing."""
    value: Callable[[Score], float]
    other_name: str
    other: Callable[[Score], float | None]
    """A second figure that is worth a column; None: this score has none."""
    higher_is_better: bool

    @property
    def heading(self) -> str:
        """Of a column or an axis."""
        return f"{self.name}{self.unit}"

    def error(self, score: Score, records: int) -> float:
        """Standard error of the value: of a proportion, or as it was found with the score."""
        if score.perplexity is not None:
            return score.perplexity_error or 0.0
        share = score.accuracy or 0.0
        return 100 * math.sqrt(share * (1 - share) / max(records, 1))

    def show(self, score: Score) -> str:
        """The value alone."""
        return f"{self.value(score):.1f}"

    def show_other(self, score: Score) -> str:
        """The second figure alone, or a dash."""
        found = self.other(score)
        return "\N{EN DASH}" if found is None else f"{found:.1f}"


def _percent(share: float | None) -> float:
    return 100 * (share or 0.0)


ACCURACY = Measure(
    name="accuracy",
    unit=" %",
    value=lambda score: _percent(score.accuracy),
    other_name="macro-F1 %",
    other=lambda score: _percent(score.macro_f1),
    higher_is_better=True,
)
PERPLEXITY = Measure(
    name="perplexity",
    unit="",
    value=lambda score: score.perplexity or 0.0,
    other_name="general text",
    other=lambda score: score.general_perplexity,
    higher_is_better=False,
)


def measure_of(score: Score) -> Measure:
    """What this score is about."""
    return ACCURACY if score.perplexity is None else PERPLEXITY
