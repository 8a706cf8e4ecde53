"""Tests that a record's results have the same bits in any company, in any shape that is used, and
on each copy of the model.

This module is part of the core of the privacy guarantee. Never test on real records, never allow a
difference, however small, and never leave out a path that private results take.

One bit is enough for an attack: a server can make an adapter that turns the last bit of a hidden
state into a whole gradient. If that bit followed from the other records of a physical batch, one
record more would change the gradients of its neighbours, and the sum would move by many clip norms.
The order of floating-point sums follows from the shapes of tensors and from the kernels that the
machine chooses for them, so it is tested on the machine and the model that train. Where the model
has copies, the other records decide which of them computes a record, so all of them are compared.

Two kernels may differ in bits and agree on some record: rounding to bfloat16 hides most of a
difference. So several records are compared in each shape, and new ones each time: nobody can make
an adapter for which these records agree and others do not.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from umbel_client.data.tokens import Ints, Tokens
from umbel_client.dpsgd.gradient_sum import take_gradients
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.architecture import padding_of
from umbel_client.tasks.frozen_cache import frozen_prefix, ignore_progress
from umbel_client.tasks.physical_batches import in_threads
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import PADDED_LENGTHS, BatchLimit, Part
from umbel_client.tasks.task import made_up_labels, task_of
from umbel_common.canonical import Entropy
from umbel_common.errors import ModelError

_AT_THE_START, _IN_A_ROUND = 8, 4
"""Number of records whose bits are compared in each shape. Those of all rounds add up."""

_logger = logging.getLogger("umbel.trainer")


def prove_shapes(model: AdaptedModel, limit: BatchLimit, *, entropy: Entropy) -> None:
    """Tests every shape that a job may compute in, and keeps those in which bits are equal.

    A number of rows that gives other bits than the largest one is not used: records are then
    computed in more rows than they need. That no row has padding is tested in the largest number
    alone: masks are made whatever they say, in any number of rows.

    Args:
        model: with the parameters of a round selected.
        limit: the numbers of rows; those that do not pass are taken out.
        entropy: the source of made-up records.

    Raises:
        ModelError: a record's bits depend on the records beside it, on its place among them, or on
            the copy of the model.
    """
    kept = set(limit.choices)
    for length, bits in product(lengths_up_to(model.plan.task.max_tokens), _paths(model)):
        one = partial(_Trial, model, length, limit.records, bits, _AT_THE_START, entropy)
        one(full=True).in_most_rows()
        kept &= one(full=False).equal_rows(kept)
    limit.keep(kept)


def check_round(model: AdaptedModel, limit: BatchLimit, *, entropy: Entropy) -> None:
    """Tests the adapter that a round starts from, at the shortest and the greatest length.

    That no row has padding is tested at the shortest length only: it is the same code for each
    adapter, and `prove_shapes` tests it at every length. A number of rows that gives other bits
    under this adapter is not used any more.

    Args:
        model: with the round's adapter, and its parameters selected.
        limit: the numbers of rows that were kept so far; those that do not pass are taken out.
        entropy: the source of made-up records.

    Raises:
        ModelError: a record's bits depend on the records beside it, on its place among them, or on
            the copy of the model.
    """
    lengths = lengths_up_to(model.plan.task.max_tokens)
    kept = set(limit.choices)
    shapes = dict.fromkeys([(lengths[0], False), (lengths[0], True), (lengths[-1], False)])
    for (length, full), bits in product(shapes, _paths(model)):
        trial = _Trial(model, length, limit.records, bits, _IN_A_ROUND, entropy, full=full)
        kept &= trial.equal_rows(kept)
    dropped = sorted(set(limit.choices) - kept)
    if dropped:
        _logger.info("records are not computed in %s rows any more: other bits", dropped)
        limit.keep(kept)


@dataclass(frozen=True)
class _Company:
    """Made-up records among others, in one shape."""

    data: PreparedData
    part: Part
    places: Ints
    """The rows of the records that are compared."""


Bits = Callable[[AdaptedModel, _Company], list[bytes]]
"""Digests of what a site computes of each record that is compared."""


class _Trial:
    """Some made-up records of one length, to be computed in several companies and shapes."""

    def __init__(
        self,
        model: AdaptedModel,
        length: int,
        most: int,
        bits: Bits,
        count: int,
        entropy: Entropy,
        *,
        full: bool,
    ) -> None:
        """Args:
        most: the largest number of rows.
        count: number of records that are compared.
        full: whether the records fill their length: some code takes another path where no row has
            padding.
        """
        self._model, self._length, self._most, self._bits = model, length, most, bits
        self._full = full
        self._random = np.random.default_rng(int.from_bytes(entropy(16), "big"))
        own = length if full else length - length // 8
        self._records = [self._tokens(own) for _ in range(count)]

    def in_most_rows(self) -> list[bytes]:
        """The records' bits in the largest number of rows.

        Raises:
            ModelError: they are not the same beside others, in other places, and on each copy of
                the model.
        """
        # Each has others beside it when it is computed again; where all fill their length, others
        # that do not.
        few = self._most < len(self._records) and not self._full
        at_once = self._most if few else max(1, self._most // 2)
        wanted, *others = self._in_rows(self._most, at_once, moved=False)
        if any(other != wanted for other in others):
            raise ModelError(
                "a record's bits depend on the device that computes it",
                field="model.split",
                found=", ".join(str(copy.device) for copy in self._model.copies)
                + f", records of {self._length} tokens",
                accepted="the same bits on each device",
                remedy="use GPUs of one kind, one of them alone (model.device), or"
                ' split = "layers"',
            )
        if self._most > 1 and not self._has(wanted, self._most, at_once, moved=True):
            raise ModelError(
                "a record's bits depend on the records beside it",
                found=f"{type(self._model.base).__name__}, records of {self._length} tokens,"
                f" {torch.get_num_threads()} threads",
                accepted="the same bits in any company",
                remedy="use a base model whose layers treat each record by itself, one thread"
                " (threads in client.toml), or another precision (model.precision)",
            )
        return wanted

    def equal_rows(self, choices: set[int]) -> set[int]:
        """The numbers of rows that give the records the bits of the largest number.

        Raises:
            ModelError: see `in_most_rows`.
        """
        wanted = self.in_most_rows()
        smaller = sorted(choices - {self._most})
        return {
            self._most,
            *(rows for rows in smaller if self._has(wanted, rows, rows, moved=False)),
        }

    def _has(self, wanted: list[bytes], rows: int, at_once: int, *, moved: bool) -> bool:
        """Whether each copy gives the records these bits; see `_in_rows`."""
        return all(found == wanted for found in self._in_rows(rows, at_once, moved=moved))

    def _in_rows(self, rows: int, at_once: int, *, moved: bool) -> list[list[bytes]]:
        """The records' bits on each copy, computed with at most `at_once` of them and new others.

        The copies compute at the same time, as in a step.

        Args:
            moved: whether each record is in another row, beside others; these have padding then.
        """
        count = len(self._records)
        arranged = _moved(rows, count, at_once) if moved else _arranged(rows, count, at_once)
        found: list[dict[int, bytes]] = [{} for _ in self._model.copies]
        for group, places in arranged:
            records = [self._records[index] for index in group]
            company = self._company(rows, records, places, self._full and not moved)
            every = _on_each_copy(self._bits, self._model, company)
            for own, bits in zip(found, every, strict=True):
                own |= zip(group, bits, strict=True)
        return [[own[index] for index in range(count)] for own in found]

    def _company(
        self, rows: int, records: Sequence[npt.NDArray[np.int32]], places: Ints, whole: bool
    ) -> _Company:
        """Records in their places among others, which fill their length or not."""
        length = self._length
        sizes = self._random.integers(max(1, length // 2), length + 1, rows)
        ids = [self._tokens(length if whole else size) for size in sizes]
        for record, place in zip(records, places, strict=True):
            ids[place] = record
        return _company_of(self._model, ids, length, rows, self._most, places)

    def _tokens(self, size: int) -> npt.NDArray[np.int32]:
        return self._random.integers(0, self._model.vocabulary, size, dtype=np.int32)


_Arranged = list[tuple[list[int], Ints]]
"""Records that are computed at once, by their numbers, and the row of each."""


def _arranged(
    rows: int, count: int, at_once: int, turned: int = 0, *, backwards: bool = False
) -> _Arranged:
    """Records in their order, at most `at_once` of them together, as far apart as there are rows.

    Args:
        turned: which record comes first.
        backwards: whether rows are counted from the end.
    """
    order = [*range(turned, count), *range(turned)]
    arranged = []
    for start in range(0, count, at_once):
        group = order[start : start + at_once]
        places = np.linspace(0, rows - 1, len(group)).astype(np.int64)
        arranged.append((group, rows - 1 - places if backwards else places))
    return arranged


def _moved(rows: int, count: int, at_once: int) -> _Arranged:
    """The first arrangement in which each record is in another row than in `_arranged`.

    To turn the order and to count from the end may cancel each other out: of two records at once,
    each would come back to its own row.
    """
    former = _rows_of(_arranged(rows, count, at_once))
    return next(
        arranged
        for turned in (min(at_once, count) // 2, *range(1, count))
        for backwards in (True, False)
        for arranged in [_arranged(rows, count, at_once, turned, backwards=backwards)]
        if not former & _rows_of(arranged)
    )


def _rows_of(arranged: _Arranged) -> set[tuple[int, int]]:
    return {
        (index, int(place))
        for group, places in arranged
        for index, place in zip(group, places, strict=True)
    }


def _company_of(
    model: AdaptedModel,
    ids: Sequence[npt.NDArray[np.int32]],
    length: int,
    rows: int,
    most: int,
    places: Ints,
) -> _Company:
    """Args:
    most: the largest number of rows, in which frozen layers are computed (`prepare`).
    """
    starts = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    tokens = Tokens(np.concatenate(ids), starts, padding_of(model.base))
    labels = made_up_labels(model.plan.task, tokens)
    if len(labels) == rows:
        labels[places] = 0
    every = np.arange(rows)
    prefix = frozen_prefix(model, tokens, [Part(every, length, most)], None, ignore_progress)
    return _Company(PreparedData(tokens, labels, prefix), Part(every, length, rows), places)


def _paths(model: AdaptedModel) -> tuple[Bits, ...]:
    """What a site computes of its records under the model's plan."""
    scored = model.plan.evaluation is not None
    return (_gradient_bits, _score_bits) if scored else (_gradient_bits,)


