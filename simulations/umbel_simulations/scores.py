"""What an adapter is worth on the held-out public set."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score

from umbel_simulations.results import Score
from umbel_simulations.sources import Corpus


def score(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> Score:
    """Accuracy, and F1 averaged over the labels that occur; a label never predicted counts as 0.

    Args:
        labels: int64[records], the truth as label indices.
        predicted: int64[records].
    """
    return Score(
        accuracy=float(accuracy_score(labels, predicted)),
        macro_f1=float(f1_score(labels, predicted, labels=np.unique(labels), average="macro")),
    )


def majority_score(corpus: Corpus) -> Score:
    """The best that a constant answer can do: always the commonest label of the test set."""
    counts = Counter(example.label for example in corpus.test)
    commonest = max(corpus.labels, key=lambda label: counts[label])
    index = {label: number for number, label in enumerate(corpus.labels)}
    truth = np.array([index[example.label] for example in corpus.test])
    return score(truth, np.full_like(truth, index[commonest]))
