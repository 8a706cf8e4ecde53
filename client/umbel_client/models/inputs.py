"""A model's inputs for a few records at once, padded to one length."""

from dataclasses import dataclass
from typing import TypeAlias

import torch


@dataclass(frozen=True)
class TokenInputs:
    """Whole records, for a forward pass from the embeddings on."""

    ids: torch.Tensor
    """int64[n, t]."""
    mask: torch.Tensor
    """int64[n, t], 1 where there is a token."""


@dataclass(frozen=True)
class HiddenInputs:
    """Outputs of the frozen lower layers, for a forward pass through the others."""

    hidden: torch.Tensor
    """float32[n, t, hidden size], zero where there is no token."""
    mask: torch.Tensor
    """int64[n, t], 1 where there is a token."""


@dataclass(frozen=True)
class PooledInputs:
    """Pooled, normalised vectors, where only the head on top of them is trained."""

    pooled: torch.Tensor
    """float32[n, hidden size]."""


_ROWS = 64


def whole_rows(values: torch.Tensor) -> torch.Tensor:
    """[n, features] -> [m, features] with zeros below, m the next multiple of 64.

    A product over few rows, such as a head's over one vector of each record, has kernels of its own
    for some numbers of rows: with this, the number of records does not change the bits of a record.
    Other shapes, which have many tokens of each record, stay as they are.
    """
    if values.dim() != 2:
        return values
    return torch.nn.functional.pad(values, (0, 0, 0, -len(values) % _ROWS))


Inputs: TypeAlias = TokenInputs | HiddenInputs | PooledInputs


@dataclass(frozen=True)
class Batch:
    """Inputs and labels of n rows, which are records and, after them, rows that fill a shape."""

    inputs: Inputs
    labels: torch.Tensor
    """int64[n], label indices; for a causal language model int64[n, t], ids of the tokens that
    count."""
    records: int | None = None
    """How many of the rows are records; None: all."""
