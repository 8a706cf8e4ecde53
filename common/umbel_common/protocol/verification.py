"""What a transcript proves: every signature, and every figure that follows from the plan.

The law: a transcript is believed only as far as this module recomputes it. A field of an event, a
header or a release is compared with the plan, the roster and the entries before it; what follows
from none of them (counts, losses, the sites that were reached) is the operator's signed word, held
to the range that an honest one has.
"""

import math
from collections.abc import Collection, Sequence

from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.adapters.start import require_start
from umbel_common.adapters.vector import Vector, adapter_digest, initial_vector
from umbel_common.canonical import Digest, Value, decode
from umbel_common.errors import IdentityError, PlanError, RemoteProtocolError, VerificationError
from umbel_common.plans.check import check_plan
from umbel_common.plans.figures import GateResult, Loss
from umbel_common.plans.plan import (
    PLAN_VERSIONS,
    DistributedPrivacy,
    TrainingPlan,
    TrainingPlan2,
)
from umbel_common.plans.start import LabelNamesStart, ReleasedStart, SeedStart
from umbel_common.plans.statements import (
    HEADER_VERSIONS,
    RELEASE_VERSIONS,
    EarlyEnd,
    Release,
    RoundHeader,
    RoundHeader2,
    with_sum,
)
from umbel_common.protocol.recomputation import Adapters, Recomputation, Sums, require_that
from umbel_common.protocol.transcript import (
    GENESIS,
    AttemptAborted,
    Entry,
    JobFinished,
    JobStarted,
    RoundReleased,
    final_round,
)
from umbel_common.secagg.messages import KeyAdvert, Survivors
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Roster, Signed, open_signed

_ROUNDING = 1e-6
"""Relative rounding of a count in float32."""


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
    untold_attempts: int = 0
    """Attempt numbers that were used up, and are in no entry: the server was killed in these
    attempts, or its operator does not tell how they ended."""
    believed: tuple[str, ...] = ()
    """What the start of the job rests on beside this: a verifier has no base model."""
    not_recomputed: tuple[int, ...] = ()
    """Rounds whose adapter and counts are the operator's word: their sum, or that of a round before
    them, was not at hand."""

    @property
    def last(self) -> Release:
        """The release that the job ended with; of a job that has not ended, the latest one."""
        return self.releases[-1 if self.final_round is None else self.final_round]


def verify_transcript(
    entries: Sequence[Signed],
    roster: Roster,
    sums: Sums | None = None,
    adapters: Adapters | None = None,
    start: Vector | None = None,
) -> VerifiedJob:
    """Checks the chain, every signature, and that each release follows from what sites signed.

    Release 0 follows from the plan's public seed; or it is the tensor that the plan names, with the
    norms that it says, and the rest from the seed. For each attempt: the header names the plan, the
    roster, the next round of the plan and the adapter of the release before; its cohort is of the
    roster; its number is larger than those of the round before it; in distributed mode, the job has
    no more attempts than the plan says, told or not. For each released round: no two survivor sets
    of its cohort can both reach the threshold; every advert is signed by its site for this attempt;
    survivors, at least as many as the plan's threshold, signed one and the same survivor set; the
    release names that set and its weight. Counts and losses are finite and in their range. Where
    the plan has a release gate, each round has its result, and a round that was held back releases
    the adapter before once more. The job ends with its plan's last round, or with a signed early
    end.

    Where the plan is of version 2 and the sums are at hand, each adapter follows from them: to the
    bit, or with the method fedsvd within `umbel_common.adapters.fedsvd.TOLERANCE`.

    Args:
        sums: None: no adapter is recomputed.
        adapters: asked with the method fedsvd alone, whose next round starts from the bits that
            were released.
        start: the tensor that the plan names as its start, float32[plan.lora.size]; None where it
            is not at hand, or the plan names none.

    Raises:
        VerificationError: an entry does not verify; the message says which and why.
    """
    head = GENESIS
    job: _Job | None = None
    for index, signed in enumerate(entries):
        try:
            entry = open_signed(signed, Entry, roster.operator)
            require_that(entry.index == index, "its index is out of order")
            require_that(entry.previous == head, "it does not follow the entry before")
            before, head = head, entry.digest()
            match entry.event:
                case JobStarted():
                    require_that(index == 0, "a job starts once, at the beginning")
                    job = _Job(entry.event, roster, sums, adapters, start)
                case RoundReleased() if job is not None:
                    job.release(entry.event, before)
                case AttemptAborted() if job is not None:
                    job.abort(entry.event, before)
                case JobFinished() if job is not None:
                    require_that(index == len(entries) - 1, "something follows the end of the job")
                    job.finish(entry.event)
                case _:
                    raise VerificationError("it comes before the start of the job")
        except (IdentityError, PlanError, RemoteProtocolError, VerificationError) as error:
            raise VerificationError(
                f"entry {index} of the transcript does not verify: {error.message}"
            ) from None
    if job is None:
        raise VerificationError("the transcript is empty")
    return job.verified(head)


