"""Cuts a batch into physical batches, and into smaller ones where memory runs out.

This module is part of the core of the privacy guarantee. Never cut a unit in two, compute a record
twice, or let a cut change the batch or its noise.

The cuts change memory and time only. The batch, its noise and its cost in the ledger stay as they
are.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch

from umbel_client.data.tokens import Ints
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_common.errors import ModelError

_logger = logging.getLogger("umbel.trainer")


def compute_parts(
    data: PreparedData,
    chosen: Ints,
    limit: BatchLimit,
    units: Ints | None,
    *,
    compute: Callable[[Part], None],
    discard: Callable[[], None],
    private: bool = False,
) -> None:
    """Calls `compute` on physical batches that together hold each chosen record once.

    A physical batch that runs out of memory is cut in two, and the remaining ones become as small:
    only numbers of rows that give a record the same bits are left to choose from (`BatchLimit`).

    Args:
        chosen: indices of the batch's records, int64[n].
        limit: the number of records computed at once; lowered where memory runs out.
        units: int64[records of the data], the unit of each record; None: each record is a unit.
        compute: adds what a part contributes, as its last action.
        discard: drops what a `compute` that failed has left behind.
        private: whether the records of a unit that do not fit into memory count as zero: an error
            would tell that such a unit is in the batch.

    Raises:
        ModelError: a unit's records are in several parts; or they do not fit into memory together
            (unless `private`).
    """
    pending = _cut(data, chosen, limit, units)
    while pending:
        part = pending.pop(0)
        if _fits(compute, part):
            continue
        discard()
        # Does nothing where CUDA is not in use.
        torch.cuda.empty_cache()
        half = limit.smaller(part.rows - 1)
        if half is None or (units is not None and len(np.unique(units[part.records])) == 1):
            error = ModelError(
                "the records of one unit do not fit into memory",
                field="physical_batch_size",
                found=f"{part.rows} at once",
                remedy="give the trainer more memory, lower data.max_records_per_unit,"
                " or agree on a plan with shorter texts or a smaller model",
            )
            if not private:
                raise error
            _logger.error("%s", error.diagnostics())
            continue
        limit.lower(half)
        left = np.concatenate([part.records, *(other.records for other in pending)])
        pending = _cut(data, left, limit, units)


def _fits(compute: Callable[[Part], None], part: Part) -> bool:
    """Returns False if memory ran out; the error and all tensors that it held are freed by then."""
    try:
        compute(part)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return False
    return True


def ran_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error means that the memory of a device or of the host ran out.

    Torch has no error class for the host's.
    """
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _cut(data: PreparedData, records: Ints, limit: BatchLimit, units: Ints | None) -> list[Part]:
    """Cuts records into parts. A unit in two of them would be clipped in each, and count twice."""
    parts = list(data.physical_batches(records, limit))
    if units is not None and parts:
        members = np.concatenate([np.unique(units[part.records]) for part in parts])
        if len(members) != len(np.unique(members)):
            raise ModelError(
                "the records of a unit are in several physical batches",
                accepted="all records of a unit in one",
            )
    return parts
