"""Stages 2 to 5 of an attempt: journal, then answer. Input, change of state, save, then send."""

import numpy as np

from umbel_client.site.policy import Policy, judge_survivors
from umbel_client.storage.journal import Journal
from umbel_client.trainer.job import SiteJob
from umbel_common.canonical import Entropy, decode, encode
from umbel_common.errors import RemoteProtocolError
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    ConfirmReply,
    ConfirmRequest,
    MaskReply,
    MaskRequest,
    Reply,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
    seal_reply,
)
from umbel_common.secagg import participant as secagg
from umbel_common.trust.identity import Identity, Roster

StageRequest = ShareRequest | MaskRequest | ConfirmRequest | UnmaskRequest


def answer_stage(
    request: StageRequest,
    header: RoundHeader,
    *,
    session: Journal,
    job: SiteJob,
    policy: Policy,
    site: str,
    roster: Roster,
    identity: Identity,
    entropy: Entropy,
    fingerprint: bytes,
) -> bytes:
    """The sealed answer to a stage, burned on disk before it is returned.

    Args:
        fingerprint: digest of the sealed request, 32 bytes.

    Raises:
        PolicyRefusal: `survivors-differ` or `cohort-difference`.
        RemoteProtocolError: the check of `participant` or `session` that failed; the state on disk
            is as it was.
    """
    context = request.context
    stage = type(request).__name__.removesuffix("Request").lower()
    known = session.answer(context, stage, fingerprint)
    if known is not None:
        return known
    state: secagg.AttemptState = decode(session.state(context), secagg.AttemptState)  # type: ignore[arg-type]  # a union is a decodable type
    after: secagg.AttemptState | None
    reply: Reply
    match state, request:
        case secagg.Advertised(), ShareRequest():
            after, shares = state.receive(request.adverts, roster, entropy)
            reply = ShareReply(context=context, shares=shares)
        case secagg.Shared(), MaskRequest():
            after, vector = state.receive(request.shares, job.ring_vector(header))
            reply = MaskReply(context=context, vector=vector.view(np.uint8).data)
            job.record_sent(header.round)
        case secagg.Masked(), ConfirmRequest():
            judge_survivors(
                policy,
                job.plan,
                request.survivors,
                same_round=session.survivor_sets(header),
                ever=session.survivor_sets(),
            )
            after, signature = state.receive(request.survivors, identity)
            reply = ConfirmReply(context=context, signature=signature)
            # Recorded first: a crash in between leaves a set that binds, and was not signed.
            session.record_survivors(context, request.survivors)
        case secagg.Confirmed(), UnmaskRequest():
            _, revealed = state.receive(request.signatures, roster)
            reply = UnmaskReply(context=context, shares=revealed)
            after = None
        case _:
            raise RemoteProtocolError("stage-order", f"the stage {stage} is out of order here")
    sealed = seal_reply(identity, site, reply, fingerprint)
    session.record_answer(
        context, stage, fingerprint, sealed, None if after is None else encode(after)
    )
    return sealed
