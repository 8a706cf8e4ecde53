"""The adapter from which a job starts, its release 0.

A start is public, and follows from what each site has: the plan, its base model and what was
released before. So a site computes it by itself, and an operator cannot plant one.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_common.canonical import Digest, Value
from umbel_common.plans.ranges import Positive, Scale

StartName = Literal["seed", "label-names", "released"]
LabelText = Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


class SeedStart(Value, frozen=True, tag_field="start", tag="seed"):
    """The initial adapter that follows from the plan's public seed alone."""


class LabelNamesStart(Value, frozen=True, tag_field="start", tag="label-names"):
    """A mean-pool head that starts at the embeddings of its labels' names.

    The rest of the adapter is as with `SeedStart`. Machines compute embeddings in different orders,
    so a site compares what it computed with the tensor within a tolerance.
    """

    tensor: Digest
    """Digest of the adapter's vector (`umbel_common.adapters.vector.start_digest`)."""
    names: tuple[LabelText, ...]
    """Text that is embedded for each label, in the order of the plan's labels."""
    scale: Scale
    """Euclidean norm of each label's row of the head."""
    tolerance: Annotated[float, msgspec.Meta(gt=0, le=0.1)]
    """Largest distance between a row and the one that a site computes, divided by `scale`."""


class ReleasedStart(Value, frozen=True, tag_field="start", tag="released"):
    """An adapter that an earlier job of the federation released."""

    adapter: Digest
    """Digest of the adapter under the earlier plan, as its release names it
    (`umbel_common.adapters.vector.adapter_digest`)."""
    plan: Digest
    """Digest of the earlier job's plan."""
    round: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    """The round that released it."""
    largest_norm: Positive
    """Bound of the adapter's Euclidean norm."""


Start: TypeAlias = SeedStart | LabelNamesStart | ReleasedStart
"""The starts that a plan can name."""


def name_of(start: Start) -> StartName:
    """What a draft and a policy call a kind of start."""
    match start:
        case SeedStart():
            return "seed"
        case LabelNamesStart():
            return "label-names"
        case ReleasedStart():
            return "released"