def lengths_up_to(longest: int) -> list[int]:
    """Every length that a record of at most `longest` tokens may be padded to, in rising order."""
    return [*PADDED_LENGTHS[longest > PADDED_LENGTHS].tolist(), longest]


def made_up_gradients(model: AdaptedModel, length: int, rows: int) -> None:
    """Computes the gradients of as many made-up records of `length` tokens, and drops them.

    Each copy of the model does so, all at the same time.

    Args:
        model: with the parameters of a round selected.
    """
    random = np.random.default_rng(length)
    ids = [random.integers(0, model.vocabulary, length, dtype=np.int32) for _ in range(rows)]
    company = _company_of(model, ids, length, rows, rows, np.arange(1))
    _on_each_copy(_gradient_bits, model, company)


def _on_each_copy(bits: Bits, model: AdaptedModel, company: _Company) -> list[list[bytes]]:
    return in_threads([partial(bits, copy, company) for copy in model.copies])


def _gradient_bits(model: AdaptedModel, company: _Company) -> list[bytes]:
    """The records' cached values and their gradients."""
    trained = [parameter for parameter in model.adapter.values() if parameter.requires_grad]
    with per_record_gradients(model):
        with torch.enable_grad():
            _losses(model, company).sum().backward()  # type: ignore[no-untyped-call]  # torch
        gradients = take_gradients(trained, company.part.rows)
    found = []
    for place in company.places:
        own = hashlib.sha256(_cached(company, place))
        for gradient in gradients:
            # A zero is the same with either sign: it only adds to the sum of gradients.
            own.update((gradient[place] + 0.0).cpu().numpy().data)
        found.append(own.digest())
    return found


def _score_bits(model: AdaptedModel, company: _Company) -> list[bytes]:
    """The records' losses, as they are computed where an adapter is scored on held-out records."""
    with torch.no_grad():
        losses = _losses(model, company).cpu().numpy()
    return [losses[place].tobytes() for place in company.places]


def _losses(model: AdaptedModel, company: _Company) -> torch.Tensor:
    task = task_of(model.plan.task)
    return task.losses(model, task.batch(company.data, company.part))


def _cached(company: _Company, place: int) -> bytes:
    prefix, starts = company.data.prefix, company.data.tokens.starts
    if prefix is None:
        return b""
    own = (
        prefix.values[place] if prefix.pooled else prefix.values[starts[place] : starts[place + 1]]
    )
    return own.tobytes()
