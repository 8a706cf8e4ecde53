"""Scores, compared with counts by hand."""

import numpy as np
import pytest

from umbel_simulations.inputs.sources import Corpus, Example
from umbel_simulations.runs.scores import majority_score, score


def corpus(train: str, test: str) -> Corpus:
    """Each letter is the label of a record."""
    return Corpus(
        name="letters",
        labels=tuple(sorted(set(train))),
        train=tuple(Example(text="t", label=letter) for letter in train),
        test=tuple(Example(text="t", label=letter) for letter in test),
    )


def test_accuracy_and_macro_f1_are_those_of_the_definition() -> None:
    result = score(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0]))
    assert result.accuracy == pytest.approx(3 / 6)
    # F1: label 0 2*2/(2*2+2+1), label 1 2*1/(2*1+1+1), label 2 never predicted.
    assert result.macro_f1 == pytest.approx((4 / 7 + 2 / 4 + 0) / 3)


def test_a_label_that_does_not_occur_does_not_lower_macro_f1() -> None:
    assert score(np.array([0, 0, 2, 2]), np.array([0, 0, 2, 2])).macro_f1 == 1.0
    assert score(np.array([0, 0]), np.array([0, 1])).macro_f1 == pytest.approx(2 / 3)


def test_the_majority_is_the_best_that_a_constant_can_do_on_the_test_set() -> None:
    result = majority_score(corpus(train="aabbb", test="aaab"))
    assert result.accuracy == pytest.approx(3 / 4)
    assert result.macro_f1 == pytest.approx((6 / 7 + 0) / 2)
