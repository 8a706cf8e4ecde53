"""The numbers that a plan may hold."""

from typing import Annotated, TypeAlias

import msgspec

# The bounds keep every product of these values in the range of float32. An overflow in one record's
# gradient would be a signal that no noise covers, and a denormal clip norm would not clip.
Positive = Annotated[float, msgspec.Meta(ge=1e-12, le=1e6)]
Scale = Annotated[float, msgspec.Meta(ge=1e-4, le=1e4)]
LearningRate = Annotated[float, msgspec.Meta(ge=1e-12, le=100)]
Fraction = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Delta = Annotated[float, msgspec.Meta(ge=1e-15, lt=1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]

Version1: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1)]
"""The version that a signed type's first form names, and no other number."""
Version2: TypeAlias = Annotated[int, msgspec.Meta(ge=2, le=2)]
