"""A site's noisy counts, at the end of the vector that it masks, and what their sum says.

A round's vector is the delta of its tensors, then, if the plan has an evaluation, two coordinates:
score and records, as shares of `max_records` in units of the clip range.
"""

import numpy as np

from umbel_common.adapters.vector import Vector, size_of
from umbel_common.canonical import Value
from umbel_common.plans.plan import Aggregation, FederatedEvaluation, TrainingPlan

COORDINATES = 2
"""Score and records."""


class SiteCounts(Value, frozen=True):
    """What sites counted, noise and all; one site's, or the sum over those of a round."""

    score: float
    """Of a classification the records that were labelled right; of a language model the sum of
    their losses, each at most `largest_loss`, over `largest_loss`."""
    records: float

    def mean(self) -> float | None:
        """Accuracy, or mean loss over `largest_loss`; None if there are no records to speak of."""
        return self.score / self.records if self.records >= 1 else None

    def __str__(self) -> str:
        mean = self.mean()
        found = "no figure" if mean is None else f"score {mean:.3f}"
        return f"{found} on about {self.records:,.0f} held-out records"


def vector_length(plan: TrainingPlan, round_number: int) -> int:
    """Coordinates that a site masks in a round, without the weight."""
    counts = 0 if plan.evaluation is None else COORDINATES
    return size_of(plan.trained_tensors(round_number)) + counts


def with_counts(delta: Vector, counts: SiteCounts | None, plan: TrainingPlan) -> Vector:
    """The round's whole vector, float32[vector_length]."""
    if plan.evaluation is None or counts is None:
        return delta
    shares = np.array([counts.score, counts.records]) * _unit(plan.aggregation, plan.evaluation)
    return np.concatenate([delta, shares.astype(np.float32)])


def counts_of(
    shares: Vector, aggregation: Aggregation, evaluation: FederatedEvaluation, sites: int
) -> SiteCounts:
    """The sum of the counts of so many sites, from the mean of their coordinates, float32[2]."""
    score, records = shares.astype(np.float64) * sites / _unit(aggregation, evaluation)
    return SiteCounts(score=float(score), records=float(records))


def _unit(aggregation: Aggregation, evaluation: FederatedEvaluation) -> float:
    """One record, as a coordinate."""
    return aggregation.clip_range / evaluation.max_records
