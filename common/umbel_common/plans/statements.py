"""What the operator signs about a job: the header of an attempt, and the release it leads to.

The law: these types are signed and hashed. None ever gets, loses or renames a field, and none is
renamed itself: its label is its name, and every context, mask and signature hangs on it. A next
version is a class beside the old one, with a name of its own. What else a request must say goes
into `protocol.wire`. `tests/vectors` holds every byte.
"""

from typing import Annotated, Any

import msgspec

from umbel_common.canonical import Digest, Name, Value, digest, encode
from umbel_common.plans.ranges import Version1, Version2
from umbel_common.trust.identity import label_of

RoundNumber = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
AttemptNumber = Annotated[int, msgspec.Meta(ge=1, le=1_000)]
Cohort = Annotated[tuple[Name, ...], msgspec.Meta(min_length=2, max_length=100)]
"""Names of sites, sorted, each once."""


def check_sorted(names: tuple[str, ...]) -> None:
    """Refuses names that are not sorted or not unique, so that a set has one encoding.

    Raises:
        ValueError: they are not; `__post_init__` of a value may let it out.
    """
    if list(names) != sorted(set(names)):
        raise ValueError("site names must be unique and sorted")


class RoundHeader(Value, frozen=True):
    """One attempt at one round: what every mask, share and signature of it is bound to."""

    federation: Name
    job: Name
    round: RoundNumber
    attempt: AttemptNumber
    plan: Digest
    roster: Digest
    adapter: Digest
    """Digest of the global adapter that training starts from."""
    cohort: Cohort
    version: Version1 = 1

    def __post_init__(self) -> None:
        check_sorted(self.cohort)

    def context(self) -> bytes:
        """The 32-byte `ctx` that goes into every key derivation of the attempt.

        Two sites that were shown different headers derive masks that do not cancel, so an
        inconsistent server gets noise (against Pasquini et al. 2022, arXiv 2111.07380).
        """
        return digest(label_of(type(self)), encode(self))


class RoundHeader2(RoundHeader, frozen=True, kw_only=True):
    """An attempt under a plan of version 2: sites that are shown two histories find out."""

    transcript: Digest
    """Hash of the last entry of the operator's transcript before this attempt."""
    version: Version2 = 2


def chained(header: RoundHeader, transcript: bytes) -> RoundHeader2:
    """The header in version 2.

    Args:
        transcript: hash of the last entry of the transcript, 32 bytes.
    """
    fields: dict[str, Any] = msgspec.structs.asdict(header)
    fields.update(version=2, transcript=transcript)
    return RoundHeader2(**fields)


HEADER_VERSIONS = (RoundHeader, RoundHeader2)
"""Every version of a header that is read, for `open_signed` and `decode_canonical`."""


class Release(Value, frozen=True):
    """One global adapter: the initial one (round 0), or the outcome of a round."""

    federation: Name
    job: Name
    plan: Digest
    round: Annotated[int, msgspec.Meta(ge=0, le=10_000)]
    attempt: Annotated[int, msgspec.Meta(ge=0, le=1_000)]
    context: Digest
    """`RoundHeader.context` of the attempt that gave the adapter; zeros for round 0."""
    adapter: Digest
    """Digest of the adapter; where the release gate held the round back, of the one before."""
    survivors: Annotated[tuple[Name, ...], msgspec.Meta(max_length=100)]
    """The sites whose deltas are in the sum."""
    total_weight: Annotated[int, msgspec.Meta(ge=0)]
    version: Version1 = 1

    def __post_init__(self) -> None:
        check_sorted(self.survivors)


class Release2(Release, frozen=True, kw_only=True):
    """A release under a plan of version 2: anybody who has the sums can compute it again."""

    sum: Digest
    """Digest of the sum of the attempt (`umbel_common.secagg.encoding.sum_digest`); zeros for
    round 0."""
    version: Version2 = 2


def with_sum(release: Release, sum_digest: bytes) -> Release2:
    """The release in version 2.

    Args:
        sum_digest: digest of the sum of its attempt, 32 bytes; zeros for round 0.
    """
    fields: dict[str, Any] = msgspec.structs.asdict(release)
    fields.update(version=2, sum=sum_digest)
    return Release2(**fields)


RELEASE_VERSIONS = (Release, Release2)
"""Every version of a release that is read, for `open_signed` and `decode_canonical`."""


class EarlyEnd(Value, frozen=True):
    """The operator ends a job before the last round of its plan."""

    federation: Name
    job: Name
    plan: Digest
    round: Annotated[int, msgspec.Meta(ge=0, le=10_000)]
    """The round whose release is the job's last one; it need not be the latest round."""
    version: Version1 = 1
