"""The `[start]` of a draft and of a scenario: what people write, and a plan's start is made of.

The plan has digests in place of the adapters that these name (`umbel_common.plans.start`).
"""

from typing import Annotated, TypeAlias

import msgspec

from umbel_common.canonical import Name, Value
from umbel_common.plans.ranges import Positive, Scale
from umbel_common.plans.start import LabelText

TOLERANCE = 0.02
"""Rows of a head in bfloat16 lie within this of those in float32; see docs/adr/0032."""


class DraftedSeed(Value, frozen=True, tag_field="start", tag="seed"):
    """`start = "seed"`: the adapter follows from the public seed, as without this table."""


class DraftedLabelNames(Value, frozen=True, tag_field="start", tag="label-names"):
    """`start = "label-names"`: the head starts at the embeddings of the labels' names."""

    names: tuple[LabelText, ...] | str | None = None
    """Text that is embedded for each label: a list in the order of the labels; or a file (.jsonl,
    .csv or .parquet) with the columns `label` and `text`, whose relative path starts at the draft's
    folder. Absent: the labels themselves."""
    scale: Scale = 2.0
    """Euclidean norm of each label's row of the head."""
    tolerance: Annotated[float, msgspec.Meta(gt=0, le=0.1)] = TOLERANCE
    """Largest distance between a row and the one that a site computes, divided by `scale`."""


class DraftedReleased(Value, frozen=True, tag_field="start", tag="released"):
    """`start = "released"`: the job starts from an adapter that an earlier job released."""

    job: Name
    """The earlier job, of this operator."""
    round: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    """The round that released the adapter; absent: the one that the job ended with. A site that was
    in the earlier job has no other."""
    largest_norm: Positive | None = None
    """Bound of the adapter's Euclidean norm, for sites that do not know the adapter; absent: its
    norm, rounded up."""


DraftedStart: TypeAlias = DraftedSeed | DraftedLabelNames | DraftedReleased
