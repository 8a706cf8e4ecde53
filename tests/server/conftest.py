"""Sites without model and data: the real protocol core over deltas that a test chooses."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from umbel_common.adapters.difference import apply_difference
from umbel_common.adapters.site_counts import SiteCounts, with_counts
from umbel_common.adapters.vector import Vector, adapter_digest, from_bytes, size_of
from umbel_common.errors import RemoteProtocolError, UmbelError
from umbel_common.plans.figures import Evaluation, GateResult
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import HEADER_VERSIONS, RELEASE_VERSIONS, Release, RoundHeader
from umbel_common.protocol.wire import (
    ConfirmReply,
    ConfirmRequest,
    FillReply,
    FillRequest,
    FinishReply,
    FinishRequest,
    MaskPreparedRequest,
    MaskReply,
    MaskRequest,
    OfferReply,
    OfferUnderRoster,
    PrepareReply,
    PrepareRequest,
    Refusal,
    Reply,
    Request,
    ShareAgainRequest,
    ShareReply,
    ShareRequest,
    TogetherReply,
    TogetherRequest,
    TrainFromLastRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
    open_request,
    request_digest,
    seal_reply,
    size_limit,
)
from umbel_common.secagg import participant, preparation
from umbel_common.secagg.encoding import RingVector, encode, encoding_of
from umbel_common.secagg.messages import preparation_of
from umbel_common.secagg.rules import Rules
from umbel_common.secagg.unmasking import WrongShare
from umbel_common.trust.identity import Identity, Roster, Signed, open_signed
from umbel_server.jobs.interfaces import Evaluator
from umbel_server.jobs.job import Job
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry


class ToySite:
    """Answers like a site whose training always gives the same delta."""

    def __init__(self, name: str, identity: Identity, roster: Roster, plan: TrainingPlan) -> None:
        self.name = name
        self.identity = identity
        self.roster = roster
        self.plan = plan
        self.requests: list[Request] = []
        self.state: participant.AttemptState | None = None
        self.slot: preparation.Slot | preparation.FilledSlot | None = None
        self.knows_preparing = True
        """False: a site of an Umbel that does not know these messages."""
        self.header: RoundHeader | None = None
        self.adapter: Vector | None = None
        """The adapter from which it trained last."""
        self.started: list[bytes] = []
        """The digest of that adapter, for each request to train that it took."""
        self.brought: list[int | None] = []
        """The bytes of the difference in each request to train; None: the adapter was whole."""
        self.vectors: dict[tuple[int, int], RingVector] = {}
        """(round, attempt) -> the vector before it was masked."""

    def delta(self, round_number: int) -> Vector:
        """A delta that differs between sites and rounds."""
        seed = sum(self.name.encode()) + round_number
        size = size_of(self.plan.trained_tensors(round_number))
        return np.random.default_rng(seed).uniform(-0.5, 0.5, size).astype(np.float32)

    def take_adapter(
        self, request: TrainRequest | TrainFromLastRequest, header: RoundHeader
    ) -> None:
        """Keeps the adapter of a request, or makes it of its difference."""
        plan = self.plan
        self.brought.append(None)
        if isinstance(request, TrainFromLastRequest):
            self.brought[-1] = sum(len(piece) for piece in request.changed)
            held = None if self.adapter is None else adapter_digest(plan.digest(), self.adapter)
            if held != request.onto:
                raise RemoteProtocolError("release-missing", "a toy site has another adapter")
            assert self.adapter is not None
            if request.changed:
                apply_difference(plan, header.round - 1, self.adapter, request.changed)
        else:
            self.adapter = from_bytes(request.adapter, plan.lora.size).copy()
        self.started.append(adapter_digest(plan.digest(), self.adapter))
        assert self.started[-1] == header.adapter

    def handle(self, sealed: bytes) -> bytes:
        request = open_request(self.roster.operator, self.name, sealed, limit=size_limit(self.plan))
        self.requests.append(request)
        try:
            reply = self.answer(request)
        except RemoteProtocolError as error:
            reply = Refusal(check=error.check)
        return seal_reply(self.identity, self.name, reply, request_digest(sealed))

    def answer(self, request: Request) -> Reply:
        if isinstance(request, PrepareRequest | FillRequest | TogetherRequest):
            if not self.knows_preparing:
                return Refusal(check="malformed-message")
            if not isinstance(request, TogetherRequest):
                return self.prepare(request)
            stage = self.answer(request.stage)
            if isinstance(stage, Refusal):
                return stage
            try:
                return TogetherReply(stage=stage, ahead=self.prepare(request.ahead))
            except RemoteProtocolError as error:
                return TogetherReply(stage=stage, ahead=Refusal(check=error.check))
        return self.answer_stage(request)

    def prepare(self, request: PrepareRequest | FillRequest) -> PrepareReply | FillReply | Refusal:
        match self.slot, request:
            case _, PrepareRequest():
                self.slot, keys = preparation.prepare(
                    request.preparation, self.name, self.rules(), self.identity, os.urandom
                )
                return PrepareReply(keys=keys)
            case preparation.Slot() as slot, FillRequest():
                self.slot, shares = slot.fill(request.keys, self.roster, os.urandom)
                return FillReply(context=request.context, shares=shares)
        return Refusal(check="unknown-slot")

    def rules(self) -> Rules:
        return Rules(threshold=self.plan.aggregation.threshold, colluding=0, minimum_cohort=2)

    def advertise(self, header: RoundHeader) -> tuple[participant.AttemptState, Signed]:
        slot, self.slot = self.slot, None
        if isinstance(slot, preparation.FilledSlot) and slot.preparation == preparation_of(header):
            return slot.advertise(header, self.identity, bytes(32))
        return participant.advertise(
            header, self.name, self.rules(), self.identity, bytes(32), os.urandom
        )

    def vector(self, header: RoundHeader) -> RingVector:
        """The vector of an attempt before it is masked."""
        encoding = encoding_of(self.plan, len(header.cohort))
        counts = SiteCounts(score=30.0, records=40.0)
        delta = with_counts(self.delta(header.round), counts, self.plan)
        vector = encode(delta, 1, encoding, os.urandom)
        self.vectors[header.round, header.attempt] = vector.copy()
        return vector

    def answer_stage(self, request: Request) -> Reply:
        header = self.header
        match self.state, request:
            case _, OfferUnderRoster():
                self.slot = None
                return OfferReply(plan=self.plan.digest())
            case _, FinishRequest():
                release = open_signed(request.release, RELEASE_VERSIONS, self.roster.operator)
                return FinishReply(adapter=release.adapter)
            case _, TrainRequest() | TrainFromLastRequest():
                self.header = open_signed(request.header, HEADER_VERSIONS, self.roster.operator)
                self.take_adapter(request, self.header)
                self.state, advert = self.advertise(self.header)
                return TrainReply(advert=advert)
            case participant.Prepared() as state, MaskPreparedRequest():
                assert header is not None
                self.state, masked = state.receive(
                    request.adverts, request.shares, self.roster, self.vector(header)
                )
                return MaskReply(context=request.context, vector=masked.tobytes())
            case participant.Advertised() | participant.Prepared() as state, ShareAgainRequest():
                own = state if isinstance(state, participant.Advertised) else state.advertised
                self.state, shares = own.receive(
                    request.adverts, self.roster, os.urandom, again=True
                )
                return ShareReply(context=request.context, shares=shares)
            case participant.Advertised() as state, ShareRequest():
                self.state, shares = state.receive(request.adverts, self.roster, os.urandom)
                return ShareReply(context=request.context, shares=shares)
            case participant.Shared() as state, MaskRequest():
                assert header is not None
                self.state, masked = state.receive(request.shares, self.vector(header))
                return MaskReply(context=request.context, vector=masked.tobytes())
            case participant.Masked() as state, ConfirmRequest():
                self.state, signature = state.receive(request.survivors, self.identity)
                return ConfirmReply(context=request.context, signature=signature)
            case participant.Confirmed() as state, UnmaskRequest():
                self.state, revealed = state.receive(request.signatures, self.roster)
                return UnmaskReply(context=request.context, shares=revealed)
        return Refusal(check="stage-order")


class LoopLink:
    """`job.Link` without a network: sites answer in turn, unless a test loses the message."""

    def __init__(self, sites: Mapping[str, Callable[[bytes], bytes]]) -> None:
        self.sites = dict(sites)
        self.lost: Callable[[Step, str], bool] = lambda step, site: False
        self.steps: list[Step] = []
        self.sizes: dict[tuple[Step, str], int] = {}
        """(step, site) -> bytes of the sealed request."""

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        self.steps.append(step)
        for site, sealed in requests:
            self.sizes[step, site] = len(sealed)
            if not self.lost(step, site):
                yield site, self.sites[site](sealed)


class Silent:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.aborts: list[tuple[int, int, str]] = []
        self.releases: list[Release] = []
        self.disputes: list[WrongShare] = []
        self.strays: list[tuple[str, str]] = []
        self.evaluations: list[tuple[int, Evaluation, GateResult | None]] = []
        self.counts: list[tuple[int, SiteCounts, int]] = []
        self.unevaluated_rounds: list[tuple[int, UmbelError]] = []
        self.early_ends: list[tuple[int, int]] = []

    def on_asked(self, step: Step, sites: tuple[str, ...]) -> None:
        assert sites

    def on_answered(self, step: Step, site: str, reply: Reply, received: int, sent: int) -> None:
        assert received > 0
        assert sent > 0 or isinstance(reply, Refusal)

    def on_strayed(self, step: Step, site: str, error: RemoteProtocolError) -> None:
        self.strays.append((site, error.check))

    def on_aborted(self, round_number: int, attempt: int, check: str) -> None:
        self.aborts.append((round_number, attempt, check))

    def on_disputed(
        self, round_number: int, attempt: int, wrong_shares: tuple[WrongShare, ...]
    ) -> None:
        self.disputes.extend(wrong_shares)

    def on_released(self, release: Release, adapter: Vector) -> None:
        self.releases.append(release)

    def on_counted(self, round_number: int, counts: SiteCounts, sites: int) -> None:
        self.counts.append((round_number, counts, sites))

    def on_evaluated(
        self, round_number: int, evaluation: Evaluation, gate: GateResult | None
    ) -> None:
        self.evaluations.append((round_number, evaluation, gate))

    def on_unevaluated(self, round_number: int, error: UmbelError) -> None:
        self.unevaluated_rounds.append((round_number, error))

    def on_early_end(self, round_number: int, final: int) -> None:
        self.early_ends.append((round_number, final))


class Setting:
    """A federation of toy sites with the real job, store and registry on disk."""

    def __init__(
        self,
        folder: Path,
        plan: TrainingPlan,
        operator: Identity,
        identities: dict[str, Identity],
        roster: Roster,
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.operator = operator
        self.roster = roster
        self.sites = {
            name: ToySite(name, identity, roster, plan) for name, identity in identities.items()
        }
        self.link = LoopLink({name: site.handle for name, site in self.sites.items()})
        self.observer = Silent()
        self.journal = Journal(folder / "journal.sqlite")
        self.registry = Registry(folder / "registry")

    def job(
        self,
        attempts: int = 3,
        revoked: frozenset[bytes] = frozenset(),
        evaluator: Evaluator | None = None,
    ) -> Job:
        """A new job object over the same disk, as after a restart."""
        return Job(
            self.plan,
            self.roster,
            self.operator,
            journal=self.journal,
            registry=self.registry,
            link=self.link,
            observer=self.observer,
            limits=Limits(attempts=attempts),
            revoked=revoked,
            evaluator=evaluator,
        )


@pytest.fixture
def make_setting(
    tmp_path: Path,
    make_plan: Callable[..., TrainingPlan],
    make_plan2: Callable[..., TrainingPlan],
    make_federation: Callable[[int], tuple[Identity, dict[str, Identity], Roster]],
) -> Iterator[Callable[..., Setting]]:
    """A federation of so many toy sites; keyword arguments replace parts of the plan, which is of
    version 2 if it has a `server`."""
    settings: list[Setting] = []

    def make(count: int, folder: Path = tmp_path, **parts: object) -> Setting:
        operator, identities, roster = make_federation(count)
        plan = (make_plan2 if "server" in parts else make_plan)(**parts)
        setting = Setting(folder, plan, operator, identities, roster)
        settings.append(setting)
        return setting

    yield make
    for setting in settings:
        setting.journal.close()
