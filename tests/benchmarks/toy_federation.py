"""Federations without model and data, for benchmarks of the protocol: all but deltas is real."""

import os
from typing import Any

import numpy as np

from umbel_common.adapters.vector import size_of
from umbel_common.plans.plan import (
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Lora,
    Method,
    Sgd,
    Tensor,
    Training,
    TrainingPlan,
)
from umbel_common.plans.statements import HEADER_VERSIONS, RELEASE_VERSIONS
from umbel_common.protocol.wire import (
    ConfirmReply,
    ConfirmRequest,
    FinishReply,
    FinishRequest,
    MaskReply,
    MaskRequest,
    OfferReply,
    OfferUnderRoster,
    Reply,
    Request,
    ShareReply,
    ShareRequest,
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
from umbel_common.secagg import participant
from umbel_common.secagg.encoding import encode, encoding_of
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, Member, Roster, open_signed

RANK, WIDTH, LAYERS = 8, 4096, 16
PARAMETERS = 2 * RANK * WIDTH * LAYERS
"""1,048,576."""


class Federation:
    """An operator, so many sites, and a plan over an adapter of `PARAMETERS`.

    Its keys are no secrets, so that a second process can make the same federation.
    """

    def __init__(
        self, sites: int, ring_bits: int, *, method: Method = "both", rounds: int = 1
    ) -> None:
        self.operator = Identity(bytes(32))
        self.identities = {
            f"site-{index:02}": Identity(bytes(31) + bytes([1 + index])) for index in range(sites)
        }
        self.roster = Roster(
            federation="clinics",
            operator=self.operator.public_key,
            members=tuple(
                Member(name=name, public_key=identity.public_key)
                for name, identity in self.identities.items()
            ),
        )
        self.plan = make_plan(sites // 2 + 1, ring_bits, method=method, rounds=rounds)

    def sites(self) -> dict[str, "ToySite"]:
        """What answers in each site's name."""
        return {name: ToySite(self, name) for name in self.identities}


def make_plan(
    threshold: int,
    ring_bits: int,
    layers: int = LAYERS,
    *,
    method: Method = "both",
    rounds: int = 1,
) -> TrainingPlan:
    """A plan that no site would train: only its sizes matter here."""
    tensors = [
        Tensor(name=f"layer.{layer}.{role}.weight", shape=shape, role=role)
        for layer in range(layers)
        for role, shape in (("lora_A", (RANK, WIDTH)), ("lora_B", (WIDTH, RANK)))
    ]
    return TrainingPlan(
        federation="clinics",
        job="job",
        model=BaseModel(name="none", digest=bytes(32)),
        task=Classification(labels=("a", "b")),
        lora=Lora(
            rank=RANK,
            alpha=16.0,
            target_modules=("query",),
            layers=None,
            method=method,
            seed=1,
            tensors=tuple(tensors),
        ),
        training=Training(
            rounds=rounds,
            local_steps=1,
            expected_batch_size=1,
            optimizer=Sgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
        ),
        privacy=LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0),
        aggregation=Aggregation(
            threshold=threshold, clip_range=1.0, step=0.01, ring_bits=ring_bits
        ),
    )


class ToySite:
    """The protocol's real participant; its training moves each number by one step of the plan."""

    def __init__(self, federation: Federation, name: str) -> None:
        self._federation = federation
        self._name = name
        self._state: Any = None
        self._cohort = self._round = 0

    def handle(self, sealed: bytes) -> bytes:
        """A sealed reply to a sealed request."""
        operator = self._federation.roster.operator
        limit = size_limit(self._federation.plan)
        request = open_request(operator, self._name, sealed, limit=limit)
        identity = self._federation.identities[self._name]
        reply = self._answer(request, identity)
        return seal_reply(identity, self._name, reply, request_digest(sealed))

    def _answer(self, request: Request, identity: Identity) -> Reply:
        plan, roster = self._federation.plan, self._federation.roster
        match request:
            case OfferUnderRoster():
                return OfferReply(plan=plan.digest())
            case FinishRequest():
                release = open_signed(request.release, RELEASE_VERSIONS, roster.operator)
                return FinishReply(adapter=release.adapter)
            case TrainRequest() | TrainFromLastRequest():
                header = open_signed(request.header, HEADER_VERSIONS, roster.operator)
                rules = Rules(threshold=plan.aggregation.threshold, colluding=0, minimum_cohort=2)
                self._cohort, self._round = len(header.cohort), header.round
                self._state, advert = participant.advertise(
                    header, self._name, rules, identity, bytes(32), os.urandom
                )
                return TrainReply(advert=advert)
            case ShareRequest():
                self._state, shares = self._state.receive(request.adverts, roster, os.urandom)
                return ShareReply(context=request.context, shares=shares)
            case MaskRequest():
                size = size_of(plan.trained_tensors(self._round))
                delta = np.full(size, plan.aggregation.step, dtype=np.float32)
                encoding = encoding_of(plan, self._cohort)
                vector = encode(delta, 1, encoding, os.urandom)
                self._state, masked = self._state.receive(request.shares, vector)
                return MaskReply(context=request.context, vector=masked.tobytes())
            case ConfirmRequest():
                self._state, signature = self._state.receive(request.survivors, identity)
                return ConfirmReply(context=request.context, signature=signature)
            case UnmaskRequest():
                self._state, revealed = self._state.receive(request.signatures, roster)
                return UnmaskReply(context=request.context, shares=revealed)


class Quiet:
    """An observer that nothing is told to."""

    def on_asked(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""

    def on_answered(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""

    def on_aborted(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""
        raise AssertionError("an attempt of honest sites was aborted")

    def on_strayed(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""
        raise AssertionError("a reply of an honest site did not open")

    def on_disputed(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""
        raise AssertionError("honest sites revealed wrong shares")

    def on_released(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""

    def on_counted(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""

    def on_evaluated(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""

    def on_unevaluated(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""

    def on_early_end(self, *_: object) -> None:
        """See `umbel_server.jobs.job.Observer`."""
