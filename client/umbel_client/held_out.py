"""Records that a site holds out, and the noisy counts of how an adapter does on them.

Which records are held out depends on each unit alone: its own content is hashed, so that adding or
removing another unit moves none from one side to the other.
"""

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from umbel_client.data import LmRecords, Records
from umbel_client.model import AdaptedModel
from umbel_client.noise import NoiseSource
from umbel_client.prepared import PreparedData
from umbel_client.task import ClassificationTask, task_of
from umbel_common.errors import DataError
from umbel_common.plan import FederatedEvaluation
from umbel_common.site_counts import SiteCounts, deviation

BATCH = 32
"""Records at once: sets memory and speed, not the result."""


def hold_out(
    records: Records | LmRecords, share: float
) -> tuple[Records | LmRecords, Records | LmRecords]:
    """Records to train on, and about `share` of all units to score on.

    Raises:
        DataError: one of the two would be empty.
    """
    chosen = [_position(key) < share for key in _keys(records)]
    training = _only(records, [index for index, held in enumerate(chosen) if not held])
    scoring = _only(records, [index for index, held in enumerate(chosen) if held])
    if not len(training) or not len(scoring):
        raise DataError(
            "too few records to train on some and score on others",
            file=records.path,
            field="data.evaluation_share",
            found=f"{len(scoring)} of {len(records)} held out",
            remedy="raise data.evaluation_share, or take no part in plans with an evaluation",
        )
    return training, scoring


def noisy_counts(
    model: AdaptedModel, data: PreparedData, evaluation: FederatedEvaluation, noise: NoiseSource
) -> SiteCounts:
    """Score and number of the units of `data` under the model as it stands, each with noise.

    A unit counts once, with the mean score of its records; `umbel_common.site_counts` has the
    sensitivity.
    """
    scores = _scores(model, data, evaluation)
    shares = data.unit_shares(np.arange(len(data))).numpy().astype(np.float64)
    draws = noise.normal(2) * deviation(evaluation)
    return SiteCounts(
        score=float((scores * shares).sum() + draws[0]), records=float(data.unit_count + draws[1])
    )


@torch.no_grad()
def _scores(
    model: AdaptedModel, data: PreparedData, evaluation: FederatedEvaluation
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of each record, from 0 to 1; NaN counts as the worst, so that nothing of it shows."""
    task = task_of(model.plan.task)
    scores = np.empty(len(data))
    for part in data.physical_batches(np.arange(len(data)), BATCH):
        batch = task.batch(data, part)
        if isinstance(task, ClassificationTask):
            scores[part] = task.predict(model, batch) == batch.labels.numpy()
        else:
            losses = task.losses(model, batch).double().cpu().numpy()
            worst = np.nan_to_num(losses, nan=np.inf)
            scores[part] = np.clip(worst / evaluation.largest_loss, 0, 1)
    return scores


def _keys(records: Records | LmRecords) -> Sequence[bytes]:
    """What decides for each record: the name of its unit, or what it says."""
    if records.units:
        return [records.unit_names[unit].encode() for unit in records.units]
    return [msgspec.json.encode(record) for record in records.records]


def _position(key: bytes) -> float:
    """Between 0 and 1, as good as random."""
    return int.from_bytes(hashlib.sha256(b"umbel held out" + key).digest()[:8], "big") / 2**64


def _only(records: Records | LmRecords, kept: list[int]) -> Records | LmRecords:
    numbers: dict[int, int] = {}
    units = [records.units[index] for index in kept] if records.units else []
    for unit in units:
        numbers.setdefault(unit, len(numbers))
    return msgspec.structs.replace(
        records,
        records=tuple(records.records[index] for index in kept),
        rows=tuple(records.rows[index] for index in kept) if records.rows else (),
        units=tuple(numbers[unit] for unit in units),
        unit_names=tuple(records.unit_names[unit] for unit in numbers),
    )
