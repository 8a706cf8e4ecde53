"""Tests that a record's results have the same bits in any company, and in any shape that is used.

This module is part of the core of the privacy guarantee. Never test on real records, never allow a
difference, however small, and never leave out a path that private results take.

One bit is enough for an attack: a server can make an adapter that turns the last bit of a hidden
state into a whole gradient. If that bit followed from the other records of a physical batch, one
record more would change the gradients of its neighbours, and the sum would move by many clip norms.
The order of floating-point sums follows from the shapes of tensors and from the kernels that the
machine chooses for them, so it is tested on the machine and the model that train.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from umbel_client.data.tokens import Tokens
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import take_gradients
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.frozen_cache import frozen_prefix, ignore_progress
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import PADDED_LENGTHS, BatchLimit, Part
from umbel_client.tasks.task import made_up_labels, task_of
from umbel_common.errors import ModelError


def prove_shapes(model: AdaptedModel, limit: BatchLimit) -> None:
    """Tests every shape that a job may compute in, and keeps those in which bits are equal.

    A number of rows that gives other bits than the largest one is not used: records are then
    computed in more rows than they need. That no row has padding is tested in the largest number
    alone: masks are made whatever they say, in any number of rows.

    Args:
        model: with the parameters of a round selected.
        limit: the numbers of rows; those that do not pass are taken out.

    Raises:
        ModelError: a record's bits depend on the records beside it, or on its place among them.
    """
    kept = set(limit.choices)
    for length, bits in product(lengths_up_to(model.plan.task.max_tokens), _paths(model)):
        _require_equal(model, limit.records, length, bits, full=True)
        wanted = _require_equal(model, limit.records, length, bits, full=False)
        for rows in sorted(kept - {limit.records}):
            if bits(model, _company(model, length, rows, rows - 1, full=False)) != wanted:
                kept.discard(rows)
    limit.keep(kept)


def check_round(model: AdaptedModel, limit: BatchLimit) -> None:
    """Tests the adapter that a round starts from, at the shortest and the greatest length.

    That no row has padding is tested at the shortest length only: it is the same code for each
    adapter, and `prove_shapes` tests it at every length.

    Args:
        model: with the round's adapter, and its parameters selected.
        limit: the numbers of rows that `prove_shapes` kept.

    Raises:
        ModelError: a record's bits depend on the records beside it, on its place among them, or on
            their number.
    """
    lengths = lengths_up_to(model.plan.task.max_tokens)
    fewest = limit.choices[0]
    shapes = dict.fromkeys([(lengths[0], False), (lengths[0], True), (lengths[-1], False)])
    for (length, full), bits in product(shapes, _paths(model)):
        wanted = _require_equal(model, limit.records, length, bits, full=full)
        found = bits(model, _company(model, length, fewest, fewest - 1, full=full))
        _require(found == wanted, model, length)


@dataclass(frozen=True)
class _Company:
    """A made-up record among others, in one shape."""

    data: PreparedData
    part: Part
    position: int
    """The row of the record."""


Bits = Callable[[AdaptedModel, _Company], bytes]


def _paths(model: AdaptedModel) -> tuple[Bits, ...]:
    """What a site computes of its records under the model's plan."""
    scored = model.plan.evaluation is not None
    return (_gradient_bits, _score_bits) if scored else (_gradient_bits,)


def lengths_up_to(longest: int) -> list[int]:
    """Every length that a record of at most `longest` tokens may be padded to, in rising order."""
    return [*PADDED_LENGTHS[longest > PADDED_LENGTHS].tolist(), longest]


def made_up_gradients(model: AdaptedModel, length: int, rows: int) -> None:
    """Computes the gradients of as many made-up records of `length` tokens, and drops them.

    Args:
        model: with the parameters of a round selected.
    """
    _gradient_bits(model, _company(model, length, rows, 0, full=True))


def _company(model: AdaptedModel, length: int, rows: int, position: int, *, full: bool) -> _Company:
    """The same record for each `length`, in other company for each number of rows and position.

    Args:
        full: whether the record fills its length. If it comes first, so do all others: some code
            takes another path where no row has padding.
    """
    config = model.base.config
    random = np.random.default_rng((length, rows, position))
    lengths = random.integers(max(1, length // 2), length + 1, rows)
    record = np.random.default_rng(length)
    lengths[position] = length if full else length - length // 8
    if full and position == 0:
        lengths[:] = length
    ids = [random.integers(0, config.vocab_size, size) for size in lengths]
    ids[position] = record.integers(0, config.vocab_size, lengths[position])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    pad = getattr(config, "pad_token_id", None) or 0
    tokens = Tokens(np.concatenate(ids).astype(np.int32), starts, pad)
    labels = made_up_labels(model.plan.task, tokens)
    if len(labels) == rows:
        labels[position] = 0
    part = Part(np.arange(rows), length, rows)
    prefix = frozen_prefix(model, tokens, [part], None, ignore_progress)
    return _Company(PreparedData(tokens, labels, prefix), part, position)


def _gradient_bits(model: AdaptedModel, company: _Company) -> bytes:
    """The record's cached values and its gradient."""
    trained = [parameter for parameter in model.adapter.values() if parameter.requires_grad]
    with per_record_gradients(model):
        with torch.enable_grad():
            _losses(model, company).sum().backward()  # type: ignore[no-untyped-call]  # torch
        gradients = take_gradients(trained, company.part.rows)
    # A zero is the same with either sign: it only adds to the sum of gradients.
    own = [(gradient[company.position] + 0.0).cpu().numpy().tobytes() for gradient in gradients]
    return b"".join([_cached(company), *own])


def _score_bits(model: AdaptedModel, company: _Company) -> bytes:
    """The record's loss, as it is computed where an adapter is scored on held-out records."""
    with torch.no_grad():
        return _losses(model, company)[company.position].cpu().numpy().tobytes()


def _losses(model: AdaptedModel, company: _Company) -> torch.Tensor:
    task = task_of(model.plan.task)
    return task.losses(model, task.batch(company.data, company.part))


def _cached(company: _Company) -> bytes:
    prefix, starts = company.data.prefix, company.data.tokens.starts
    if prefix is None:
        return b""
    position = company.position
    rows = (
        prefix.values[position]
        if prefix.pooled
        else prefix.values[starts[position] : starts[position + 1]]
    )
    return rows.tobytes()


def _require_equal(model: AdaptedModel, rows: int, length: int, bits: Bits, *, full: bool) -> bytes:
    """The record's bits among `rows` records, if they are the same as the first and as the last."""
    wanted = bits(model, _company(model, length, rows, 0, full=full))
    found = bits(model, _company(model, length, rows, rows - 1, full=full))
    _require(found == wanted, model, length)
    return wanted


def _require(equal: bool, model: AdaptedModel, length: int) -> None:
    if not equal:
        raise ModelError(
            "a record's bits depend on the records beside it",
            found=f"{type(model.base).__name__}, records of {length} tokens,"
            f" {torch.get_num_threads()} threads",
            accepted="the same bits in any company",
            remedy="use a base model whose layers treat each record by itself, one thread"
            " (threads in client.toml), or another precision (model.precision)",
        )