class _Job:
    """A job as far as its entries have been read."""

    def __init__(
        self,
        event: JobStarted,
        roster: Roster,
        sums: Sums | None,
        adapters: Adapters | None,
        start: Vector | None,
    ) -> None:
        self._roster = roster
        self._plan = plan = open_signed(event.plan, PLAN_VERSIONS, roster.operator)
        check_plan(plan)
        require_that(plan.federation == roster.federation, "its plan is of another federation")
        require_that(event.roster == roster.digest(), "it names another roster")
        release = open_signed(event.release, RELEASE_VERSIONS, roster.operator)
        require_that(
            release.round == 0 and release.plan == plan.digest(),
            "release 0 belongs to another plan",
        )
        self._believed = _believed(plan, start)
        if isinstance(plan.start, SeedStart):
            start = initial_vector(plan)
        elif start is not None:
            require_start(plan, start)
        first = Release(
            federation=plan.federation,
            job=plan.job,
            plan=plan.digest(),
            round=0,
            attempt=0,
            context=bytes(32),
            adapter=release.adapter if start is None else adapter_digest(plan.digest(), start),
            survivors=(),
            total_weight=0,
        )
        if isinstance(plan, TrainingPlan2):
            first = with_sum(first, bytes(32))
        source = "public seed" if isinstance(plan.start, SeedStart) else "start"
        require_that(release == first, f"release 0 does not follow from the plan's {source}")
        self._releases = [release]
        self._attempt = 0
        """Number of the last attempt at the round after the latest release."""
        self._aborted = 0
        self._untold = 0
        self._gates = _Gates(plan)
        self._recomputation = Recomputation(
            plan, None if start is None else start.copy(), sums, adapters
        )
        self._final_round: int | None = None
        self._delivered: tuple[str, ...] = ()

    def release(self, event: RoundReleased, before: bytes) -> None:
        """An attempt that gave a sum.

        Args:
            before: hash of the entry before, 32 bytes.
        """
        former = self._releases[-1]
        header = self._next_attempt(event.header, before)
        # What every site demands of a cohort, whatever its policy adds. An attempt that sites
        # refused for it was aborted, and says nothing.
        rules = Rules(threshold=self._plan.aggregation.threshold, colluding=0, minimum_cohort=1)
        rules.check_cohort(header.cohort, header.cohort[0])
        release = open_signed(event.release, RELEASE_VERSIONS, self._roster.operator)
        context = header.context()
        require_that(
            (event.counts is None) == (self._plan.evaluation is None),
            "its counts are not what the plan asks for",
        )
        require_that(
            (release.federation, release.job, release.plan, release.version)
            == (header.federation, header.job, header.plan, header.version)
            and (release.round, release.attempt, release.context)
            == (header.round, header.attempt, context),
            "its release does not belong to this attempt",
        )
        cohort, survivors = set(header.cohort), set(release.survivors)
        advertised = set()
        for advert in event.adverts:
            site = decode(advert.statement, KeyAdvert).site
            statement = open_signed(advert, KeyAdvert, self._roster.member(site).public_key)
            require_that(
                statement.context == context, f"the keys of {site} belong to another attempt"
            )
            require_that(site in cohort, f"{site} advertised keys and is not in the cohort")
            require_that(site not in advertised, f"{site} advertised keys twice")
            advertised.add(site)
        require_that(survivors <= advertised, "a survivor never advertised keys")
        confirmed = set()
        for confirmation in event.confirmations:
            key = self._roster.member(confirmation.site).public_key
            signed = open_signed(confirmation.signed, Survivors, key)
            require_that(
                signed == Survivors(context=context, sites=release.survivors),
                f"{confirmation.site} confirmed another survivor set",
            )
            confirmed.add(confirmation.site)
        require_that(confirmed <= survivors, "a site that is no survivor confirmed")
        threshold = self._plan.aggregation.threshold
        require_that(
            len(confirmed) >= threshold,
            f"only {len(confirmed)} sites confirmed, the threshold is {threshold}",
        )
        least = self._plan.least_survivors
        require_that(
            len(survivors) >= least,
            f"its sum has {len(survivors)} sites, and its plan asks for {least}",
        )
        self._check_weight(release)
        if event.counts is not None:
            self._check_counts(event.counts, len(survivors))
        self._gates.verify(event.gate, release, former)
        held_back = event.gate is not None and not event.gate.passed()
        self._recomputation.verify(release, len(cohort), event.counts, held_back=held_back)
        self._releases.append(release)
        self._attempt = 0

    def abort(self, event: AttemptAborted, before: bytes) -> None:
        """An attempt that gave nothing.

        Args:
            before: hash of the entry before, 32 bytes.
        """
        header = self._next_attempt(event.header, before)
        refusing = [site for site, _ in event.refusals]
        require_that(_distinct_of(refusing, header.cohort), "a site that was not asked refused")
        self._aborted += 1

    def finish(self, event: JobFinished) -> None:
        """The end of the job."""
        early, plan = event.early_end, self._plan
        end = None if early is None else open_signed(early, EarlyEnd, self._roster.operator)
        number = final_round(plan, end)
        if number is None:
            raise VerificationError("its early end belongs to another plan")
        if end is not None:
            require_that(
                (end.federation, end.job) == (plan.federation, plan.job),
                "its early end belongs to another job",
            )
        require_that(number < len(self._releases), "the job ends before its last release")
        require_that(event.release == self._releases[number].adapter, "the last release differs")
        members = [member.name for member in self._roster.members]
        require_that(_distinct_of(event.delivered, members), "it was delivered to a stranger")
        self._final_round, self._delivered = number, event.delivered

    def verified(self, head: bytes) -> VerifiedJob:
        """What the entries up to `head` prove."""
        return VerifiedJob(
            plan=self._plan,
            releases=tuple(self._releases),
            aborted_attempts=self._aborted,
            delivered=self._delivered,
            head=head,
            held_back=tuple(self._gates.held_back),
            final_round=self._final_round,
            untold_attempts=self._untold,
            not_recomputed=tuple(self._recomputation.not_recomputed),
            believed=self._believed,
        )

    def _next_attempt(self, signed: Signed, before: bytes) -> RoundHeader:
        """The header of an attempt at the round after the latest release."""
        header = open_signed(signed, HEADER_VERSIONS, self._roster.operator)
        plan, former = self._plan, self._releases[-1]
        require_that(header.plan == plan.digest(), "its header names another plan")
        require_that(header.version == plan.version, "its header has another version than its plan")
        if isinstance(header, RoundHeader2):
            require_that(header.transcript == before, "its header names another transcript")
        require_that(
            (header.federation, header.job) == (plan.federation, plan.job),
            "its header names another job",
        )
        require_that(header.roster == self._roster.digest(), "its header names another roster")
        require_that(
            header.round == former.round + 1, "its round does not follow the release before"
        )
        require_that(header.round <= plan.training.rounds, "its round is past the plan's last")
        require_that(
            header.adapter == former.adapter, "its round does not start from the release before"
        )
        require_that(
            header.attempt > self._attempt, "its attempt does not follow the attempt before"
        )
        for site in header.cohort:
            self._roster.member(site)
        self._untold += header.attempt - self._attempt - 1
        self._attempt = header.attempt
        self._check_attempts()
        return header

    def _check_attempts(self) -> None:
        """Refuses an attempt that the claim of a plan of distributed mode does not cover."""
        privacy = self._plan.privacy
        if isinstance(privacy, DistributedPrivacy):
            used = len(self._releases) + self._aborted + self._untold
            require_that(
                used <= privacy.most_attempts,
                f"it is attempt {used} of the job, and its plan allows {privacy.most_attempts}",
            )

    def _check_weight(self, release: Release) -> None:
        """Compares a release's weight with its survivors' public one, or with its range."""
        survivors, aggregation = release.survivors, self._plan.aggregation
        match aggregation.weights:
            case "equal":
                weights = range(len(survivors), len(survivors) + 1)
            case "size-class":
                public = sum(self._roster.member(site).weight for site in survivors)
                weights = range(public, public + 1)
            case "examples":
                weights = range(len(survivors), len(survivors) * aggregation.max_weight + 1)
        require_that(
            release.total_weight in weights,
            f"its weight is {release.total_weight}, and that of its survivors is"
            f" {weights[0]}{'' if len(weights) == 1 else f' to {weights[-1]}'}",
        )

    def _check_counts(self, counts: SiteCounts, sites: int) -> None:
        """Refuses counts that no sum of clipped counts of that many sites can be."""
        evaluation = self._plan.evaluation
        assert evaluation is not None  # checked beside the counts
        aggregation = self._plan.aggregation
        share = aggregation.largest_change / aggregation.clip_range
        bound = sites * share * evaluation.max_records * (1 + _ROUNDING)
        require_that(
            all(abs(figure) <= bound for figure in (counts.score, counts.records)),
            "its counts are larger than its sites' can be",
        )


