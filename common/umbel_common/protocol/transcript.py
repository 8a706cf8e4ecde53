"""The audit transcript: a hash chain of what happened in a job, each entry signed by the operator.

The law: an entry has digests, names, figures of public or noisy counts, and the sites' own signed
statements; never a sample, a vector or a secret. `Entry` is signed and hashed, and its events are
within it, so none gets, loses or renames a field or a tag. An event is appended and never changed.
No clock and no file.

An entry commits to all entries before it. So nothing can be removed, reordered or changed without
the operator's key, and with it only by signing a second history. Any site that kept a head of the
first history can show that there are two; each signed release names its round.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.canonical import Digest, Name, Value, digest, encode
from umbel_common.plans.figures import GateResult
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import EarlyEnd
from umbel_common.secagg.messages import SurvivorSignature
from umbel_common.trust.identity import Identity, Signed, sign

GENESIS = bytes(32)


class JobStarted(Value, frozen=True, tag_field="event", tag="job-started"):
    """The start of a job: plan and roster, to which everything later refers, and release 0."""

    plan: Signed
    roster: Digest
    release: Signed


class RoundReleased(Value, frozen=True, tag_field="event", tag="round-released"):
    """An attempt that gave a sum, with the sites' own signatures."""

    header: Signed
    adverts: tuple[Signed, ...]
    confirmations: tuple[SurvivorSignature, ...]
    release: Signed
    counts: SiteCounts | None = None
    """Counts of a plan with an evaluation: the survivors' sum, with each one's noise, for the
    adapter that the round started from on the records that they hold out."""
    gate: GateResult | None = None
    """Result of the plan's release gate; for a round that was held back, the release names the
    adapter of the release before."""


class AttemptAborted(Value, frozen=True, tag_field="event", tag="attempt-aborted"):
    """An attempt that released nothing, with the check that ended it."""

    header: Signed
    check: str
    refusals: tuple[tuple[Name, str], ...]
    """Sites that refused, each with the code of its reason."""


class JobFinished(Value, frozen=True, tag_field="event", tag="job-finished"):
    """The end of a job: its last release, and the sites that it reached."""

    release: Digest
    delivered: tuple[Name, ...]
    early_end: Signed | None = None
    """The signed `EarlyEnd`; None: all rounds of the plan were released."""


TranscriptEvent: TypeAlias = JobStarted | RoundReleased | AttemptAborted | JobFinished


class Entry(Value, frozen=True):
    """One link of the chain; its hash is the digest of its encoding."""

    index: Annotated[int, msgspec.Meta(ge=0)]
    previous: Digest
    event: TranscriptEvent
    version: Literal[1] = 1

    def digest(self) -> bytes:
        """The entry's hash, which the next entry names as `previous`."""
        return digest("Entry", encode(self))


def append(
    operator: Identity, index: int, head: bytes, event: TranscriptEvent
) -> tuple[bytes, Signed]:
    """The new head, and the signed entry that follows `head` (`GENESIS` at index 0)."""
    entry = Entry(index=index, previous=head, event=event)
    return entry.digest(), sign(operator, entry)


def final_round(plan: TrainingPlan, end: EarlyEnd | None) -> int | None:
    """The round whose release ends a job; None if the early end belongs to another plan."""
    if end is None:
        return plan.training.rounds
    return end.round if end.plan == plan.digest() else None
