"""Attention masks that are made whatever they say.

This module is part of the core of the privacy guarantee. Never let the values of a mask decide how
attention is computed.

Transformers leaves a mask out where no row of a batch has padding. Attention is then computed by
other kernels, whose sums have another order. So one shorter record among records that fill their
length would change the bits of all the others.
"""

from functools import partial
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

_SKIPS = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def make_every_mask() -> None:
    """Lets Transformers make each mask, in the whole process."""
    for name, make in {"sdpa": sdpa_mask, "eager": eager_mask}.items():
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(_made, make))


def _made(make: Any, **given: Any) -> Any:
    return make(**{**given, **_SKIPS})
