"""Tests that no value decides how a model computes: neither a token, nor a mask, nor an adapter.

This module is part of the core of the privacy guarantee. Never take an operation out of the list.

The test of bits compares made-up records in some companies. It cannot try them all, and a server
knows which ones it tries. A mixture of experts computes as many rows as tokens were sent to an
expert; a mask that is left out, or frequencies that follow the longest text so far, are chosen by a
branch. In such a model other records decide on the shape or the kernel of a record's computation,
while the test sees equal bits. All of that reads values, and reading shows: as an operation, or as
a method that copies values to Python without one. Inside an operation of another package it would
not show, so that such an operation is refused.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.layers import made_up_inputs
from umbel_client.models.inputs import TokenInputs
from umbel_common.errors import ModelError

_READING = {
    "_local_scalar_dense": "reads a number to decide what to do",
    "nonzero": "picks rows by their values",
    "nonzero_numpy": "picks rows by their values",
    "nonzero_static": "picks rows by their values",
    "masked_select": "picks rows by their values",
    "unique_dim": "counts values",
    "_unique2": "counts values",
    "bincount": "counts values",
    "histc": "counts values",
    "_grouped_mm": "sends rows to experts by their values",
    "_scaled_grouped_mm": "sends rows to experts by their values",
    "masked_scatter": "picks rows by their values",
    "masked_scatter_": "picks rows by their values",
    "_pack_padded_sequence": "packs rows by their lengths",
    "_nested_tensor_from_mask": "packs rows by their lengths",
    "_nested_tensor_from_mask_left_aligned": "packs rows by their lengths",
    "_to_sparse": "keeps as many numbers as are not zero",
    "_to_sparse_csr": "keeps as many numbers as are not zero",
    "_to_sparse_csc": "keeps as many numbers as are not zero",
    "_to_sparse_bsr": "keeps as many numbers as are not zero",
    "_to_sparse_bsc": "keeps as many numbers as are not zero",
    "_coalesce": "counts values",
    "equal": "reads numbers to decide what to do",
    "tolist": "reads numbers to decide what to do",
    "numpy": "reads numbers to decide what to do",
    "__array__": "reads numbers to decide what to do",
    "__dlpack__": "reads numbers to decide what to do",
    "apply_": "reads numbers to decide what to do",
    "map_": "reads numbers to decide what to do",
    "map2_": "reads numbers to decide what to do",
    "tensor_split": "divides rows by values",
}

_BY_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Torch's own marks of operations that read values, or whose shape follows from values."""

_INDEXING = (
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl",
    "_index_put_impl_",
    "_unsafe_index_put",
)
"""They may read values: only where they pick by a mask, whatever torch marks them with."""

_UNSEEN = frozenset({"tolist", "numpy", "__array__", "__dlpack__", "apply_", "map_", "map2_"})
"""Methods of tensors that read values without an operation."""

_OF_WEIGHTS = frozenset(
    f"bitsandbytes::{name}"
    for name in ("dequantize_4bit", "dequantize_blockwise", "gemm_4bit", "gemv_4bit")
)
"""Operations that a site's own quantisation needs. They turn weights back; the values that are
multiplied by them decide nothing."""


@torch.no_grad()
def blind_test(model: AdaptedModel) -> None:
    """Computes two made-up records, short ones and the longest, and looks at each operation.

    Raises:
        ModelError: an operation reads values.
    """
    short = TokenInputs(*made_up_inputs(model.base))
    length = model.plan.task.max_tokens
    ids = torch.arange(2 * length).reshape(2, length) % model.vocabulary
    found: set[str] = set()
    # Some of torch's own modules take other paths while methods are watched.
    with _Operations(found):
        model.logits(short)
    with _Methods(found), _Operations(found):
        for inputs in (short, TokenInputs(ids, torch.ones_like(ids))):
            model.logits(inputs)
    if found:
        raise ModelError(
            "what a base model computes of a record may depend on the records beside it",
            found=", ".join(
                f"{name} ({_READING.get(name, 'may read values, and nobody sees it')})"
                for name in sorted(found)
            ),
            accepted="an architecture in which no value decides on shapes or branches",
            remedy="use a base model without mixtures of experts, dynamic frequencies, or layers"
            " that torch itself does not compute",
        )


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    def __init__(self, found: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        # What another package computes inside its operation is not seen from here.
        if func.namespace != "aten" and f"{func.namespace}::{name}" not in _OF_WEIGHTS:
            self._found.add(f"{func.namespace}::{name}")
        if name in _INDEXING:
            if _by_mask(args[1]):
                self._found.add("masked_select")
        elif name in _READING or any(tag in func.tags for tag in _BY_VALUES):
            self._found.add(name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Sees what reads values without an operation: in memory of the CPU they are just there."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, given = getattr(func, "__name__", ""), kwargs or {}
        # It is made of other operations, which are told the numbers that it has read.
        splits = name == "tensor_split" and any(
            isinstance(value, torch.Tensor) for value in (*args[1:], *given.values())
        )
        if name in _UNSEEN or splits:
            self._found.add(name)
        return func(*args, **given)


def _by_mask(indices: Any) -> bool:
    return any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
        for index in indices
    )
