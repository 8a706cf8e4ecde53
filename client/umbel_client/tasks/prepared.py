"""A site's records, ready for training: token ids, labels, and the frozen-prefix cache.

This module is part of the core of the privacy guarantee. Never let the tokens or the label of a
record, or what is cached of it, depend on another record.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
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
from umbel_client.tasks.shapes import BatchLimit, Part, padded_lengths
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
    longest: int | None = None
    """The plan's greatest number of tokens, where padding ends; None: no limit."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def unit_count(self) -> int:
        """Number of units that a step samples from."""
        return len(self) if self.units is None else len(self.units)

    def records_of(self, chosen: Ints) -> Ints:
        """The records of the chosen units, int64[n]."""
        return chosen if self.units is None else self.units.records_of(chosen)

    @cached_property
    def padded(self) -> Ints:
        """The number of tokens that each record is padded to, int64[records].

        It follows from the record alone; where units are known, from the unit's longest record.
        """
        if self.prefix is not None and self.prefix.pooled:
            return np.ones(len(self), dtype=np.int64)
        lengths = self.tokens.lengths
        if self.units is not None and len(lengths):
            greatest = np.zeros(len(self.units), dtype=np.int64)
            np.maximum.at(greatest, self.units.of_record, lengths)
            lengths = greatest[self.units.of_record]
        return padded_lengths(lengths, self.longest)

    def part(self, records: Ints) -> Part:
        """A part of these records and no others, padded to the longest of them."""
        return Part(records, int(self.padded[records].max(initial=1)), len(records))

    def inputs(self, part: Part) -> Inputs:
        """The inputs of a part's rows."""
        if self.prefix is None:
            return token_inputs(self.tokens, part.filled, part.length)
        return self.prefix.inputs(self.tokens, part.filled, part.length)

    def batch(self, part: Part) -> Batch:
        """A part's rows with a label each."""
        labels = torch.from_numpy(self.labels[part.filled])
        return Batch(self.inputs(part), labels, len(part))

    def unit_shares(self, part: Ints) -> torch.Tensor:
        """The weight of each record in the mean of its unit, float32[n].

        Args:
            part: indices of the records of whole units, int64[n].
        """
        if self.units is None:
            return torch.ones(len(part))
        numbers = self.units.numbered(part)
        return torch.from_numpy((1.0 / np.bincount(numbers)[numbers]).astype(np.float32))

    def physical_batches(self, indices: Ints, limit: BatchLimit) -> Iterator[Part]:
        """Cuts a batch into parts that are computed at once, of records with one padded length.

        A unit's records stay in one part, which may then be larger than the limit.
        """
        padded = self.padded[indices]
        for length in np.unique(padded):
            alike = indices[padded == length]
            if self.units is None:
                starts = range(0, len(alike), limit.records)
                cuts: Iterator[Ints] = (alike[start : start + limit.records] for start in starts)
            else:
                cuts = self.units.whole(alike, limit.records)
            for records in cuts:
                yield Part(records, int(length), limit.rows(len(records)))


def prepare(
    model: AdaptedModel,
    model_folder: Path,
    records: Records | LmRecords,
    limit: BatchLimit,
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
        limit: the number of records computed at once.
        cache: a folder on the site's disk for the frozen-prefix cache, which is private data; None
            keeps it in memory.
        on_progress: called as the frozen layers are computed.
        task: how the records are read; None: the task of the model's plan.
        on_misfit: called with each record that does not fit; a caller that gives none takes all
            records or none.

    Raises:
        ModelError: the folder holds no tokenizer that the task can use, or another than when the
            model was loaded.
        DataError: what `on_misfit` raises.
        StorageError: the cache cannot be written.
    """
    task = task or model.plan.task
    if isinstance(records, LmRecords):
        assert isinstance(task, CausalLm)  # load_records reads what the task is about
        kept, tokens, labels = fitting_answers(
            records,
            model_folder,
            task,
            model.files,
            vocabulary=model.vocabulary,
            on_misfit=on_misfit,
        )
    else:
        kept, tokens = fitting_texts(
            records,
            model_folder,
            task.max_tokens,
            model.files,
            vocabulary=model.vocabulary,
            on_misfit=on_misfit,
        )
        labels = np.array(records.labels, dtype=np.int64)[kept]
    units = None
    if records.units or records.unit_column is not None:
        of_record = np.array(records.units, dtype=np.int64)[kept]
        units = Units(np.unique(of_record, return_inverse=True)[1].astype(np.int64))
    data = PreparedData(tokens, labels, None, units, task.max_tokens)
    # In the largest shape alone: what is kept must not follow from how many records there are.
    every = list(data.physical_batches(np.arange(len(data)), limit.largest()))
    # A file of no records would be a file of no bytes, which cannot be mapped.
    cache = cache if len(tokens) else None
    return replace(data, prefix=frozen_prefix(model, tokens, every, cache, on_progress))
