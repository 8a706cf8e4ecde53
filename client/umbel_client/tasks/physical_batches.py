"""Cuts a batch into physical batches, and into smaller ones where memory runs out.

Where the cuts are changes nothing but memory and time: the batch, its noise and what the ledger was
charged stay as they are.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch

from umbel_client.data.tokens import Ints
from umbel_client.tasks.prepared import PreparedData
from umbel_common.errors import ModelError

_logger = logging.getLogger("umbel.trainer")


class BatchLimit:
    """How many records are computed at once; once lowered, it stays so for the rest of the job."""

    def __init__(self, records: int) -> None:
        self.records = records
        self._was_lowered = False

    def lower(self, records: int) -> None:
        """Says it loudly the first time only: a batch may need several cuts."""
        level = logging.DEBUG if self._was_lowered else logging.WARNING
        _logger.log(
            level,
            "memory ran out with %d records at once: from now on at most %d at once, to the same"
            " result (physical_batch_size in client.toml)",
            self.records,
            records,
        )
        self.records = records
        self._was_lowered = True


def compute_parts(
    data: PreparedData,
    chosen: Ints,
    limit: BatchLimit,
    units: Ints | None,
    *,
    compute: Callable[[Ints], None],
    discard: Callable[[], None],
) -> None:
    """Calls `compute` on physical batches that together hold each chosen record once.

    Where one runs out of memory it is cut in two, and all that are left become as small.

    Args:
        limit: lowered where memory runs out.
        units: int64[records of the data], the unit of each record; None: each record is a unit.
        compute: adds what a part contributes, as its last act.
        discard: forgets whatever a `compute` that failed has left.

    Raises:
        ModelError: a unit's records are in several parts, or do not fit into memory together.
    """
    pending = _cut(data, chosen, limit.records, units)
    while pending:
        part = pending.pop(0)
        if _fits(compute, part):
            continue
        discard()
        # Does nothing where CUDA is not in use.
        torch.cuda.empty_cache()
        half = (len(part) + 1) // 2
        if len(_cut(data, part, half, units)) == 1:
            raise ModelError(
                "the records of one unit do not fit into memory",
                field="physical_batch_size",
                found=f"{len(part)} at once",
                remedy="give the trainer more memory, lower data.max_records_per_unit,"
                " or agree on a plan with shorter texts or a smaller model",
            )
        limit.lower(half)
        pending = _cut(data, np.concatenate([part, *pending]), half, units)


def _fits(compute: Callable[[Ints], None], part: Ints) -> bool:
    """False if memory ran out; the error, and all tensors that it holds, are gone by then."""
    try:
        compute(part)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return False
    return True


def ran_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Of a device or of the host, where torch has no error class of its own for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _cut(data: PreparedData, records: Ints, size: int, units: Ints | None) -> list[Ints]:
    """A unit in two physical batches would be clipped in each, and count twice."""
    parts = list(data.physical_batches(records, size))
    if units is not None and parts:
        members = np.concatenate([np.unique(units[part]) for part in parts])
        if len(members) != len(np.unique(members)):
            raise ModelError(
                "the records of a unit are in several physical batches",
                accepted="all records of a unit in one",
            )
    return parts
