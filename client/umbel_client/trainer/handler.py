"""The trainer: sealed request in, sealed reply out, and nothing else.

It is all that a server can reach at a site. Every request is opened against the pinned operator
key, judged by the site's policy and journal, and answered at most once. What it refuses, it names
to the server by a code; the reason in full goes to the site's own observer.
"""

import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from umbel_client.models.adapters.folder import write_adapter
from umbel_client.site.config import ClientConfig
from umbel_client.site.decisions import Decisions
from umbel_client.site.pinned_roster import Pinned, check_own_key
from umbel_client.site.policy import judge_header, judge_operator, judge_plan, judge_start
from umbel_client.storage.journal import Journal
from umbel_client.trainer.job import SiteJob, SiteStatus, open_job
from umbel_client.trainer.last_advert import check_last_advert
from umbel_client.trainer.observer import Observer
from umbel_client.trainer.stages import answer_stage
from umbel_common.adapters.vector import Vector, adapter_digest, from_bytes, initial_vector
from umbel_common.canonical import Entropy, V, decode_canonical, encode
from umbel_common.errors import (
    BudgetError,
    PlanError,
    PolicyRefusal,
    ProtocolError,
    RemoteProtocolError,
    UmbelError,
    require,
)
from umbel_common.plans.plan import TrainingPlan, check_plan
from umbel_common.plans.statements import EarlyEnd, Release, RoundHeader
from umbel_common.protocol.transcript import final_round
from umbel_common.protocol.wire import (
    FinishReply,
    FinishRequest,
    OfferReply,
    OfferRequest,
    Refusal,
    Reply,
    TrainReply,
    TrainRequest,
    open_request,
    request_digest,
    seal_reply,
    size_limit,
)
from umbel_common.secagg import participant as secagg
from umbel_common.secagg.encoding import encoding_of
from umbel_common.trust.identity import Identity, Roster, Signed, fingerprint, open_signed


