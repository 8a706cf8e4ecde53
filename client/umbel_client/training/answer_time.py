"""When a round's answer leaves: at a multiple of a time that follows from plan and machine.

A step over long records takes longer than one over short ones, so the time of an answer can tell
whether a long record is in a batch. With `answer_time = "even"` in client.toml, a site waits until
a multiple of the time that the plan's largest likely round takes, measured on made-up records
before any record is looked at. The first round after a job was loaded also prepares the records.
That ends at a multiple of its own, so that the two times are never added up. What takes longer than
the distance ends at a later multiple.

This module is part of the core of the privacy guarantee. Never measure on real records, and never
let an answer leave early where its work failed.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.training.bit_test import lengths_up_to, made_up_gradients
from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan

MARGIN = 2.0
"""Measured times are multiplied by it: optimizer, noise, disk and other processes take time too."""

_logger = logging.getLogger("umbel.trainer")


@dataclass(frozen=True)
class AnswerTime:
    """The times at which a job's rounds, and the preparation of its records, may end."""

    seconds: float
    """Their distance; 0: a round ends when it is done."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Ends, in success or failure, at a multiple of `seconds` after its beginning."""
        began = time.monotonic()
        try:
            yield
        finally:
            taken = time.monotonic() - began
            if self.seconds > 0:
                time.sleep(max(math.ceil(taken / self.seconds), 1) * self.seconds - taken)


WHEN_DONE = AnswerTime(0.0)


def measure_answer_time(
    model: AdaptedModel,
    limit: BatchLimit,
    *,
    public_size: int,
    records_per_unit: int,
    scored_units: float,
) -> AnswerTime:
    """The answer time of a plan on this machine.

    Args:
        limit: the number of records computed at once.
        public_size: number of this site's units.
        records_per_unit: largest number of records of a unit.
        scored_units: number of units that a round scores, on average.
    """
    model.select(1)
    longest = model.plan.task.max_tokens
    made_up_gradients(model, longest, limit.records)
    began = time.monotonic()
    made_up_gradients(model, longest, limit.records)
    part = time.monotonic() - began
    copies = len(model.copies)
    drawn = drawn_units(model.plan, public_size)
    parts = most_parts(model.plan, limit, records_per_unit, scored_units, drawn, copies=copies)
    answer_time = AnswerTime(MARGIN * parts * part)
    _logger.info("answers to rounds leave at multiples of %.1f s", answer_time.seconds)
    return answer_time


def drawn_units(plan: TrainingPlan, public_size: int) -> float:
    """The mean number of this site's units in a batch.

    In distributed mode the plan's expected batch size says nothing about it: it is of all sites
    together, and a number that the server divides by. A plan that states a small one must not make
    batches exceed their time.
    """
    if isinstance(plan.privacy, DistributedPrivacy):
        return plan.privacy.sampling_rate * public_size
    return plan.training.expected_batch_size


def most_parts(
    plan: TrainingPlan,
    limit: BatchLimit,
    records_per_unit: int,
    scored_units: float,
    drawn: float,
    *,
    copies: int = 1,
) -> int:
    """The number of physical batches, one after the other, that hardly any round exceeds.

    A batch is hardly ever larger than its mean plus four standard deviations, and as little is the
    number of units that are held out. Each length that records are padded to may have one physical
    batch that is not full. The records of a unit are in one of them. Each copy of the model
    computes one at the same time; held-out records are computed by the first.
    """
    lengths = len(lengths_up_to(plan.task.max_tokens))
    at_once = max(limit.records // records_per_unit, 1)

    def parts(mean: float) -> int:
        return math.ceil(math.ceil(mean + 4 * math.sqrt(mean)) / at_once) + lengths

    in_a_step = math.ceil(parts(drawn) / copies)
    in_steps = plan.training.local_steps * in_a_step
    return in_steps + (parts(scored_units) if scored_units else 0)
