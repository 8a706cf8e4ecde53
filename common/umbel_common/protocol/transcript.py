"""The audit transcript: a hash chain of what happened in a job, each entry signed by the operator.

The law: an entry has digests, names, figures of public or noisy counts, and the sites' own signed
statements; never a sample, a vector or a secret. `Entry` is signed and hashed, and its events are
within it, so none gets, loses or renames a field or a tag. An event is appended and never changed.
No clock and no file.

An entry commits to all entries before it. So nothing can be removed, reordered or changed without
the operator's key, and with it only by signing a second history. Any site that kept a head of the
first history can show that there are two; each signed release names its round.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.canonical import Digest, Name, Value, decode, digest, encode
from umbel_common.errors import (
    IdentityError,
    RemoteProtocolError,
    VerificationError,
)
from umbel_common.plans.figures import GateResult
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import EarlyEnd, Release, RoundHeader
from umbel_common.secagg.messages import KeyAdvert, Survivors, SurvivorSignature
from umbel_common.trust.identity import Identity, Roster, Signed, open_signed, sign

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


class VerifiedJob(Value, frozen=True):
    """What a verified transcript proves."""

    plan: TrainingPlan
    releases: tuple[Release, ...]
    aborted_attempts: int
    delivered: tuple[str, ...]
    head: Digest
    held_back: tuple[int, ...] = ()
    """Rounds whose adapter the plan's release gate held back."""
    final_round: int | None = None
    """The round whose release ended the job; None: the job has not ended."""


def verify_transcript(entries: Sequence[Signed], roster: Roster) -> VerifiedJob:
    """Checks the chain, every signature, and that each release follows from what sites signed.

    For each released round: the header names the plan, the roster and the adapter of the release
    before; every advert is signed by its site for this attempt; survivors, at least as many as the
    plan's threshold, signed one and the same survivor set; the release names that set. Where the
    plan has a release gate, each round has its result, and a round that was held back releases the
    adapter before once more. The job ends with its plan's last round, or with a signed early end.

    Raises:
        VerificationError: an entry does not verify; the message says which and why.
    """
    head = GENESIS
    plan: TrainingPlan | None = None
    releases: list[Release] = []
    gates = _Gates()
    aborted = 0
    final_round: int | None = None
    delivered: tuple[str, ...] = ()
    for index, signed in enumerate(entries):
        try:
            entry = open_signed(signed, Entry, roster.operator)
            _require(entry.index == index, "its index is out of order")
            _require(entry.previous == head, "it does not follow the entry before")
            head = entry.digest()
            match entry.event:
                case JobStarted():
                    _require(index == 0, "a job starts once, at the beginning")
                    plan, first = _verify_start(entry.event, roster)
                    releases.append(first)
                case RoundReleased() if plan is not None:
                    former = releases[-1]
                    releases.append(_verify_release(entry.event, plan, roster, former))
                    gates.verify(entry.event.gate, plan, releases[-1], former)
                case AttemptAborted() if plan is not None:
                    header = open_signed(entry.event.header, RoundHeader, roster.operator)
                    _require(header.plan == plan.digest(), "its header names another plan")
                    aborted += 1
                case JobFinished() if plan is not None:
                    _require(index == len(entries) - 1, "something follows the end of the job")
                    final_round = _verify_end(entry.event, plan, roster, releases)
                    delivered = entry.event.delivered
                case _:
                    raise VerificationError("it comes before the start of the job")
        except (IdentityError, RemoteProtocolError, VerificationError) as error:
            raise VerificationError(
                f"entry {index} of the transcript does not verify: {error.message}"
            ) from None
    if plan is None:
        raise VerificationError("the transcript is empty")
    return VerifiedJob(
        plan=plan,
        releases=tuple(releases),
        aborted_attempts=aborted,
        delivered=delivered,
        head=head,
        held_back=tuple(gates.held_back),
        final_round=final_round,
    )


def _verify_start(event: JobStarted, roster: Roster) -> tuple[TrainingPlan, Release]:
    plan = open_signed(event.plan, TrainingPlan, roster.operator)
    release = open_signed(event.release, Release, roster.operator)
    _require(event.roster == roster.digest(), "it names another roster")
    _require(
        release.round == 0 and release.plan == plan.digest(), "release 0 belongs to another plan"
    )
    return plan, release


def _verify_release(
    event: RoundReleased, plan: TrainingPlan, roster: Roster, former: Release
) -> Release:
    header = open_signed(event.header, RoundHeader, roster.operator)
    release = open_signed(event.release, Release, roster.operator)
    context = header.context()
    _require(header.plan == plan.digest(), "its header names another plan")
    _require(header.roster == roster.digest(), "its header names another roster")
    _require(header.round == former.round + 1, "its round does not follow the release before")
    _require(header.adapter == former.adapter, "its round does not start from the release before")
    _require(
        (event.counts is None) == (plan.evaluation is None),
        "its counts are not what the plan asks for",
    )
    _require(
        (release.plan, release.round, release.attempt, release.context)
        == (header.plan, header.round, header.attempt, context),
        "its release does not belong to this attempt",
    )
    advertised = set()
    for advert in event.adverts:
        site = decode(advert.statement, KeyAdvert).site
        statement = open_signed(advert, KeyAdvert, roster.member(site).public_key)
        _require(statement.context == context, f"the keys of {site} belong to another attempt")
        advertised.add(site)
    _require(set(release.survivors) <= advertised, "a survivor never advertised keys")
    confirmed = set()
    for confirmation in event.confirmations:
        key = roster.member(confirmation.site).public_key
        survivors = open_signed(confirmation.signed, Survivors, key)
        _require(
            survivors == Survivors(context=context, sites=release.survivors),
            f"{confirmation.site} confirmed another survivor set",
        )
        confirmed.add(confirmation.site)
    _require(confirmed <= set(release.survivors), "a site that is no survivor confirmed")
    _require(
        len(confirmed) >= plan.aggregation.threshold,
        f"only {len(confirmed)} sites confirmed, the threshold is {plan.aggregation.threshold}",
    )
    return release


class _Gates:
    """The results of the release gate, checked round by round."""

    def __init__(self) -> None:
        self.held_back: list[int] = []
        self._found: GateResult | None = None

    def verify(
        self, gate: GateResult | None, plan: TrainingPlan, release: Release, former: Release
    ) -> None:
        if plan.release_gate is None or gate is None:
            _require(gate is None, "its plan has no release gate")
            _require(plan.release_gate is None, "it does not say what the release gate found")
            return
        _require(gate.bound == plan.release_gate.max_loss_increase, "its bound is not the plan's")
        found = self._found
        if found is not None:
            kept = found.after if found.passed() else found.before
            _require(gate.before == kept, "it compares with another loss than the round before had")
        if not gate.passed():
            _require(
                release.adapter == former.adapter,
                "a round that was held back does not keep the adapter before",
            )
            self.held_back.append(release.round)
        self._found = gate


def _verify_end(
    event: JobFinished, plan: TrainingPlan, roster: Roster, releases: Sequence[Release]
) -> int:
    """The round whose release ended the job."""
    early = event.early_end
    end = None if early is None else open_signed(early, EarlyEnd, roster.operator)
    number = final_round(plan, end)
    if number is None:
        raise VerificationError("its early end belongs to another plan")
    _require(number < len(releases), "the job ends before its last release")
    _require(event.release == releases[number].adapter, "the last release differs")
    return number


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise VerificationError(what)
