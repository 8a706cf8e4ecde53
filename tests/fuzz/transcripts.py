"""Target: the verifier of transcripts, which anybody may send."""

from typing import Any

import msgspec
from fuzz.choices import Choices
from fuzz.mutate import encoded, mutated, tree_of
from fuzz.target import Place, Property, Target
from vectors.attempts import at_stage
from vectors.values import (
    EARLY_END,
    HEADER,
    IDENTITIES,
    OPERATOR,
    PLAN,
    RELEASE,
    ROSTER,
    signed_by_operator,
)

from umbel_common.adapters.vector import adapter_digest, initial_vector
from umbel_common.canonical import decode
from umbel_common.errors import RemoteProtocolError, VerificationError
from umbel_common.plans.statements import Release
from umbel_common.protocol.transcript import (
    GENESIS,
    AttemptAborted,
    JobFinished,
    JobStarted,
    RoundReleased,
    TranscriptEvent,
    append,
)
from umbel_common.protocol.verification import verify_transcript
from umbel_common.trust.identity import Signed

FIRST_ADAPTER = adapter_digest(PLAN.digest(), initial_vector(PLAN))
LAST_HEADER = msgspec.structs.replace(HEADER, attempt=2, adapter=FIRST_ADAPTER)


def honest_events() -> list[TranscriptEvent]:
    """A job that ends after one round, with an aborted attempt before it."""
    output = at_stage("end", LAST_HEADER).output
    first = msgspec.structs.replace(
        RELEASE,
        round=0,
        attempt=0,
        context=bytes(32),
        adapter=FIRST_ADAPTER,
        survivors=(),
        total_weight=0,
    )
    release = msgspec.structs.replace(RELEASE, attempt=2, context=LAST_HEADER.context())
    aborted = signed_by_operator(msgspec.structs.replace(LAST_HEADER, attempt=1))
    return [
        JobStarted(
            plan=signed_by_operator(PLAN),
            roster=ROSTER.digest(),
            release=signed_by_operator(first),
        ),
        AttemptAborted(header=aborted, check="too-few-vectors", refusals=(("site-c", "budget"),)),
        RoundReleased(
            header=signed_by_operator(LAST_HEADER),
            adverts=tuple(output["advertise"].values()),
            confirmations=tuple(output["confirm"].values()),
            release=signed_by_operator(release),
        ),
        JobFinished(
            release=RELEASE.adapter,
            delivered=tuple(IDENTITIES),
            early_end=signed_by_operator(EARLY_END),
        ),
    ]


def _transcripts(_: Place) -> Property:
    """What verifies starts from the signed plan, and each release in it is confirmed."""
    events = honest_events()
    trees = [tree_of(event) for event in events]
    assert len(verify_transcript(_chained(events), ROSTER).releases) == 2

    def prove(data: bytes) -> None:
        choices = Choices(data)
        if choices.below(3) == 0:
            tree = mutated([tree_of(entry) for entry in _chained(events)], choices)
            entries = decode(encoded(tree), tuple[Signed, ...])
        else:
            # A lying operator can sign anything, in a chain that fits.
            lies = decode(encoded(mutated(trees, choices)), list[TranscriptEvent])
            entries = tuple(_chained(lies))
        job = verify_transcript(entries, ROSTER)
        assert job.plan == PLAN or job.plan.federation
        for release in job.releases[1:]:
            _confirmed(release)

    return prove


def _chained(events: list[Any]) -> list[Signed]:
    head, entries = GENESIS, []
    for index, event in enumerate(events):
        head, signed = append(OPERATOR, index, head, event)
        entries.append(signed)
    return entries


def _confirmed(release: Release) -> None:
    """Two of the three sites ever signed one attempt, so no other can have been released."""
    assert release.context == LAST_HEADER.context()
    assert release.survivors == ("site-a", "site-b")


TRANSCRIPTS = (
    Target(
        "transcript: verifier",
        _transcripts,
        (RemoteProtocolError, VerificationError),
        share=60,
        inputs=8_000,
        guided=4_000,
    ),
)