def _believed(plan: TrainingPlan, start: Vector | None) -> tuple[str, ...]:
    match plan.start:
        case SeedStart():
            return ()
        case LabelNamesStart():
            believed = "whether the head's rows are the embeddings of the labels' names"
        case ReleasedStart() as named:
            believed = f"whether round {named.round} of plan {named.plan.hex()} released the start"
    whole = "the start itself, whose tensor is not at hand"
    return (believed,) if start is not None else (whole, believed)


class _Gates:
    """The results of the release gate, checked round by round."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.held_back: list[int] = []
        self._gate = plan.release_gate
        self._found: GateResult | None = None

    def verify(self, gate: GateResult | None, release: Release, former: Release) -> None:
        if self._gate is None or gate is None:
            require_that(gate is None, "its plan has no release gate")
            require_that(self._gate is None, "it does not say what the release gate found")
            return
        require_that(gate.bound == self._gate.max_loss_increase, "its bound is not the plan's")
        require_that(
            _is_loss(gate.before) and _is_loss(gate.after), "the gate found what is not a loss"
        )
        found = self._found
        if found is not None:
            kept = found.after if found.passed() else found.before
            require_that(
                gate.before == kept, "it compares with another loss than the round before had"
            )
        if not gate.passed():
            require_that(
                release.adapter == former.adapter,
                "a round that was held back does not keep the adapter before",
            )
            self.held_back.append(release.round)
        self._found = gate


def _is_loss(loss: Loss) -> bool:
    """Whether a figure is one of a mean cross entropy; None stands for one that is not finite."""
    return loss is None or (math.isfinite(loss) and loss >= 0)


def _distinct_of(names: Sequence[str], known: Collection[str]) -> bool:
    return len(set(names)) == len(names) and set(names) <= set(known)
