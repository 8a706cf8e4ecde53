"""Figures of merit, from a model's predictions."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score

from umbel_common.adapters.vector import Vector
from umbel_common.plans.figures import ClassificationFigures, GroupAccuracy, Loss


def classification_figures(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], groups: Sequence[str] = ()
) -> ClassificationFigures:
    """Accuracy, macro-averaged F1, and the accuracy on each group.

    Args:
        labels: int64[records], the truth as label indices.
        predicted: int64[records].
        groups: the group of each record; empty: there are no groups.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return ClassificationFigures(
        accuracy=float(accuracy_score(labels, predicted)),
        macro_f1=float(f1_score(labels, predicted, labels=np.unique(labels), average="macro")),
        groups=tuple(
            GroupAccuracy(
                group=group,
                records=len(rows),
                accuracy=float(accuracy_score(labels[rows], predicted[rows])),
            )
            for group, rows in sorted(members.items())
        ),
    )


def finite(value: float) -> Loss:
    """Returns `value`; None if it is not finite."""
    return value if math.isfinite(value) else None


def perplexity(mean_loss: Loss) -> Loss:
    """exp of a mean loss in nats; None if it is not finite."""
    try:
        return None if mean_loss is None else math.exp(mean_loss)
    except OverflowError:
        return None


def drift(before: Vector, after: Vector) -> float | None:
    """Relative change of an adapter, float32[n] each; see `Evaluation.drift`."""
    norm = float(np.linalg.norm(before.astype(np.float64)))
    if norm == 0:
        return None
    return finite(float(np.linalg.norm(after.astype(np.float64) - before)) / norm)
