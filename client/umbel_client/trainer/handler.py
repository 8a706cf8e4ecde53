"""The trainer: a sealed request in, a sealed reply out, and nothing else.

This module is all that a server can reach at a site. What it must keep, whatever is changed in it:

- No request is acted on before its seal is opened with the pinned operator's key.
- Nothing of a round leaves before it is charged in the ledger, recorded in the journal, and counted
  in the ledger (steps 12, 14 and 15): a site that dies at any moment answers the same again. Keys
  and shares that are prepared (`slots`) are of no round yet, and die with the process.
- The order of the steps. A check that moves behind training lets a server spend the site's budget.
- A refusal names a check to the server and no more; the reason in full goes to the site's own
  observer.
- No answer before step 12 depends on the records: the site reads them when it starts, and an offer
  is answered without them.

A request to train passes these steps. Their numbers stand in the code where each happens. A code
stands at the step that makes the check; it guards every later step. Whatever is wrong with the
site's data or its ledger is `site-not-ready`. Every other fault, also a check of our own code, is
`site-fault` to the server.

 1. Seal: the operator's key is not revoked, and the operator sealed this request for this site.
    `revoked-key`, `oversized-message`, `malformed-message`, `wire-version`, `pinned-signature`
 2. Header: the operator signed the round header.
    `pinned-signature`, `malformed-message`
 3. Plan: this site accepted a plan for the job.
    `unknown-plan`
 4. Repetition: a request that was answered gets the same bytes again, once the job is loaded (step
    11) and they are counted (step 15). Another request for the same attempt is refused.
    `second-answer`
 5. Round: federation, plan, cohort and round are ones that this site knows (`checks`).
    `other-federation`, `plan-digest`, `header-version`, `not-in-cohort`, `round-past-plan`
 6. Parties: each site of the cohort is in the pinned roster, with a key that is not revoked
    (`checks`).
    `roster-digest`, `not-in-roster`, `revoked-key`
 7. Attempt: neither its number nor a later one was used (journal).
    `attempt-reused`
 8. Policy: plan and cohort are judged again, and the sum of the deltas cannot overflow.
    the checks of `judge_plan` and `judge_cost`, `cohort-too-small`, `threshold-too-high`,
    `threshold-too-low`, `ring-too-small`
 9. People: the site is not paused, and it may train now (decisions, policy).
    `site-paused`, `outside-hours`, `too-many-hours`
10. Start: the operator signed the predecessor's release, and the adapter is the one that release
    and header name (`checks`): the request's, or the one that this site kept with what the request
    changes in it. The journal keeps the release, and the disk its adapter.
    `pinned-signature`, `malformed-message`, `release-missing`, `adapter-length`, `adapter-values`,
    `adapter-digest`, `other-release`, `initial-adapter`, `start-norm`, `start-unknown`,
    `adapter-too-far`, `two-releases`
    Where a head starts at its labels' names, the model of step 11 is loaded now.
11. Ledger: model and ledger are loaded (`job`), and the ledger knows what this site signed last
    (`checks`).
    `budget`, `delta-for-records`, `site-not-ready`, `ledger-rolled-back`, `other-context`,
    `malformed-message`
12. Training: this adapter keeps made-up records apart, and the ledger reserves the round. Only then
    are the records looked at: the round is trained, its delta is stored, and the ledger records its
    digest (`local_job`). In distributed mode, all of this is an attempt's (`distributed_job`). The
    journal counts the time.
    `budget`, `other-adapter`, `attempt-lost`
13. Advert: public keys, fresh or prepared for this very attempt (`slots`), signed together with the
    ledger's head. Secure aggregation judges the cohort again, by its own rules.
    `not-in-cohort`, `cohort-too-small`, `threshold-too-high`, `threshold-too-low`
14. Journal: the reply is sealed; the attempt, its secrets and the reply are on disk.
15. Count: the ledger counts the answer.
16. The reply leaves.

The requests of later stages pass step 1, find their attempt (`unknown-attempt`), pass step 6, load
the job as in step 11, pass their own steps (`stages`), and are counted as in step 15. With the last
two comes what this site is to prepare for the next attempt (`slots`).
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from umbel_client.data.site_data import SiteData
from umbel_client.ledger.register import Register, machine_register
from umbel_client.models.adapters.folder import write_adapter
from umbel_client.privacy.attempt_cost import judge_cost
from umbel_client.site.config import ClientConfig
from umbel_client.site.decisions import Decisions
from umbel_client.site.pinned_roster import Pinned, check_own_key
from umbel_client.site.policy import (
    Policy,
    as_asked,
    judge_header,
    judge_operator,
    judge_plan,
    judge_start,
)
from umbel_client.storage.journal import Journal
from umbel_client.storage.kept_adapter import KeptAdapter
from umbel_client.trainer.checks import (
    check_end,
    check_last_advert,
    check_parties,
    check_parts,
    check_ring,
    check_roster,
    check_round,
    check_size_class,
    check_start,
)
from umbel_client.trainer.job import SiteJob, SiteStatus
from umbel_client.trainer.observer import Observer
from umbel_client.trainer.opening import check_payable, open_job
from umbel_client.trainer.site import Site
from umbel_client.trainer.slots import Slots
from umbel_client.trainer.stages import Ahead, StageRequest, answer_stage
from umbel_client.trainer.start import check_known_start, origin_at
from umbel_common.adapters.start import Origin
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import Entropy, decode_canonical, encode
from umbel_common.errors import (
    BudgetError,
    ConfigError,
    DataError,
    LedgerError,
    PolicyRefusal,
    RemoteProtocolError,
    StorageError,
    UmbelError,
    require,
)
from umbel_common.plans.plan import PLAN_VERSIONS, DistributedPrivacy, TrainingPlan
from umbel_common.plans.statements import HEADER_VERSIONS, RELEASE_VERSIONS
from umbel_common.protocol.wire import (
    FillReply,
    FillRequest,
    FinishReply,
    FinishRequest,
    OfferReply,
    OfferRequest,
    OfferUnderRoster,
    PrepareReply,
    PrepareRequest,
    Refusal,
    Request,
    TogetherRequest,
    TrainFromLastRequest,
    TrainReply,
    TrainRequest,
    open_request,
    request_digest,
    size_limit,
)
from umbel_common.secagg import participant
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, Signed, fingerprint

_logger = logging.getLogger("umbel.trainer")


class Trainer:
    """One site, behind a lock: it handles one request at a time."""

    def __init__(
        self,
        config: ClientConfig,
        pinned: Pinned,
        identity: Identity,
        *,
        observer: Observer,
        data: SiteData | None = None,
        register: Register | None = None,
        entropy: Entropy = os.urandom,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Opens the site's journal; a model is loaded when a plan is accepted.

        Args:
            pinned: the roster that this site pinned, and the keys that it holds for revoked.
            data: the site's records; None: they are read now. A site whose data cannot be read
                refuses every plan (`site-not-ready`).
            register: replaced only by simulations and tests, whose data are made up; None: that of
                this machine.
            entropy: replaced only by simulations, which say that they are insecure.
            clock: this machine's local time, for the policy's hours.

        Raises:
            IdentityError: this site is not in the roster, or is there with another key; or its key
                is revoked.
            PolicyRefusal: the site's policy does not name the pinned operator.
            StorageError: the journal cannot be used.
        """
        check_own_key(pinned, config.site, identity)
        judge_operator(config.policy, fingerprint(pinned.roster.operator))
        self._config = config
        self._observer = observer
        self._clock = clock
        self._lock = threading.Lock()
        state = config.state_folder
        state.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._site = Site(
            name=config.site,
            pinned=pinned,
            identity=identity,
            policy=config.policy,
            journal=Journal(state.journal),
            entropy=entropy,
        )
        self._decisions = Decisions(state)
        self._data = SiteData.load(config) if data is None else data
        if register is None:
            for warning in self._data.warnings():
                _logger.warning("%s", warning)
        else:
            # Its sites have no people, and what they lack is what the scenario dealt them.
            _warn_of_simulation(register.folder)
        self._register = register or machine_register()
        self._job: SiteJob | None = None
        self._slots = Slots()
        self._largest = max([size_limit(None), *map(size_limit, self._plans())])

    def close(self) -> None:
        """Releases the journal and the ledger."""
        with self._lock:
            if self._job is not None:
                self._job.close()
            self._site.journal.close()

    def status(self, job: str) -> SiteStatus:
        """The state of an accepted job at this site, for the site's own people.

        Raises:
            RemoteProtocolError: `unknown-plan`.
            UmbelError: the job cannot be opened (`open_job`).
        """
        with self._lock:
            try:
                return self._loaded_job(job).status()
            except _NotReady as not_ready:
                raise not_ready.reason from None

    def largest_request(self) -> int:
        """The size of the largest request that a plan of this site can need, in bytes.

        Only the beginning of a larger one is taken into memory. Does not wait for a request that
        is being handled.
        """
        return self._largest

    def handle(self, sealed: bytes) -> bytes:
        """Answers one sealed request with one sealed reply."""
        asked = request_digest(sealed)
        with self._lock:
            try:
                request = self._opened(sealed)
                # The request has views into it, and can let them go before the site trains.
                del sealed
                return self._answer(request, asked)
            except _NotReady as not_ready:
                return self._refuse(not_ready.reason, asked, "site-not-ready")
            except UmbelError as error:
                return self._refuse(error, asked, _code(error))
            except Exception as unexpected:
                # Nothing that a server can provoke, however odd, may end the site's process.
                fault = UmbelError(
                    f"an unexpected {type(unexpected).__name__} stopped a request",
                    found=unexpected,
                    remedy="please report it: no input should cause this",
                )
                fault.__cause__ = unexpected
                return self._refuse(fault, asked, _code(fault))

    def _refuse(self, error: UmbelError, asked: bytes, code: str) -> bytes:
        self._observer.refused(error)
        return self._site.seal(Refusal(check=code), asked)

    def _opened(self, sealed: bytes) -> Request:
        """Step 1."""
        site = self._site
        # 1
        require(
            site.roster.operator not in site.pinned.revoked,
            "revoked-key",
            "the operator's key is revoked",
            remedy="approve a roster with the operator's new key",
        )
        return open_request(
            site.roster.operator,
            site.name,
            sealed,
            limit=self._largest,
        )

    def _answer(self, request: Request, asked: bytes) -> bytes:
        """What this kind of request needs."""
        site = self._site
        match request:
            case OfferRequest() | OfferUnderRoster():
                return site.seal(self._offer(request), asked)
            case FinishRequest():
                return site.seal(self._finish(request), asked)
            case TrainRequest() | TrainFromLastRequest():
                return self._train(request, asked)
            case PrepareRequest() | FillRequest():
                return site.seal(self._prepare(request), asked)
            case TogetherRequest():
                return self._stage(request.stage, asked, partial(self._ahead, request.ahead))
            case _:
                return self._stage(request, asked)

    def _stage(
        self, request: StageRequest, asked: bytes, ahead: Callable[[], Ahead] | None = None
    ) -> bytes:
        """A stage after the first one, and what was asked for together with it."""
        site = self._site
        header = site.journal.header(request.context)
        # 6, again: the roster may have changed, and a key been revoked, since training.
        check_parties(site, header)
        # 11, without the last advert, which only a request to train shows.
        job = self._loaded_job(header.job)
        reply = answer_stage(site, job, header, request, asked, ahead)
        # 15
        job.record_answers(site.journal.published().answers)
        return reply

    def _prepare(self, request: PrepareRequest | FillRequest) -> PrepareReply | FillReply:
        """Prepares for an attempt that is to come (`slots` has the checks)."""
        if isinstance(request, FillRequest):
            return self._slots.fill(self._site, request)
        plan = self._accepted_plan(request.preparation.job)
        return self._slots.prepare(self._site, plan, self._rules(plan), request.preparation)

    def _ahead(self, request: PrepareRequest | FillRequest) -> Ahead:
        """As `_prepare`; what fails here does not stop the stage that came with it."""
        try:
            return self._prepare(request)
        except UmbelError as error:
            self._observer.refused(error)
            return Refusal(check=_code(error))

    def _offer(self, request: OfferRequest | OfferUnderRoster) -> OfferReply:
        """Accepts a plan, before anything of it takes effect: a job has one plan for ever.

        O1. Plan: the operator signed it.
            `pinned-signature`, `malformed-message`
        O2. Terms: it is a plan of this federation and does not contradict itself; the policy and
            this site's size class allow it. A policy without labels asks its people about them. An
            earlier adapter that it starts from is one that this site has, or may lack.
            `other-federation`, `contradictory-plan`, the checks of `judge_plan` and `judge_cost`,
            `start-unknown`
        O3. Parties: the roster under which the job would run is one that this site pinned
            (`checks`).
            `roster-digest`
        O4. One plan: the job has no other.
            `job-has-other-plan`
        O5. People: the site is not paused, and a person approved the plan where the policy asks for
            it. A plan that nobody has decided on waits on disk, unless the budget could not pay
            for it.
            `site-paused`, `budget`, `delta-for-records`, `site-not-ready`, `awaiting-approval`,
            `too-many-waiting`
            The policy that this process follows names the labels: `site-not-ready`
        O6. Load: the site could read its data when it started; model and ledger fit the plan, and
            the budget allows all of it. Nothing looks at a record (`open_job`).
            `budget`, `delta-for-records`, `site-not-ready`
        O7. Journal: the plan is on disk. From here on, the job can train. A server that offers it
            once more does not know what was prepared, so this site forgets it too.
        """
        site = self._site
        # O1
        plan = site.open(request.plan, PLAN_VERSIONS)
        # O2
        require(
            plan.federation == site.roster.federation,
            "other-federation",
            "a plan is of another federation",
        )
        check_parts(plan)
        judge_plan(as_asked(site.policy, plan), plan)
        judge_cost(site.policy, plan)
        check_size_class(site, plan)
        check_known_start(site, self._config.state_folder, plan)
        # O3
        if isinstance(request, OfferUnderRoster):
            check_roster(site, request.roster)
        # O4
        site.journal.check_plan(plan.job, request.plan)
        # O5
        self._decisions.require_running()
        if site.policy.approval == "each-plan" and not self._decisions.is_approved(plan):
            self._check_payable(plan)
            self._decisions.require_approval(plan, request.plan)
        _require_complete(site.policy, plan)
        # O6
        self._load(plan)
        # O7
        site.journal.accept_plan(plan.job, request.plan)
        self._slots.drop(plan.job)
        self._largest = max(self._largest, size_limit(plan))
        return OfferReply(plan=plan.digest())

    def _train(self, request: TrainRequest | TrainFromLastRequest, asked: bytes) -> bytes:
        """Steps 2 to 16, in the order of the list at the top of this module."""
        site, journal = self._site, self._site.journal
        # 2
        header = site.open(request.header, HEADER_VERSIONS)
        # 3
        plan = self._accepted_plan(header.job)
        # 4
        known = journal.answer(header.context(), "train", asked)
        if known is not None:
            self._loaded_job(plan.job).record_answers(journal.published().answers)
            return known
        # 5
        check_round(site, header, plan)
        # 6
        check_parties(site, header)
        # 7
        journal.check_new(header)
        # 8: judged again, because a site may have tightened its policy since it accepted the plan.
        judge_plan(site.policy, plan)
        judge_cost(site.policy, plan)
        judge_header(site.policy, plan, header)
        check_ring(header, plan)
        # 9
        self._decisions.require_running()
        judge_start(site.policy, self._clock().time(), journal.seconds_trained(plan.job))
        # 10
        kept = self._kept_adapter(plan)
        release, adapter = check_start(
            site, request, header, plan, lambda: self._origin(plan), kept
        )
        journal.keep_release(plan.job, release.round, request.release)
        kept.keep(release.adapter, adapter)
        # 11
        job = self._loaded_job(plan.job)
        if request.last is not None:
            check_last_advert(request.last, job, site.identity)
        # 12
        began = time.monotonic()
        try:
            job.compute(header, adapter)
        finally:
            journal.add_seconds_trained(plan.job, time.monotonic() - began)
        # 13
        head = job.ledger_head()
        # Nothing is signed with the keys of a slot that could be taken again.
        slot = self._slots.take(header)
        state: participant.AttemptState
        if slot is None:
            state, advert = participant.advertise(
                header, site.name, self._rules(plan), site.identity, head, site.entropy
            )
        else:
            state, advert = slot.advertise(header, site.identity, head)
        # 14
        reply = site.seal(TrainReply(advert=advert), asked)
        journal.open_attempt(header, head, encode(state), asked, reply)
        # 15
        job.record_answers(journal.published().answers)
        # 16
        return reply

    def _rules(self, plan: TrainingPlan) -> Rules:
        # The threshold is counted anyway.
        floor = plan.least_survivors if isinstance(plan.privacy, DistributedPrivacy) else 0
        return Rules(
            threshold=plan.aggregation.threshold,
            colluding=self._site.policy.colluding_sites,
            minimum_cohort=max(self._site.policy.minimum_cohort, floor),
        )

    def _finish(self, request: FinishRequest) -> FinishReply:
        """Stores the adapter of a job's last release, and ends the job at this site.

        F1. Release: the operator signed it.
            `pinned-signature`, `malformed-message`
        F2. Plan: this site accepted a plan for the job.
            `unknown-plan`
        F3. Fit: the release is the plan's last, or the last by a signed early end, and the adapter
            is the one that it names (`checks`).
            `pinned-signature`, `malformed-message`, `adapter-length`, `adapter-values`,
            `adapter-digest`, `other-release`, `adapter-too-far`
        F4. Journal: the release is kept.
            `two-releases`
        F5. Adapter: its folder is written.
        F6. End: the secrets of the job's attempts are deleted, with what was prepared and with the
            adapter from which its next round would start.
        """
        site = self._site
        # F1
        release = site.open(request.release, RELEASE_VERSIONS)
        # F2
        plan = self._accepted_plan(release.job)
        # F3
        vector = check_end(site, request, release, plan, lambda: self._origin(plan))
        # F4
        site.journal.keep_release(plan.job, release.round, request.release)
        # F5
        folder = self._config.state_folder.adapter(plan.job)
        write_adapter(
            folder,
            plan,
            vector,
            request.release,
            base_model=Path(self._config.model.path),
        )
        # F6
        site.journal.end_job(plan.job)
        self._slots.drop(plan.job)
        self._kept_adapter(plan).delete()
        self._observer.finished(plan.job, folder)
        return FinishReply(adapter=release.adapter)

    def _kept_adapter(self, plan: TrainingPlan) -> KeptAdapter:
        return KeptAdapter(self._config.state_folder.kept_adapter(plan.job))

    def _origin(self, plan: TrainingPlan) -> Origin:
        """What this site knows of the adapter that a plan starts from."""

        def computed() -> Vector:
            own = self._loaded_job(plan.job).own_start
            assert own is not None  # a job with such a start computes it when it opens
            return own

        return origin_at(self._site, self._config.state_folder, plan, computed)

    def _check_payable(self, plan: TrainingPlan) -> None:
        try:
            check_payable(self._config, plan)
        except (DataError, LedgerError, StorageError) as error:
            raise _NotReady(error) from error

    def _plans(self) -> list[TrainingPlan]:
        return [self._accepted(signed) for signed in self._site.journal.plans()]

    def _accepted_plan(self, job: str) -> TrainingPlan:
        """Step 3: the plan of a job that this site accepted.

        Raises:
            RemoteProtocolError: `unknown-plan`.
        """
        signed = self._site.journal.plan(job)
        if signed is None:
            raise RemoteProtocolError("unknown-plan", f"no plan of job {job} was accepted here")
        return self._accepted(signed)

    def _accepted(self, signed: Signed) -> TrainingPlan:
        """A plan from this site's own journal. Its signature was verified on acceptance, against
        the operator's key of that time, which may have been rotated since."""
        with self._site.journal.errors():
            return decode_canonical(signed.statement, PLAN_VERSIONS)

    def _loaded_job(self, name: str) -> SiteJob:
        """The job with its model, under the plan that was accepted and no other."""
        self._load(self._accepted_plan(name))
        assert self._job is not None  # _load sets it or raises
        return self._job

    def _load(self, plan: TrainingPlan) -> None:
        if self._job is not None and self._job.plan == plan:
            return
        published = self._site.journal.published()
        try:
            if self._job is not None:
                self._job.settle()
                self._job.close()
                self._job = None
            self._job = open_job(
                self._config,
                plan,
                self._site.roster,
                self._data,
                register=self._register,
                published=published,
                observer=self._observer,
                entropy=self._site.entropy,
            )
        except (DataError, LedgerError, StorageError) as error:
            raise _NotReady(error) from error


@functools.cache
def _warn_of_simulation(ledgers: Path) -> None:
    """Says once for all sites of a simulation that it keeps no account on this machine."""
    _logger.warning(
        "THIS IS A SIMULATION: what its data cost is registered in %s only, not on this machine",
        ledgers,
    )


def _require_complete(policy: Policy, plan: TrainingPlan) -> None:
    if as_asked(policy, plan) != policy:
        raise _NotReady(
            ConfigError(
                "an approved plan has labels, and the policy names none",
                field="policy.labels",
                remedy="write them into the policy, unless umbel-client approve did, and start"
                " umbel-client run again: a trainer follows the policy that it was started with",
            )
        )


class _NotReady(Exception):
    """The site's own data, ledger or policy stands in the way of any job, or of this one."""

    def __init__(self, reason: UmbelError) -> None:
        super().__init__(reason.message)
        self.reason = reason


def _code(error: UmbelError) -> str:
    """The code for the server: a check that it can know of, or else a kind of fault.

    A check of our own code (`LocalProtocolError`) is the site's fault, whatever its name.
    """
    match error:
        case RemoteProtocolError() | PolicyRefusal():
            return error.check
        case BudgetError():
            return "budget"
        case _:
            return "site-fault"
