"""A job from its plan to its last release: rounds, attempts, journal, transcript.

Two rules may never be broken here. No plan, round header or release is sent before it is in the
journal. The journal names no adapter and no sum that is not in the registry before it.

A round is released in these steps, in this order; a comment marks each where it happens. The codes
in parentheses end the attempt or the job at that step:

0. Before the first round: the plan fits the roster, is journalled, and is offered; enough sites
   accept it (PlanError, JobFailed).
1. Open an attempt: take an unused attempt number, sign the round header, journal it.
2. Send the requests of each stage to the cohort (`aggregation.attempt` has the stages), the last
   two together with what the next attempt needs (`ahead`).
3. Collect the replies; journal each site's advert before the next stage is sent. Close each stage
   with enough sites (the codes of C1.3 to C5.3 and C5.5 of `secagg.coordinator`).
4. Sum: the optimizer's step changes the adapter that the round started from (`sum-length`,
   `total-weight`, `sum-out-of-range`, `weight-mismatch`).
5. Ask the release gate, if the plan has one: an adapter that it holds back is replaced by the one
   before, and so is the optimizer's state (JobFailed if the gate cannot evaluate it).
6. Sign the release, and write its adapter and its sum to the registry.
7. Journal the release, its transcript entry and what the release gate found, all of it or nothing.
8. Tell the observer. Without a release gate, the adapter is evaluated now.
9. Send the release: with the next round's train request, or with the finish request after the last.
   A train request has the whole adapter, or what changed in it for a site that has the one before
   (`held_adapters`).

An attempt that fails in steps 2 to 4 is journalled as aborted, and step 1 opens the next one. After
a crash the job resumes at step 1 of the round after the last journalled release: attempt number and
keys are fresh, and sites answer with the delta that they have kept. The end of a job is journalled
after its finish request, because it lists the sites that answered; after a crash in between, the
request is sent again.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from umbel_common.adapters.vector import adapter_digest, to_bytes
from umbel_common.errors import JobFailed, PlanError, RoundAborted
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import (
    PLAN_VERSIONS,
    DistributedPrivacy,
    TrainingPlan,
    TrainingPlan2,
)
from umbel_common.plans.statements import (
    RELEASE_VERSIONS,
    EarlyEnd,
    Release,
    RoundHeader,
    chained,
    with_sum,
)
from umbel_common.protocol.transcript import AttemptAborted, JobFinished, JobStarted, RoundReleased
from umbel_common.protocol.wire import (
    FinishReply,
    FinishRequest,
    OfferReply,
    OfferUnderRoster,
    Refusal,
    TrainReply,
    TrainRequest,
    size_limit,
)
from umbel_common.secagg.messages import Preparation
from umbel_common.trust.identity import Identity, Roster, Signed, open_signed, sign
from umbel_server.aggregation import update
from umbel_server.aggregation.attempt import (
    Attempt,
    AttemptOutcome,
    open_attempt,
    owners_to_leave_out,
)
from umbel_server.jobs import refusals
from umbel_server.jobs.ahead import Ahead
from umbel_server.jobs.assessment import Assessment
from umbel_server.jobs.exchange import Exchange
from umbel_server.jobs.held_adapters import HeldAdapters
from umbel_server.jobs.interfaces import Evaluator, Observer
from umbel_server.jobs.optimizer_state import OptimizerState
from umbel_server.messaging.link import Link, Step
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry


class Job:
    """One job of one operator."""

    def __init__(
        self,
        plan: TrainingPlan,
        roster: Roster,
        operator: Identity,
        *,
        journal: Journal,
        registry: Registry,
        link: Link,
        observer: Observer,
        limits: Limits,
        revoked: frozenset[bytes] = frozenset(),
        evaluator: Evaluator | None = None,
    ) -> None:
        """Takes everything that the job works with; nothing is sent or written yet.

        Args:
            evaluator: None where released adapters are not evaluated.
            revoked: public keys that are not trusted although the roster lists them: their sites
                are sent nothing.

        Raises:
            PlanError: the plan contradicts itself or the roster.
        """
        # Step 0: the plan fits the roster.
        check_plan(plan)
        sites = tuple(member.name for member in roster.members if member.public_key not in revoked)
        if plan.aggregation.threshold > len(sites):
            raise PlanError(
                "the threshold is larger than the roster",
                field="aggregation.threshold",
                found=plan.aggregation.threshold,
                accepted=f"at most {len(sites)}",
            )
        if plan.least_survivors > len(sites):
            raise PlanError(
                "the plan asks for more sites in each sum than the roster has",
                field="privacy.least_survivors",
                found=plan.least_survivors,
                accepted=f"at most {len(sites)}",
            )
        heaviest = max((member.weight for member in roster.members), default=0)
        if plan.aggregation.weights == "size-class" and heaviest > plan.aggregation.max_weight:
            raise PlanError(
                "a size class of the roster is larger than the plan allows",
                field="aggregation.max_weight",
                found=plan.aggregation.max_weight,
                accepted=f"at least {heaviest}",
            )
        self.plan = plan
        self._roster = roster
        self._sites = sites
        self._operator = operator
        self._journal = journal
        self._registry = registry
        self._observer = observer
        self._limits = limits
        self._exchange = Exchange(
            link, operator, roster, observer=observer, limits=limits, largest_reply=size_limit(plan)
        )
        self._assessment = Assessment(plan, journal, evaluator, observer)
        self._state = OptimizerState(plan, operator, journal, registry)
        self._ahead = Ahead(roster)
        self._held = HeldAdapters(plan)

    def run(self) -> Release:
        """Runs the job, or what is left of it, and returns its last release.

        Raises:
            ConfigError, DataError: this server cannot evaluate what the plan's release gate needs.
            JobFailed: too few sites accepted the plan, a round used up its attempts, or the release
                gate could not evaluate an adapter.
            StorageError: the operator's disk failed; the job can be resumed.
        """
        final = self._journal.final_round(self.plan.job)
        if final is None:
            self._assessment.check()
        # Step 0: the plan is journalled.
        self._start_or_resume()
        if final is not None:
            return self._open_release(self._journal.releases(self.plan.job)[final])
        last = self._last_release()
        self._assessment.begin(last, lambda: self._registry.load(self.plan, last.adapter))
        # Step 0: the plan is offered.
        sites = self._offer()
        # A single round would not win back what asking costs.
        following = self._following(last.round, sites)
        if following is not None and following.round < self.plan.training.rounds:
            self._ahead.ask(following, self._exchange)
        while last.round < self.plan.training.rounds:
            final = self._assessment.final_round()
            if final is not None:
                self._observer.on_early_end(last.round, final)
                return self._finish(self._journal.releases(self.plan.job)[final], early=True)
            last = self._run_round(last.round + 1, last, sites)
        return self._finish(self._signed_release(), early=False)

    def _start_or_resume(self) -> None:
        known = self._journal.plan(self.plan.job)
        if known is not None:
            if open_signed(known, PLAN_VERSIONS, self._operator.public_key) != self.plan:
                raise PlanError(
                    "a job of this name exists with another plan",
                    field="job",
                    found=self.plan.job,
                    remedy="give the new plan another job name",
                )
            return
        vector = self._registry.start(self.plan)
        release = Release(
            federation=self.plan.federation,
            job=self.plan.job,
            plan=self.plan.digest(),
            round=0,
            attempt=0,
            context=bytes(32),
            adapter=adapter_digest(self.plan.digest(), vector),
            survivors=(),
            total_weight=0,
        )
        if isinstance(self.plan, TrainingPlan2):
            release = with_sum(release, bytes(32))
        signed_plan, signed_release = sign(self._operator, self.plan), sign(self._operator, release)
        self._registry.publish(self.plan, vector)
        self._journal.start_job(
            self._operator,
            self.plan.job,
            signed_plan,
            release.adapter,
            signed_release,
            JobStarted(plan=signed_plan, roster=self._roster.digest(), release=signed_release),
        )

    def _signed_release(self) -> Signed:
        _, _, signed = self._journal.last_release(self.plan.job)
        return signed

    def _last_release(self) -> Release:
        return self._open_release(self._signed_release())

    def _open_release(self, signed: Signed) -> Release:
        return open_signed(signed, RELEASE_VERSIONS, self._operator.public_key)

    def _offer(self) -> tuple[str, ...]:
        """The sites that accept the plan."""
        plan = self._journal.plan(self.plan.job)
        assert plan is not None  # recorded by _start_or_resume
        accepted, refused = set(), {}
        offer = OfferUnderRoster(plan=plan, roster=self._roster.digest())
        requests = dict.fromkeys(self._sites, offer)
        for site, reply in self._exchange.ask(Step("offer"), requests):
            if isinstance(reply, OfferReply) and reply.plan == self.plan.digest():
                accepted.add(site)
            else:
                refused[site] = reply.check if isinstance(reply, Refusal) else "stage-order"
        if len(accepted) < self.plan.least_survivors:
            silent = requests.keys() - accepted - refused.keys()
            undecided = {site for site, check in refused.items() if check in refusals.UNDECIDED}
            may_accept = silent | undecided
            hopeless = len(accepted | may_accept) < self.plan.least_survivors
            raise JobFailed(
                "too few sites accept the plan",
                may_accept=() if hopeless else tuple(sorted(may_accept)),
                field=self.plan.job,
                found=refusals.told(refused, silent),
                accepted=f"at least {self.plan.least_survivors} sites",
                remedy=refusals.remedy(refused, silent),
            )
        return tuple(sorted(accepted))

    def _run_round(self, round_number: int, last: Release, sites: tuple[str, ...]) -> Release:
        failures: list[_Aborted] = []
        following = self._following(round_number, sites)
        for _ in range(self._limits.attempts):
            if self._attempts_left() == 0:
                break
            # Step 1.
            header, signed_header = self._open_attempt(round_number, sites, last)
            try:
                outcome = self._run_stages(self._first_stage(header, signed_header), following)
                return self._release(header, signed_header, outcome)
            except _Aborted as abort:
                failures.append(abort)
                event = AttemptAborted(
                    header=signed_header,
                    check=abort.check,
                    refusals=tuple(sorted(abort.refused.items())),
                )
                self._journal.record_event(self._operator, self.plan.job, event)
                self._observer.on_aborted(round_number, header.attempt, abort.check)
                sites = tuple(site for site in sites if site not in abort.left_out)
                if len(sites) < self.plan.least_survivors:
                    break
        if not failures:
            raise JobFailed(
                f"round {round_number} cannot begin: the plan's attempts are used up",
                field=self.plan.job,
                accepted="as many attempts as privacy.most_attempts says, whose cost the sites"
                " agreed to",
                remedy="take what it released (umbel-server adapters), or agree on a plan with more"
                " spare attempts",
            )
        last_failure = failures[-1]
        raise JobFailed(
            f"round {round_number} failed: {last_failure.summary()}",
            field=self.plan.job,
            found="; ".join(map(str, failures)),
            remedy=last_failure.remedy(self.plan.job),
        )

    def _attempts_left(self) -> int | None:
        """How many attempts the plan still allows; None: any number."""
        privacy = self.plan.privacy
        if not isinstance(privacy, DistributedPrivacy):
            return None
        return max(privacy.most_attempts - len(self._journal.headers(self.plan.job)), 0)

    def _open_attempt(
        self, round_number: int, sites: tuple[str, ...], last: Release
    ) -> tuple[RoundHeader, Signed]:
        number = self._journal.next_attempt(self.plan.job, round_number)
        header = RoundHeader(
            federation=self.plan.federation,
            job=self.plan.job,
            round=round_number,
            attempt=number,
            plan=self.plan.digest(),
            roster=self._roster.digest(),
            adapter=last.adapter,
            cohort=sites,
        )
        if isinstance(self.plan, TrainingPlan2):
            header = chained(header, self._journal.transcript_head(self.plan.job))
        signed = sign(self._operator, header)
        # The attempt number is used up now, whatever happens next.
        self._journal.record_attempt(self.plan.job, round_number, number, signed)
        return header, signed

    def _first_stage(self, header: RoundHeader, signed: Signed) -> Attempt:
        adapter = self._registry.load(self.plan, header.adapter)
        request = TrainRequest(
            header=signed, release=self._signed_release(), adapter=to_bytes(adapter)
        )
        length = self.plan.vector_length(header.round) + 1
        last = self._journal.last_adverts()
        prepared = self._ahead.take(header)
        from_last = self._held.requests(request, header, adapter)
        return open_attempt(
            header, self._roster, self.plan, request, length, last, prepared, from_last
        )

    def _following(self, round_number: int, sites: tuple[str, ...]) -> Preparation | None:
        """The attempt that is expected after a round; None after the last one."""
        if round_number == self.plan.training.rounds:
            return None
        return Preparation(
            federation=self.plan.federation,
            job=self.plan.job,
            round=round_number + 1,
            attempt=self._journal.next_attempt(self.plan.job, round_number + 1),
            plan=self.plan.digest(),
            roster=self._roster.digest(),
            cohort=sites,
        )

    def _run_stages(
        self, state: Attempt | AttemptOutcome, following: Preparation | None
    ) -> AttemptOutcome:
        while isinstance(state, Attempt):
            current = state
            step = Step(current.stage, current.header.round, current.header.attempt)
            # Step 2 happens in `ask`, and so does step 9 for the release of the round before.
            requests = self._ahead.together(current.stage, current.requests(), following)
            for site, answer in self._exchange.ask(step, requests):
                reply = self._ahead.split(site, answer)
                # Both may hold a vector, and the next one is about to be read.
                del answer
                awaited = current.waiting
                # Step 3: a reply is collected.
                current = current.receive(site, reply)
                if isinstance(reply, TrainReply) and site in awaited - current.waiting:
                    self._keep_advert(current, site, reply)
                if isinstance(reply, Refusal) and site in current.from_last:
                    self._held.refused(site, reply.check)
                del reply
                if not current.waiting:
                    break
            # Step 3: the stage is closed.
            try:
                state = current.advance()
            except RoundAborted as error:
                # A site that refused after training may have been wronged by a peer, and a site
                # that was late may be back: both are asked again.
                lost = owners_to_leave_out(error)
                refused = {**current.refusals, **dict.fromkeys(lost, error.check)}
                raise _Aborted(
                    error,
                    current.header,
                    refused,
                    current.unwilling | lost,
                    current.waiting,
                    current.stage,
                ) from error
        return state

    def _keep_advert(self, attempt: Attempt, site: str, reply: TrainReply) -> None:
        request = attempt.first_request
        if request is not None and site not in attempt.refusals:
            self._journal.keep_advert(site, request.header, reply.advert)
            self._held.answered(site, attempt.header)

    def _release(
        self, header: RoundHeader, signed_header: Signed, outcome: AttemptOutcome
    ) -> Release:
        # Read only now: while masked vectors came in, the sum and one of them were in memory.
        load = partial(self._registry.load, self.plan, header.adapter)
        vector = load()
        state = self._state.take(header.round - 1)
        before = None if self.plan.release_gate is None else state.copy()
        # Step 4.
        try:
            weight, counts = update.apply_sum(
                outcome.aggregate,
                self.plan,
                self._roster,
                header.round,
                len(header.cohort),
                vector,
                state,
            )
        except RoundAborted as error:
            raise _Aborted(error, header) from error
        # Step 5.
        judged = self._assessment.judge(header.round, vector, load)
        if judged.held_back and before is not None:
            vector, state = load(), before
        release = Release(
            federation=self.plan.federation,
            job=self.plan.job,
            plan=self.plan.digest(),
            round=header.round,
            attempt=header.attempt,
            context=header.context(),
            adapter=adapter_digest(self.plan.digest(), vector),
            survivors=outcome.aggregate.survivors,
            total_weight=weight,
        )
        # Step 6.
        if isinstance(self.plan, TrainingPlan2):
            release = with_sum(release, self._registry.keep_sum(outcome.aggregate.total))
        signed = sign(self._operator, release)
        self._registry.publish(self.plan, vector)
        # Step 7.
        self._journal.record_release(
            self._operator,
            self.plan.job,
            header.round,
            release.adapter,
            signed,
            RoundReleased(
                header=signed_header,
                adverts=outcome.evidence.adverts,
                confirmations=outcome.evidence.confirmations,
                release=signed,
                counts=counts,
                gate=judged.gate,
            ),
            evaluation=judged.evaluation,
            gate=judged.gate,
        )
        self._state.keep(header.round, state)
        # Step 8.
        if outcome.aggregate.wrong_shares:
            self._observer.on_disputed(header.round, header.attempt, outcome.aggregate.wrong_shares)
        if counts is not None:
            self._observer.on_counted(header.round, counts, len(release.survivors))
        self._observer.on_released(release, vector)
        self._assessment.assess_released(header.round, judged, vector, load)
        return release

    def _finish(self, signed: Signed, *, early: bool) -> Release:
        last, end = self._open_release(signed), None
        if early:
            statement = EarlyEnd(
                federation=last.federation, job=last.job, plan=last.plan, round=last.round
            )
            end = sign(self._operator, statement)
        vector = self._registry.load(self.plan, last.adapter)
        # Step 9, for the last release.
        request = FinishRequest(release=signed, adapter=to_bytes(vector), early_end=end)
        requests = dict.fromkeys(self._sites, request)
        delivered = {
            site
            for site, reply in self._exchange.ask(Step("finish", last.round), requests)
            if isinstance(reply, FinishReply) and reply.adapter == last.adapter
        }
        event = JobFinished(release=last.adapter, delivered=tuple(sorted(delivered)), early_end=end)
        self._journal.finish_job(self._operator, self.plan.job, last.round, event)
        return last


class _Aborted(Exception):
    """An attempt ended without a release.

    Args:
        header: the attempt's.
        refused: site -> reason code, for the transcript.
        left_out: sites that are not in the cohort of the round's next attempt.
        silent: sites that had not answered the attempt's last stage.
        stage: the attempt's last stage.
    """

    def __init__(
        self,
        error: RoundAborted,
        header: RoundHeader,
        refused: Mapping[str, str] = MappingProxyType({}),
        left_out: frozenset[str] = frozenset(),
        silent: frozenset[str] = frozenset(),
        stage: str = "",
    ) -> None:
        super().__init__(error.check)
        self.check = error.check
        self.reason = error.message if error.field is None else f"{error.message}: {error.field}"
        self.header = header
        self.refused = refused
        self.left_out = left_out
        self.silent = silent
        self.stage = stage

    def __str__(self) -> str:
        """The attempt's number, what ended it, and what each site had to do with it."""
        sites = refusals.told(self.refused, self.silent, self.stage)
        return f"attempt {self.header.attempt}, {self.check}: {sites or self.reason}"

    def summary(self) -> str:
        """Why the attempt ended, in a few words."""
        found = refusals.counted(self.refused, self.silent, len(self.header.cohort))
        return found or f"{self.check}, {self.reason}"

    def remedy(self, job: str) -> str:
        """What the operator can do."""
        known = refusals.remedy(self.refused, self.silent)
        resumed = f"umbel-server job resume {job} begins this round again"
        return f"{known}; then {resumed}" if known else resumed
