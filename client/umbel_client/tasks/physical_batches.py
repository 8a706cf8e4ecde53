"""Cuts a batch into physical batches, and into smaller ones where memory runs out.

Where the model has copies on several devices, each computes a physical batch at the same time.

This module is part of the core of the privacy guarantee. Never cut a unit in two, add a record
twice, or let a cut change the batch or its noise. Which copy computes a record follows from the
other records: never let it decide whether the record counts.

The cuts change memory and time only. The batch, its noise and its cost in the ledger stay as they
are.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from umbel_client.data.tokens import Ints
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_common.errors import ModelError

_T = TypeVar("_T")

_logger = logging.getLogger("umbel.trainer")


def in_threads(calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """Makes all calls at the same time, each in a thread of its own; one alone in this thread.

    Raises:
        Exception: what the first of the calls that failed has raised, after all have ended.
    """
    if len(calls) == 1:
        return [calls[0]()]
    with ThreadPoolExecutor(len(calls), thread_name_prefix="copy") as threads:
        made = [threads.submit(call) for call in calls]
    return [one.result() for one in made]


def compute_parts(
    data: PreparedData,
    chosen: Ints,
    limit: BatchLimit,
    units: Ints | None,
    *,
    compute: Sequence[Callable[[Part], None]],
    discard: Callable[[], None],
    private: bool = False,
) -> None:
    """Computes physical batches that together hold each chosen record once.

    A physical batch that runs out of memory is cut in two, and the remaining ones become as small:
    only numbers of rows that give a record the same bits are left to choose from (`BatchLimit`).
    A unit alone that does not fit in the next of them is computed in a row for each of its records.
    What other copies computed at the same time counts, and is not computed again.

    Args:
        chosen: indices of the batch's records, int64[n].
        limit: the number of records computed at once; lowered where memory runs out.
        units: int64[records of the data], the unit of each record; None: each record is a unit.
        compute: for each copy of the model, what adds a part's contribution as its last action.
            Each gets one part at a time, the copies in turn; all of them run at once.
        discard: drops what each `compute` that failed has left behind.
        private: whether the records of a unit that do not fit into memory count as zero: an error
            would tell that such a unit is in the batch.

    Raises:
        ModelError: a unit's records are in several parts; or they do not fit into memory together
            (unless `private`).
    """
    pending = _cut(data, chosen, limit, units)
    while pending:
        # Rows above a lowered limit are not tested any more under the adapters that follow, so a
        # part that has them goes to the first copy that holds it, whatever else is dealt.
        tested = [part.rows <= limit.records for part in pending[: len(compute)]]
        at_once = tested.index(False) if False in tested else len(tested)
        dealt = list(zip(compute, pending[: max(at_once, 1)], strict=False))
        pending = pending[len(dealt) :]
        fitted = in_threads([partial(_fits, *pair) for pair in dealt])
        if all(fitted):
            continue
        discard()
        # Does nothing where CUDA is not in use.
        torch.cuda.empty_cache()
        left = [chosen[:0]]
        for (failed, part), fits in zip(dealt, fitted, strict=True):
            half = limit.smaller(part.rows - 1)
            if fits:
                continue
            if half is not None and (units is None or len(np.unique(units[part.records])) > 1):
                limit.lower(half)
                left.append(part.records)
                continue
            # Which rows a unit is tried in follows from this unit, never from the limit that others
            # have left: else one unit more would decide whether this one counts. Nothing shows that
            # rows of its own give the bits of others, so the first copy that holds them has them.
            others = [one for one in compute if one is not failed]
            own = replace(part, rows=len(part))
            may_have_own = half is not None and own.rows < part.rows
            if not _fits_any(part, others, discard) and not (
                may_have_own and _fits_any(own, compute, discard)
            ):
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
        left += [part.records for part in pending]
        pending = _cut(data, np.concatenate(left), limit, units)


def _fits_any(
    part: Part, compute: Sequence[Callable[[Part], None]], discard: Callable[[], None]
) -> bool:
    """Tries a part on some copies, in their order; returns False if it fits on none of them."""
    for one in compute:
        if _fits(one, part):
            return True
        # At once: the next unit that is tried there would find less memory, or be refused for what
        # was left, and whether it counts would follow from this one.
        discard()
    return False


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
