"""One attempt at one round: secure aggregation's stages as requests out and replies in.

This module is pure, and must stay so: no clock, no disk, no network, no log and no randomness may
be added. It never keeps a masked vector: the machine adds it to the sum as it arrives.

::

    train --> share --> mask --> confirm --> unmask --> AttemptOutcome
      |         |         |         |           |
      +---------+---------+---------+-----------+--> RoundAborted (too few, or a check failed)

The stages, in their order; `requests` and `_accept` have one case for each. Before stage 1, the
header must name the job's plan and roster (`header`). Every reply must be of this attempt
(`other-attempt`) and answer the current stage (`stage-order`). A reply that fails these, or
`other-context`, is stray: it changes nothing, and the site stays awaited.

1. train: the round header, the last release and its adapter go out, the adapter as a whole or as
   its difference from one that the site has; signed adverts come in.
2. share: all adverts go out; encrypted shares of each site's mask secrets come in. An attempt that
   its whole cohort prepared (`jobs.ahead`) has the shares already: its stage 3 sends the adverts.
3. mask: each site gets the shares meant for it; masked vectors come in, and are summed.
4. confirm: the set of survivors goes out; signatures of it come in.
5. unmask: the signatures go out; one share for each peer comes in, and the sum is unmasked.

The caller sends `requests()`, passes each reply to `receive`, and calls `advance` when `waiting` is
empty or the stage's deadline has passed. A site whose reply breaks the protocol is out of the
attempt; the other sites stay in it while enough of them are left. A reply that comes twice, late or
from another attempt changes nothing: networks do that to honest sites.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import msgspec

from umbel_common.canonical import Value
from umbel_common.errors import LocalProtocolError, RemoteProtocolError, RoundAborted, require
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    ConfirmReply,
    ConfirmRequest,
    LastAdvert,
    MaskPreparedRequest,
    MaskReply,
    MaskRequest,
    Refusal,
    Reply,
    Request,
    ShareAgainRequest,
    ShareReply,
    ShareRequest,
    TrainFromLastRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from umbel_common.secagg import coordinator
from umbel_common.secagg.messages import SurvivorSignature
from umbel_common.secagg.preparing import Filling, Prepared
from umbel_common.secagg.unmasking import Aggregate, LostSecrets
from umbel_common.trust.identity import Roster, Signed

Machine: TypeAlias = (
    coordinator.Advertising
    | coordinator.Sharing
    | coordinator.Masking
    | coordinator.Confirming
    | coordinator.Unmasking
)

STRAY = frozenset({"other-attempt", "other-context", "stage-order"})
"""Checks that an honest site's reply fails if it was sent twice or came late."""

LOST_ATTEMPT = "attempt-lost"
"""Refusal of a site that was stopped while it computed in distributed mode, or lost what it had
computed. It never computes an attempt twice, and takes part in the next one."""

NO_DIFFERENCE = frozenset({"release-missing", "malformed-message"})
"""Refusals of a site that cannot take the difference of a release: it has lost the adapter that the
difference builds on, or does not know the message. It takes part in the next attempt."""


class Evidence(Value, frozen=True):
    """What the sites signed in an attempt, for the transcript."""

    adverts: tuple[Signed, ...] = ()
    confirmations: tuple[SurvivorSignature, ...] = ()


@dataclass(frozen=True)
class AttemptOutcome:
    """A finished attempt: the sum over `aggregate.survivors`, and the evidence for it."""

    aggregate: Aggregate
    evidence: Evidence


