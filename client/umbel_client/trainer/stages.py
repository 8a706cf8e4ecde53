"""Stages 2 to 5 of an attempt: shares, masked delta, survivors, unmasking. First save, then send.

What this module must keep, whatever is changed in it: nothing is signed or returned before what it
follows from is on disk, no stage is answered twice with different bytes, and no stage reads the
delta but for masking it. An answer passes these steps; `handler` has opened the request's seal and
checked the parties of the attempt before.

1. Repetition: a stage that was answered gets the same bytes again, and another request for it is
   refused (journal: `second-answer`).
2. State: the attempt is open, and its secrets are read from the journal (`attempt-over`).
3. Change: the stage is the next one (`stage-order`). Secure aggregation checks what it was sent,
   and gives the next state and the reply. Two stages do something of their own:
   3a. masking: the delta is loaded before it is masked: a lost, failed or damaged one stops here
       (LedgerError; in distributed mode, `attempt-lost` for a lost one). After the checks, the
       ledger records that the delta leaves;
   3b. confirming: before the checks, the policy judges the set of survivors
       (`survivors-below-plan`, `survivors-differ`, `cohort-difference`); after them, the journal
       keeps it.
   What was asked for together with a stage is answered after it; a refusal of that is an answer.
4. Journal: the sealed reply and the next state are on disk. The secrets of an attempt are deleted
   with its last answer.
5. The caller counts the reply in the ledger, and then it leaves (`handler`, step 15).
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np

from umbel_client.site.policy import judge_survivors
from umbel_client.trainer.job import SiteJob
from umbel_client.trainer.site import Site
from umbel_common.canonical import decode, encode
from umbel_common.errors import RemoteProtocolError
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    ConfirmReply,
    ConfirmRequest,
    FillReply,
    MaskPreparedRequest,
    MaskReply,
    MaskRequest,
    PrepareReply,
    Refusal,
    Reply,
    ShareAgainRequest,
    ShareReply,
    ShareRequest,
    TogetherReply,
    UnmaskReply,
    UnmaskRequest,
)
from umbel_common.secagg import participant
from umbel_common.secagg.encoding import RingVector

StageRequest: TypeAlias = (
    ShareRequest
    | ShareAgainRequest
    | MaskRequest
    | MaskPreparedRequest
    | ConfirmRequest
    | UnmaskRequest
)
Ahead: TypeAlias = PrepareReply | FillReply | Refusal
"""What this site prepares, together with a stage, for an attempt that is to come."""

_STAGES: dict[type[StageRequest], str] = {
    ShareRequest: "share",
    ShareAgainRequest: "share",
    MaskRequest: "mask",
    MaskPreparedRequest: "mask",
    ConfirmRequest: "confirm",
    UnmaskRequest: "unmask",
}
"""Two ways to ask for shares are one stage, and so are two ways to ask for a vector."""


def answer_stage(
    site: Site,
    job: SiteJob,
    header: RoundHeader,
    request: StageRequest,
    asked: bytes,
    ahead: Callable[[], Ahead] | None = None,
) -> bytes:
    """The sealed answer to a stage, on disk before it is returned.

    Args:
        asked: digest of the sealed request, 32 bytes.
        ahead: answers what was asked for together with the stage.

    Raises:
        PolicyRefusal: see `judge_survivors` (step 3b).
        RemoteProtocolError: the check of the journal (steps 1 and 2) or of secure aggregation
            (step 3) that failed; `stage-order`; or `attempt-lost` (step 3a). The state on disk is
            as it was.
        LedgerError: the round's training failed, or its delta is lost or damaged (step 3a); or the
            ledger has no such delta.
        LocalProtocolError: our own code used secure aggregation in a way that it does not allow.
        StorageError: the journal is damaged, or the journal or the ledger cannot be written.
    """
    journal, context = site.journal, request.context
    stage = _STAGES[type(request)]
    # 1
    known = journal.answer(context, stage, asked)
    if known is not None:
        return known
    # 2
    held = journal.state(context)
    with journal.errors():
        state: participant.AttemptState = decode(held, participant.AttemptState)  # type: ignore[arg-type]  # a union is a decodable type
    after: participant.AttemptState | None
    reply: Reply
    # 3
    match state, request:
        case participant.Advertised(), ShareRequest():
            after, shares = state.receive(request.adverts, site.roster, site.entropy)
            reply = ShareReply(context=context, shares=shares)
        case participant.Advertised() | participant.Prepared(), ShareAgainRequest():
            own = state if isinstance(state, participant.Advertised) else state.advertised
            after, shares = own.receive(request.adverts, site.roster, site.entropy, again=True)
            reply = ShareReply(context=context, shares=shares)
        case participant.Shared(), MaskRequest():
            # 3a
            after, reply = _mask(job, header, partial(state.receive, request.shares))
        case participant.Prepared(), MaskPreparedRequest():
            # 3a
            mask = partial(state.receive, request.adverts, request.shares, site.roster)
            after, reply = _mask(job, header, mask)
        case participant.Masked(), ConfirmRequest():
            # 3b, before the checks.
            judge_survivors(
                site.policy,
                job.plan,
                request.survivors,
                same_round=journal.survivor_sets(header),
                ever=journal.survivor_sets(),
            )
            after, signature = state.receive(request.survivors, site.identity)
            reply = ConfirmReply(context=context, signature=signature)
            # 3b, after the checks and before the answer: a crash in between leaves a set that binds
            # this site, unsigned.
            journal.record_survivors(context, request.survivors)
        case participant.Confirmed(), UnmaskRequest():
            _, revealed = state.receive(request.signatures, site.roster)
            reply = UnmaskReply(context=context, shares=revealed)
            after = None
        case _:
            raise RemoteProtocolError("stage-order", f"the stage {stage} is out of order here")
    if ahead is not None and isinstance(reply, ConfirmReply | UnmaskReply):
        reply = TogetherReply(stage=reply, ahead=ahead())
    sealed = site.seal(reply, asked)
    # 4
    journal.record_answer(context, stage, asked, sealed, None if after is None else encode(after))
    # 5
    return sealed


def _mask(
    job: SiteJob,
    header: RoundHeader,
    mask: Callable[[RingVector], tuple[participant.Masked, RingVector]],
) -> tuple[participant.Masked, MaskReply]:
    """Step 3a."""
    # Before the checks.
    encoded = job.ring_vector(header)
    after, vector = mask(encoded)
    reply = MaskReply(context=header.context(), vector=vector.view(np.uint8).data)
    # After the checks.
    job.record_sent(header)
    return after, reply