class Trainer:
    """One site. A lock sees to it that one request is handled at a time."""

    def __init__(
        self,
        config: ClientConfig,
        pinned: Pinned,
        identity: Identity,
        *,
        observer: Observer,
        entropy: Entropy = os.urandom,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Opens the site's journal; model and data are loaded when a plan is accepted.

        Args:
            pinned: the roster that this site pinned, and the keys that it holds for revoked.
            entropy: replaced only by simulations that say that they are insecure.
            clock: this machine's local time, for the policy's hours.

        Raises:
            IdentityError: the roster knows this site not at all, or with another key; or this
                site's key is revoked.
            PolicyRefusal: the site's policy does not name the pinned operator.
            StorageError: the journal cannot be used.
        """
        check_own_key(pinned, config.site, identity)
        judge_operator(config.policy, fingerprint(pinned.roster.operator))
        self._config = config
        self._roster = pinned.roster
        self._identity = identity
        self._former_rosters = pinned.former
        self._revoked = pinned.revoked
        self._observer = observer
        self._entropy = entropy
        self._clock = clock
        self._lock = threading.Lock()
        self._state = Path(config.state)
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._session = Journal(self._state / "session.sqlite")
        self._decisions = Decisions(self._state)
        self._job: SiteJob | None = None

    def close(self) -> None:
        """Releases the journal and the ledger."""
        with self._lock:
            if self._job is not None:
                self._job.close()
            self._session.close()

    def status(self, job: str) -> SiteStatus:
        """How an accepted job stands at this site, for the site's own people.

        Raises:
            RemoteProtocolError: `unknown-plan`.
        """
        with self._lock:
            return self._loaded_job(job).status()

    def handle(self, sealed: bytes) -> bytes:
        """Answers one sealed request with one sealed reply."""
        asked = request_digest(sealed)
        with self._lock:
            try:
                return self._answer(sealed, asked)
            except UmbelError as error:
                self._observer.refused(error)
                return self._seal(Refusal(check=_code(error)), asked)
            except Exception as unexpected:
                # What a server can provoke, however odd, must not end the site's process.
                fault = UmbelError(
                    f"an unexpected {type(unexpected).__name__} stopped a request",
                    found=unexpected,
                    remedy="please report it: no input should cause this",
                )
                fault.__cause__ = unexpected
                self._observer.refused(fault)
                return self._seal(Refusal(check=_code(fault)), asked)

    def _answer(self, sealed: bytes, asked: bytes) -> bytes:
        require(
            self._roster.operator not in self._revoked,
            "revoked-key",
            "the operator's key is revoked",
            remedy="approve a roster with the operator's new key",
        )
        request = open_request(
            self._roster.operator,
            self._config.site,
            sealed,
            limit=max([size_limit(None), *(size_limit(plan) for plan in self._plans())]),
        )
        match request:
            case OfferRequest():
                return self._seal(self._offer(request), asked)
            case FinishRequest():
                return self._seal(self._finish(request), asked)
            case TrainRequest():
                return self._train(request, asked)
            case _:
                header = self._session.header(request.context)
                self._check_parties(header)
                job = self._loaded_job(header.job)
                reply = answer_stage(
                    request,
                    header,
                    session=self._session,
                    job=job,
                    policy=self._config.policy,
                    site=self._config.site,
                    roster=self._roster,
                    identity=self._identity,
                    entropy=self._entropy,
                    fingerprint=asked,
                )
                job.answered(self._session.published().answers)
                return reply

    def _offer(self, request: OfferRequest) -> OfferReply:
        plan = self._open(request.plan, TrainingPlan)
        require(
            plan.federation == self._roster.federation,
            "other-federation",
            "a plan is of another federation",
        )
        check_plan(plan)
        judge_plan(self._config.policy, plan)
        self._check_size_class(plan)
        self._decisions.require_running()
        if self._config.policy.approval == "each-plan":
            self._decisions.require_approval(plan, request.plan)
        # Before anything of the plan takes effect: a job has one plan for ever.
        self._session.check_plan(plan.job, request.plan)
        self._load(plan)
        self._session.accept_plan(plan.job, request.plan)
        return OfferReply(plan=plan.digest())

    def _train(self, request: TrainRequest, fingerprint: bytes) -> bytes:
        header = self._open(request.header, RoundHeader)
        plan = self._accepted_plan(header.job)
        known = self._session.answer(header.context(), "train", fingerprint)
        if known is not None:
            self._loaded_job(plan.job).answered(self._session.published().answers)
            return known
        self._check_header(header, plan)
        self._decisions.require_running()
        judge_start(self._config.policy, self._clock().time(), self._session.trained(plan.job))
        adapter = self._check_release(request, header, plan)
        job = self._loaded_job(plan.job)
        if request.last is not None:
            check_last_advert(request.last, job, self._identity)
        began = time.monotonic()
        try:
            job.compute(header, adapter)
        finally:
            self._session.add_trained(plan.job, time.monotonic() - began)
        head = job.ledger_head()
        state, advert = secagg.advertise(
            header,
            self._config.site,
            secagg.Rules(
                threshold=plan.aggregation.threshold,
                colluding=self._config.policy.colluding_sites,
                minimum_cohort=self._config.policy.minimum_cohort,
            ),
            self._identity,
            head,
            self._entropy,
        )
        reply = self._seal(TrainReply(advert=advert), fingerprint)
        self._session.open(header, head, encode(state), fingerprint, reply)
        job.answered(self._session.published().answers)
        return reply

    def _check_size_class(self, plan: TrainingPlan) -> None:
        weight = self._roster.member(self._config.site).weight
        if plan.aggregation.weights == "size-class" and weight > plan.aggregation.max_weight:
            raise PlanError(
                "this site's size class is larger than the plan allows",
                field="aggregation.max_weight",
                found=plan.aggregation.max_weight,
                accepted=f"at least {weight}",
            )

    def _check_header(self, header: RoundHeader, plan: TrainingPlan) -> None:
        checks = {
            "other-federation": header.federation == self._roster.federation,
            "plan-digest": header.plan == plan.digest(),
            "not-in-cohort": self._config.site in header.cohort,
            "round-past-plan": header.round <= plan.training.rounds,
        }
        for check, holds in checks.items():
            require(holds, check, "a round header does not fit what this site knows")
        self._check_parties(header)
        self._session.check_new(header)
        # Judged again: a site may have tightened its policy since it accepted the plan.
        judge_plan(self._config.policy, plan)
        judge_header(self._config.policy, plan, header)
        encoding_of(plan.aggregation, len(header.cohort)).prove_headroom()

    def _check_parties(self, header: RoundHeader) -> None:
        """At every stage: the roster may have changed, and a key been revoked, since the last."""
        members = _keys(self._roster)
        # A job keeps the roster that it began with. Who has joined since does not disturb it; who
        # left, or has another key, ends it here.
        rosters = {roster.digest(): roster for roster in (*self._former_rosters, self._roster)}
        agreed = _keys(rosters.get(header.roster, self._roster))
        cohort = {name: members.get(name) for name in header.cohort}
        checks = {
            "roster-digest": header.roster in rosters,
            "not-in-roster": None not in cohort.values() and cohort.items() <= agreed.items(),
            "revoked-key": self._revoked.isdisjoint(cohort.values()),
        }
        for check, holds in checks.items():
            require(holds, check, "an attempt has other parties than this site believes")

    def _check_release(
        self, request: TrainRequest, header: RoundHeader, plan: TrainingPlan
    ) -> Vector:
        """The adapter to start from: the one that the header, its release and its digest name."""
        release = self._open(request.release, Release)
        vector = from_bytes(request.adapter, plan.lora.size)
        found = adapter_digest(plan.digest(), vector)
        require(
            found == release.adapter == header.adapter,
            "adapter-digest",
            "an adapter is not what its release says",
        )
        require(
            (release.plan, release.round) == (plan.digest(), header.round - 1),
            "other-release",
            "a round does not start from its predecessor",
        )
        require(
            release.round > 0 or found == adapter_digest(plan.digest(), initial_vector(plan)),
            "initial-adapter",
            "release 0 is not the plan's public seed's",
        )
        self._session.keep_release(plan.job, release.round, request.release)
        return vector

    def _finish(self, request: FinishRequest) -> FinishReply:
        release = self._open(request.release, Release)
        plan = self._accepted_plan(release.job)
        end = None if request.early_end is None else self._open(request.early_end, EarlyEnd)
        vector = from_bytes(request.adapter, plan.lora.size)
        require(
            adapter_digest(plan.digest(), vector) == release.adapter,
            "adapter-digest",
            "an adapter is not what its release says",
        )
        require(
            (release.plan, release.round) == (plan.digest(), final_round(plan, end)),
            "other-release",
            "this is not the last release of the plan",
        )
        self._session.keep_release(plan.job, release.round, request.release)
        write_adapter(
            self._state / "adapters" / plan.job,
            plan,
            vector,
            request.release,
            base_model=Path(self._config.model.path),
        )
        self._session.end_job(plan.job)
        return FinishReply(adapter=release.adapter)

    def _plans(self) -> list[TrainingPlan]:
        return [_accepted(signed) for signed in self._session.plans()]

    def _accepted_plan(self, job: str) -> TrainingPlan:
        signed = self._session.plan(job)
        if signed is None:
            raise RemoteProtocolError("unknown-plan", f"no plan of job {job} was accepted here")
        return _accepted(signed)

    def _loaded_job(self, name: str) -> SiteJob:
        """The job with its model and data, under the plan that was accepted and no other."""
        self._load(self._accepted_plan(name))
        assert self._job is not None  # _load sets it or raises
        return self._job

    def _load(self, plan: TrainingPlan) -> None:
        if self._job is not None and self._job.plan == plan:
            return
        if self._job is not None:
            self._job.close()
            self._job = None
        self._job = open_job(
            self._config,
            plan,
            self._roster,
            published=self._session.published(),
            observer=self._observer,
            entropy=self._entropy,
        )

    def _open(self, signed: Signed, kind: type[V]) -> V:
        return open_signed(signed, kind, self._roster.operator, "operator")

    def _seal(self, reply: Reply, asked: bytes) -> bytes:
        return seal_reply(self._identity, self._config.site, reply, asked)


def _keys(roster: Roster) -> dict[str, bytes]:
    return {member.name: member.public_key for member in roster.members}


def _accepted(signed: Signed) -> TrainingPlan:
    """A plan from this site's own journal: verified as it was accepted, by the operator of then,
    whose key may have been rotated since."""
    return decode_canonical(signed.statement, TrainingPlan)


def _code(error: UmbelError) -> str:
    """What the server is told: the name of a check that it can know of, else a kind of fault."""
    match error:
        case ProtocolError() | PolicyRefusal():
            return error.check
        case BudgetError():
            return "budget"
        case _:
            return "site-fault"
