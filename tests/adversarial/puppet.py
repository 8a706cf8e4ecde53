"""A site that the server plays."""

import os

import numpy as np

from umbel_common.adapters.vector import size_of
from umbel_common.canonical import decode_canonical
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import HEADER_VERSIONS
from umbel_common.protocol.wire import (
    ConfirmReply,
    ConfirmRequest,
    FillReply,
    FillRequest,
    MaskPreparedRequest,
    MaskReply,
    MaskRequest,
    PrepareReply,
    PrepareRequest,
    Reply,
    Request,
    ShareAgainRequest,
    ShareReply,
    ShareRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from umbel_common.secagg import participant, preparation
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, Roster


class Puppet:
    """A site that the server plays, or that colludes with it. Its delta and its weight are zero."""

    def __init__(self, name: str, identity: Identity, plan: TrainingPlan) -> None:
        self.name = name
        self.identity = identity
        self.plan = plan
        self.state: participant.AttemptState | None = None
        self.slot: preparation.Slot | preparation.FilledSlot | None = None
        self.length = 0
        self.mask_secret = b""

    def answer(self, request: Request, roster: Roster) -> Reply:
        """The answer by the protocol, under the roster with which the server plays the site."""
        rules = Rules(threshold=self.plan.aggregation.threshold, colluding=0, minimum_cohort=1)
        match self.slot, request:
            case _, PrepareRequest():
                self.slot, keys = preparation.prepare(
                    request.preparation, self.name, rules, self.identity, os.urandom
                )
                return PrepareReply(keys=keys)
            case preparation.Slot() as slot, FillRequest():
                self.slot, shares = slot.fill(request.keys, roster, os.urandom)
                return FillReply(context=request.context, shares=shares)
            case preparation.FilledSlot() as slot, TrainRequest():
                header = decode_canonical(request.header.statement, HEADER_VERSIONS)
                self.slot = None
                self.length = size_of(self.plan.trained_tensors(header.round)) + 1
                self.state, advert = slot.advertise(header, self.identity, bytes(32))
                self.mask_secret = self.state.advertised.mask_secret
                return TrainReply(advert=advert)
        match self.state, request:
            case _, TrainRequest():
                header = decode_canonical(request.header.statement, HEADER_VERSIONS)
                self.length = size_of(self.plan.trained_tensors(header.round)) + 1
                self.state, advert = participant.advertise(
                    header, self.name, rules, self.identity, bytes(32), os.urandom
                )
                self.mask_secret = self.state.mask_secret
                return TrainReply(advert=advert)
            case participant.Prepared() as state, MaskPreparedRequest():
                zeros = np.zeros(self.length, dtype="<u4")
                self.state, masked = state.receive(request.adverts, request.shares, roster, zeros)
                return MaskReply(context=request.context, vector=masked.tobytes())
            case participant.Advertised() | participant.Prepared() as state, ShareAgainRequest():
                own = state if isinstance(state, participant.Advertised) else state.advertised
                self.state, shares = own.receive(request.adverts, roster, os.urandom, again=True)
                return ShareReply(context=request.context, shares=shares)
            case participant.Advertised() as state, ShareRequest():
                self.state, shares = state.receive(request.adverts, roster, os.urandom)
                return ShareReply(context=request.context, shares=shares)
            case participant.Shared() as state, MaskRequest():
                zeros = np.zeros(self.length, dtype="<u4")
                self.state, masked = state.receive(request.shares, zeros)
                return MaskReply(context=request.context, vector=masked.tobytes())
            case participant.Masked() as state, ConfirmRequest():
                self.state, signature = state.receive(request.survivors, self.identity)
                return ConfirmReply(context=request.context, signature=signature)
            case participant.Confirmed() as state, UnmaskRequest():
                self.state, revealed = state.receive(request.signatures, roster)
                return UnmaskReply(context=request.context, shares=revealed)
        raise AssertionError(f"{type(request).__name__} in state {type(self.state).__name__}")
