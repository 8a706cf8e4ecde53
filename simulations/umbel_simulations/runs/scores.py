"""How good an adapter is on the held-out public set."""

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from umbel_client.evaluation.metrics import classification_figures
from umbel_simulations.inputs.sources import Corpus
from umbel_simulations.reporting.results import Difference, Score


def score(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> Score:
    """Accuracy, and F1 averaged over the labels that occur. F1 of a label never predicted is 0.

    Args:
        labels: int64[records], the true label indices.
        predicted: int64[records], the predicted label indices.
    """
    figures = classification_figures(labels, predicted)
    return Score(accuracy=figures.accuracy, macro_f1=figures.macro_f1)


def majority_score(corpus: Corpus) -> Score:
    """The score of the best constant answer: the most common label of the test set."""
    counts = Counter(example.label for example in corpus.test)
    commonest = max(corpus.labels, key=lambda label: counts[label])
    index = {label: number for number, label in enumerate(corpus.labels)}
    truth = np.array([index[example.label] for example in corpus.test])
    return score(truth, np.full_like(truth, index[commonest]))


def difference(losses: NDArray[np.float64], federated: NDArray[np.float64]) -> Difference:
    """How a language model's perplexity differs from the federated one, paired by record.

    Args:
        losses: float64[records], the model's loss of each record.
        federated: float64[records], the federated adapter's losses of the same records.
    """
    each = losses - federated
    ratio = math.exp(each.mean())
    return Difference(share=ratio - 1, error=ratio * float(each.std()) / math.sqrt(len(each)))
