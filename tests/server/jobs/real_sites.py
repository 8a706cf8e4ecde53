"""The sites of one attempt, each the real participant over a random vector."""

import os
from typing import Any

import numpy as np

from umbel_common.errors import RemoteProtocolError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    ConfirmReply,
    ConfirmRequest,
    MaskReply,
    MaskRequest,
    Refusal,
    Reply,
    Request,
    ShareReply,
    ShareRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from umbel_common.secagg import participant
from umbel_common.secagg.masking import add_masks
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, Roster


class Sites:
    """Each answers a stage once and refuses what it must."""

    def __init__(
        self,
        header: RoundHeader,
        plan: TrainingPlan,
        identities: dict[str, Identity],
        roster: Roster,
        length: int,
    ) -> None:
        self.header = header
        self.identities = identities
        self.roster = roster
        self.rules = Rules(threshold=plan.aggregation.threshold, colluding=0, minimum_cohort=2)
        self.states: dict[str, Any] = {}
        dtype = f"<u{plan.aggregation.ring_bits // 8}"
        self.vectors = {
            site: np.frombuffer(os.urandom(length * np.dtype(dtype).itemsize), dtype)
            for site in header.cohort
        }
        self.masks: dict[str, Any] = {}
        """What each site's keys add to its vector, for the U2 that it was told."""

    def answer(self, site: str, request: Request) -> Reply:
        try:
            return self._answer(site, request)
        except RemoteProtocolError as error:
            return Refusal(check=error.check)

    def _answer(self, site: str, request: Request) -> Reply:
        identity = self.identities[site]
        match self.states.get(site), request:
            case None, TrainRequest():
                self.states[site], advert = participant.advertise(
                    self.header, site, self.rules, identity, bytes(32), os.urandom
                )
                return TrainReply(advert=advert)
            case participant.Advertised() as state, ShareRequest():
                self.states[site], shares = state.receive(request.adverts, self.roster, os.urandom)
                return ShareReply(context=request.context, shares=shares)
            case participant.Shared() as state, MaskRequest():
                self.masks[site] = self._mask(state, request)
                vector = self.vectors[site].copy()
                self.states[site], masked = state.receive(request.shares, vector)
                return MaskReply(context=request.context, vector=masked.tobytes())
            case participant.Masked() as state, ConfirmRequest():
                self.states[site], signature = state.receive(request.survivors, identity)
                return ConfirmReply(context=request.context, signature=signature)
            case participant.Confirmed() as state, UnmaskRequest():
                self.states[site], revealed = state.receive(request.signatures, self.roster)
                return UnmaskReply(context=request.context, shares=revealed)
        return Refusal(check="stage-order")

    def _mask(self, state: participant.Shared, request: MaskRequest) -> Any:
        keys = {peer.peer: peer.mask_key for peer in state.peers}
        senders = [share.sender for share in request.shares]
        mask = np.zeros_like(self.vectors[state.site])
        add_masks(
            mask,
            added=[state.self_mask_key, *(keys[name] for name in senders if name > state.site)],
            subtracted=[keys[name] for name in senders if name < state.site],
        )
        return mask