@dataclass(frozen=True)
class Attempt:
    """The state of one attempt; every method returns a new one."""

    header: RoundHeader
    first_request: TrainRequest | None
    """None after the first stage: it holds an adapter, which is as large as the sum."""
    machine: Machine
    refusals: Mapping[str, str]
    """Site -> reason code, for sites that refused or whose reply was refused: they are out."""
    evidence: Evidence
    unwilling: frozenset[str] = frozenset()
    """Sites that refused to train: they would refuse the next attempt too."""
    last: Mapping[str, LastAdvert] = field(default_factory=dict)
    """Site -> its last advert before this attempt; each site is shown its own."""
    from_last: Mapping[str, TrainFromLastRequest] = field(default_factory=dict)
    """Site -> its first request, for sites that are sent a difference; empty after the first stage,
    as `first_request` is None."""

    @property
    def stage(self) -> str:
        """The name of the stage whose replies are awaited."""
        match self.machine:
            case coordinator.Advertising():
                return "train"
            case coordinator.Sharing():
                return "share"
            case coordinator.Masking():
                return "mask"
            case coordinator.Confirming():
                return "confirm"
            case coordinator.Unmasking():
                return "unmask"

    @property
    def waiting(self) -> frozenset[str]:
        """The sites whose answers may still come."""
        return self.machine.waiting - self.refusals.keys()

    def requests(self) -> dict[str, Request]:
        """Returns the request of this stage for each site."""
        context = self.header.context()
        match self.machine:
            # 1
            case coordinator.Advertising():
                request = self.first_request
                assert request is not None  # `advance` drops it after this stage
                return {
                    site: msgspec.structs.replace(
                        self.from_last.get(site, request), last=self.last.get(site)
                    )
                    for site in self.header.cohort
                }
            # 2
            case coordinator.Sharing() as machine:
                ask = ShareAgainRequest if machine.again else ShareRequest
                return {
                    site: ask(context=context, adverts=adverts)
                    for site, adverts in machine.requests().items()
                }
            # 3
            case coordinator.Masking(unseen=None) as machine:
                return {
                    site: MaskRequest(context=context, shares=shares)
                    for site, shares in machine.requests().items()
                }
            case coordinator.Masking(unseen=adverts) as machine:
                assert adverts is not None  # the case before
                return {
                    site: MaskPreparedRequest(context=context, adverts=adverts, shares=shares)
                    for site, shares in machine.requests().items()
                }
            # 4
            case coordinator.Confirming() as machine:
                return {
                    site: ConfirmRequest(context=context, survivors=survivors)
                    for site, survivors in machine.requests().items()
                }
            # 5
            case coordinator.Unmasking() as machine:
                return {
                    site: UnmaskRequest(context=context, signatures=signatures)
                    for site, signatures in machine.requests().items()
                }

    def receive(self, site: str, reply: Reply) -> "Attempt":
        """Takes one site's reply: the first one that answers this stage counts.

        After a refusal, or a reply that breaks a rule, the site is out. A stray reply changes
        nothing.
        """
        if site not in self.waiting:
            return self
        if isinstance(reply, Refusal):
            unwilling = self.unwilling
            excused = NO_DIFFERENCE if site in self.from_last else frozenset()
            if self.stage == "train" and reply.check not in {LOST_ATTEMPT, *excused}:
                unwilling |= {site}
            refusals = {**self.refusals, site: reply.check}
            return replace(self, refusals=refusals, unwilling=unwilling)
        try:
            return replace(self, machine=self._accept(site, reply))
        except RemoteProtocolError as error:
            if error.check in STRAY:
                return self
            return replace(self, refusals={**self.refusals, site: error.check})

    def _accept(self, site: str, reply: Reply) -> Machine:
        # Every reply.
        context = getattr(reply, "context", self.header.context())
        require(
            context == self.header.context(), "other-attempt", "a reply belongs to another attempt"
        )
        match self.machine, reply:
            # 1
            case coordinator.Advertising() as machine, TrainReply():
                return machine.receive(site, reply.advert)
            # 2
            case coordinator.Sharing() as machine, ShareReply():
                return machine.receive(site, reply.shares)
            # 3
            case coordinator.Masking() as machine, MaskReply():
                return machine.receive(site, reply.vector)
            # 4
            case coordinator.Confirming() as machine, ConfirmReply():
                return machine.receive(site, reply.signature)
            # 5
            case coordinator.Unmasking() as machine, UnmaskReply():
                return machine.receive(site, reply.shares)
        raise RemoteProtocolError("stage-order", f"a reply does not answer the stage {self.stage}")

    def advance(self) -> "Attempt | AttemptOutcome":
        """Closes the stage with the sites that have answered.

        Raises:
            RoundAborted: too few answered, or the revealed shares do not fit.
        """
        match self.machine:
            case coordinator.Unmasking() as machine:
                return AttemptOutcome(aggregate=machine.close(), evidence=self.evidence)
            case machine:
                following = replace(self, machine=machine.close(), first_request=None, from_last={})
        match following.machine:
            case coordinator.Sharing() as machine:
                adverts = next(iter(machine.requests().values()))
                return replace(following, evidence=Evidence(adverts=adverts))
            case coordinator.Masking(unseen=adverts) if adverts is not None:
                return replace(following, evidence=Evidence(adverts=adverts))
            case coordinator.Unmasking() as machine:
                signatures = next(iter(machine.requests().values()))
                evidence = Evidence(adverts=self.evidence.adverts, confirmations=signatures)
                return replace(following, evidence=evidence)
            case _:
                return following


def open_attempt(
    header: RoundHeader,
    roster: Roster,
    plan: TrainingPlan,
    first_request: TrainRequest,
    vector_length: int,
    last: Mapping[str, LastAdvert],
    prepared: Prepared | Filling | None = None,
    from_last: Mapping[str, TrainFromLastRequest] | None = None,
) -> Attempt:
    """Opens an attempt; nothing was sent yet.

    Args:
        first_request: the signed header, with the release and adapter to train from.
        vector_length: number of elements in each masked vector (trained parameters and the weight).
        last: site -> its last advert.
        prepared: the keys and shares that the cohort prepared for this attempt; `Filling` where not
            all of them came.
        from_last: site -> its first request, where another takes the place of `first_request`.

    Raises:
        IdentityError: a site of the cohort is not in the roster.
        LocalProtocolError: `header` if the header names another plan or roster; `threshold` if the
            cohort cannot reach the plan's; `slot` if another attempt was prepared.
    """
    # Before stage 1.
    if header.plan != plan.digest() or header.roster != roster.digest():
        raise LocalProtocolError("header", "a header names another plan or roster than its job")
    machine = coordinator.open_attempt(
        header,
        roster,
        plan.aggregation.threshold,
        plan.aggregation.ring_bits,
        vector_length,
        least=plan.least_survivors,
        prepared=prepared,
    )
    return Attempt(
        header=header,
        first_request=first_request,
        machine=machine,
        refusals={},
        evidence=Evidence(),
        last=last,
        from_last=from_last or {},
    )


def owners_to_leave_out(error: RoundAborted) -> frozenset[str]:
    """Returns the owners of lost secrets, unless a single lying site could have framed them.

    As many lying sites as it takes to frame an honest owner could abort every attempt anyway, by
    lying or by silence. An owner that is not left out could abort every attempt alone, at no cost.
    """
    lost = error.found
    if isinstance(lost, LostSecrets) and lost.tolerated > 0:
        return frozenset(lost.owners)
    return frozenset()
