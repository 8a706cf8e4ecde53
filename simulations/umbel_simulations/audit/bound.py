"""A lower bound on epsilon from an attack's guesses.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", theorem 5.2.
"""

import numpy as np
from scipy.stats import binom

_LARGEST = 50.0
"""The search range ends here: no number of guesses that an audit makes could show more."""


def chance_of(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound on the chance of at least `correct` right guesses, if (epsilon, delta) holds.

    Under pure differential privacy each guess is right with a probability of at most
    e^epsilon / (1 + e^epsilon), as if the guesses were independent. Delta adds the paper's second
    term.

    Args:
        canaries: how many there are, each included by its own fair coin; m in the paper.
        guesses: canaries on which the attack did not abstain. It chose them without seeing the
            coins.
        correct: how many guesses were right.
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
    """The largest epsilon that `correct` right guesses refute with `confidence`, or 0.

    A mechanism that satisfies some epsilon satisfies every larger one. So guesses that refute one
    epsilon refute all below it, and the bisection's answer is a valid bound wherever it stops.
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
