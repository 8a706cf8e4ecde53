"""A site's records, ready for training: token ids, labels, and the frozen-prefix cache.

This module is part of the core of the privacy guarantee. Never let the tokens or the label of a
record, or what is cached of it, depend on another record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from umbel_client.data.chat import fitting_answers
from umbel_client.data.records import LmRecords, Misfit, Records, refuse
from umbel_client.data.tokens import Ints, Tokens, fitting_texts
from umbel_client.data.units import Units
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.inputs import Batch, Inputs
from umbel_client.tasks.frozen_cache import (
    FrozenCache,
    OnProgress,
    frozen_prefix,
    ignore_progress,
    token_inputs,
)
from umbel_common.plans.plan import CausalLm, Task


@dataclass(frozen=True)
class PreparedData:
    """What each step samples from."""

    tokens: Tokens
    labels: Ints
    """int64[records], label indices. For a causal language model int64[tokens]: the ids of the
    tokens that count (`umbel_client.data.chat`)."""
    prefix: FrozenCache | None
    """The cache of the frozen layers; None: the model allows none, and each step runs all of it."""
    units: Units | None = None
    """None: each record is its own unit."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def unit_count(self) -> int:
        """Number of units that a step samples from."""
        return len(self) if self.units is None else len(self.units)

    def records_of(self, chosen: Ints) -> Ints:
        """The records of the chosen units, int64[n]."""
        return chosen if self.units is None else self.units.records_of(chosen)

    def inputs(self, indices: Ints) -> Inputs:
        """The inputs of the chosen records, padded to the longest of them."""
        if self.prefix is None:
            return token_inputs(self.tokens, indices)
        return self.prefix.inputs(self.tokens, indices)

    def batch(self, indices: Ints) -> Batch:
        """The chosen records with a label each."""
        return Batch(self.inputs(indices), torch.from_numpy(self.labels[indices]))

    def unit_shares(self, part: Ints) -> torch.Tensor:
        """The weight of each record in the mean of its unit, float32[n].

        Args:
            part: indices of the records of whole units, int64[n].
        """
        if self.units is None:
            return torch.ones(len(part))
        numbers = self.units.numbered(part)
        return torch.from_numpy((1.0 / np.bincount(numbers)[numbers]).astype(np.float32))

    def physical_batches(self, indices: Ints, size: int) -> Iterator[Ints]:
        """Cuts a batch into parts of at most `size` records that are computed at once.

        The records are sorted by length, which saves padding: a batch is a set, so its order is
        free. A unit's records stay in one part, which may then be larger than `size`.
        """
        order = indices[np.argsort(self.tokens.lengths[indices], kind="stable")]
        if self.units is not None:
            yield from self.units.whole(order, size)
            return
        for start in range(0, len(order), size):
            yield order[start : start + size]


def prepare(
    model: AdaptedModel,
    model_folder: Path,
    records: Records | LmRecords,
    *,
    cache: Path | None,
    on_progress: OnProgress = ignore_progress,
    task: Task | None = None,
    on_misfit: Misfit = refuse,
) -> PreparedData:
    """Tokenises the records and runs the frozen layers over them, once.

    A record that does not fit is left out; whether it does depends on this record alone.

    Args:
        model_folder: the base model's, for its tokenizer.
        cache: a folder on the site's disk for the frozen-prefix cache, which is private data; None
            keeps it in memory.
        on_progress: called as the frozen layers are computed.
        task: how the records are read; None: the task of the model's plan.
        on_misfit: called with each record that does not fit; a caller that gives none takes all
            records or none.

    Raises:
        ModelError: the folder holds no tokenizer that the task can use.
        DataError: what `on_misfit` raises.
        StorageError: the cache cannot be written.
    """
    task = task or model.plan.task
    if isinstance(records, LmRecords):
        assert isinstance(task, CausalLm)  # load_records reads what the task is about
        kept, tokens, labels = fitting_answers(
            records, model_folder, task, vocabulary=model.vocabulary, on_misfit=on_misfit
        )
    else:
        kept, tokens = fitting_texts(
            records,
            model_folder,
            task.max_tokens,
            vocabulary=model.vocabulary,
            on_misfit=on_misfit,
        )
        labels = np.array(records.labels, dtype=np.int64)[kept]
    units = None
    if records.units or records.unit_column is not None:
        of_record = np.array(records.units, dtype=np.int64)[kept]
        units = Units(np.unique(of_record, return_inverse=True)[1].astype(np.int64))
    return PreparedData(
        tokens=tokens,
        labels=labels,
        # A file of no records would be a file of no bytes, which cannot be mapped.
        prefix=frozen_prefix(model, tokens, cache if len(tokens) else None, on_progress),
        units=units,
    )
