"""A site's noisy counts, at the end of the vector that it masks, and what their sum says.

The law: these coordinates are masked and summed with those of every other site, and their sum is
signed, so no order, field or scale of them ever changes.

A round's vector is the delta of its tensors. If the plan has an evaluation, two coordinates follow,
score and records. Each is a share of `max_records`, in units of the clip range.
"""

import numpy as np
import numpy.typing as npt

from umbel_common.adapters.vector import Vector
from umbel_common.canonical import Value
from umbel_common.errors import PlanError
from umbel_common.plans.plan import Aggregation, FederatedEvaluation, TrainingPlan, levels


class SiteCounts(Value, frozen=True):
    """Counts with their noise, of one site or summed over the sites of a round."""

    score: float
    """Number of records that a classification labelled right; for a language model, the sum of the
    records' losses, each clipped at `largest_loss`, divided by `largest_loss`."""
    records: float
    """Number of records that were held out."""

    def mean(self) -> float | None:
        """Accuracy, or mean loss divided by `largest_loss`; None for less than one record."""
        return self.score / self.records if self.records >= 1 else None

    def __str__(self) -> str:
        mean = self.mean()
        found = "no figure" if mean is None else f"score {mean:.3f}"
        return f"{found} on about {self.records:,.0f} held-out records"


def with_counts(delta: Vector, counts: SiteCounts | None, plan: TrainingPlan) -> Vector:
    """The round's whole vector, delta and counts, float32[plan.vector_length]."""
    if plan.evaluation is None or counts is None:
        return delta
    shares = np.array([counts.score, counts.records]) * _unit(plan.aggregation, plan.evaluation)
    return np.concatenate([delta, shares.astype(np.float32)])


def counts_in_steps(counts: SiteCounts, plan: TrainingPlan) -> npt.NDArray[np.int64]:
    """The counts as in `with_counts`, in whole steps of the grid, int64[COUNTS]; clipped to
    the plan's clip range.

    Raises:
        PlanError: the plan has no evaluation.
    """
    if plan.evaluation is None:
        raise PlanError("a plan without an evaluation has no counts", field="evaluation")
    aggregation = plan.aggregation
    shares = np.array([counts.score, counts.records]) * _unit(aggregation, plan.evaluation)
    most = levels(aggregation.clip_range, aggregation.step)
    return np.clip(np.rint(shares / aggregation.step), -most, most).astype(np.int64)


def counts_of(
    shares: Vector, aggregation: Aggregation, evaluation: FederatedEvaluation, sites: int
) -> SiteCounts:
    """The summed counts of `sites` sites, from the mean of their coordinates, float32[2]."""
    score, records = shares.astype(np.float64) * sites / _unit(aggregation, evaluation)
    return SiteCounts(score=float(score), records=float(records))


def _unit(aggregation: Aggregation, evaluation: FederatedEvaluation) -> float:
    """The size of one record in a coordinate."""
    return aggregation.clip_range / evaluation.max_records
