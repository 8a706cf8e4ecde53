"""From guesses to a lower bound on epsilon (Steinke, Nasr and Jagielski 2023, "Privacy Auditing
with One (1) Training Run", theorem 5.2)."""

import numpy as np
from scipy.stats import binom

_LARGEST = 50.0
"""Of any epsilon that so few guesses could show."""


def chance_of(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound on the probability of so many correct guesses, if (epsilon, delta) holds.

    Pure differential privacy makes each guess right with probability e^epsilon / (1 + e^epsilon) at
    most, as if independently; delta adds the paper's second term.

    Args:
        canaries: each included by its own fair coin; m in the paper.
        guesses: canaries on which the attack did not abstain, chosen without sight of the coins.
        correct: guesses that were right.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError("correct, guesses and canaries must be in rising order")
    accuracy = 1.0 / (1.0 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, accuracy))
    if correct == 0:
        return 1.0
    below = np.arange(1, correct + 1)
    mass = np.cumsum(binom.pmf(correct - below, guesses, accuracy))
    return min(1.0, tail + 2 * canaries * delta * float((mass / below).max()))


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    """The largest epsilon that so many correct guesses refute, at `confidence`; 0 if they refute
    none.

    A mechanism with a smaller epsilon has every larger one too, so what refutes one epsilon refutes
    all below it: wherever the bisection ends, its answer is a valid bound.
    """
    refuted, upper = 0.0, _LARGEST
    if chance_of(canaries, guesses, correct, refuted, delta) > 1 - confidence:
        return 0.0
    while upper - refuted > 1e-6:
        middle = (refuted + upper) / 2
        if chance_of(canaries, guesses, correct, middle, delta) <= 1 - confidence:
            refuted = middle
        else:
            upper = middle
    return refuted
