"""What a job's sites prepare for its next attempt, in messages that go to them anyway.

The keys and shares of an attempt need neither its adapter nor its records. So the sites prepare
them while they end the attempt before: keys with their confirmations, shares with what they reveal.
An attempt that its whole cohort prepared has four stages in place of five
(`umbel_common.secagg.preparation`). All others have five, and nothing is lost: a site that was
restarted, a cohort that changed, a round that is tried again.

Nothing may be kept here on disk. A job that is resumed has nothing prepared.
"""

from collections.abc import Mapping

from umbel_common.errors import RemoteProtocolError
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    ConfirmRequest,
    FillReply,
    FillRequest,
    PrepareReply,
    PrepareRequest,
    Refusal,
    Reply,
    Request,
    TogetherReply,
    TogetherRequest,
    UnmaskRequest,
)
from umbel_common.secagg.messages import Preparation, preparation_of
from umbel_common.secagg.preparing import Filling, Prepared, Preparing
from umbel_common.trust.identity import Roster
from umbel_server.jobs.exchange import Exchange
from umbel_server.messaging.link import Step

_UNKNOWN = Refusal(check="malformed-message")
"""What a site says to a message that its Umbel does not know."""


class Ahead:
    """One job's preparations, one attempt at a time."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._machine: Preparing | Filling | Prepared | None = None
        self._filling: dict[bytes, Filling] = {}
        """By the context of a preparation: sites may have a slot for it, until its attempt begins.
        One that an attempt in between leaves out keeps its slot."""
        self._prepares: set[str] = set()
        """Sites that have prepared keys since this process began. Only they are sent a stage
        together with a preparation: an older site would refuse both."""

    def ask(self, preparation: Preparation, exchange: Exchange) -> None:
        """Has an attempt prepared by requests of their own, before the first attempt of a run.

        A site that does not answer in the time of a stage holds this up once.
        """
        self._machine = Preparing(preparation, self._roster)
        for stage in ("prepare", "fill"):
            request = self._request()
            if request is None:
                break
            step = Step(stage, preparation.round, preparation.attempt)
            waiting = set(preparation.cohort)
            for site, reply in exchange.ask(step, dict.fromkeys(preparation.cohort, request)):
                self._receive(site, reply)
                waiting.discard(site)
                if not waiting or isinstance(reply, Refusal):
                    break
            self._close()

    def together(
        self, stage: str, requests: Mapping[str, Request], preparation: Preparation | None
    ) -> Mapping[str, Request]:
        """The requests of a stage, each with what its site is to prepare.

        Args:
            preparation: of the attempt that is expected to follow; None: none is.
        """
        whole = preparation is not None and set(requests) == set(preparation.cohort)
        match stage:
            case "confirm" if whole and self._prepares.issuperset(requests):
                assert preparation is not None  # it has a whole cohort
                self._machine = Preparing(preparation, self._roster)
            case "unmask" if whole:
                self._close()
            case "confirm" | "unmask":
                self._machine = None
        ahead = self._request()
        if ahead is None:
            return requests
        return {
            site: TogetherRequest(stage=request, ahead=ahead)
            for site, request in requests.items()
            if isinstance(request, ConfirmRequest | UnmaskRequest)
        }

    def split(self, site: str, reply: Reply) -> Reply:
        """The reply to a stage, after the other half of it was taken."""
        if isinstance(reply, TogetherReply):
            self._receive(site, reply.ahead)
            return reply.stage
        if reply == _UNKNOWN:
            self._prepares.discard(site)
        return reply

    def take(self, header: RoundHeader) -> Prepared | Filling | None:
        """What was prepared for an attempt, once; `Filling`: not all of it, or it is forgotten, but
        sites may have a slot; None: no site was asked for shares.
        """
        self._close()
        prepared, self._machine = self._machine, None
        preparation = preparation_of(header)
        filling = self._filling.pop(preparation.context(), None)
        if isinstance(prepared, Prepared) and prepared.preparation == preparation:
            return prepared
        return filling

    def _request(self) -> PrepareRequest | FillRequest | None:
        match self._machine:
            case Preparing(preparation=preparation):
                return PrepareRequest(preparation=preparation)
            case Filling(preparation=preparation, signed=keys):
                return FillRequest(context=preparation.context(), keys=keys)
            case _:
                return None

    def _receive(self, site: str, reply: Reply) -> None:
        """Takes a site's half; a wrong one is as good as none, since all must prepare."""
        try:
            match self._machine, reply:
                case Preparing() as machine, PrepareReply():
                    self._machine = machine.receive(site, reply.keys)
                    self._prepares.add(site)
                case Filling() as machine, FillReply():
                    if reply.context == machine.preparation.context():
                        self._machine = machine.receive(site, reply.shares)
        except RemoteProtocolError:
            return

    def _close(self) -> None:
        match self._machine:
            case Preparing() as machine:
                self._machine = filling = machine.close()
                if filling is not None:
                    self._filling[filling.preparation.context()] = filling
            case Filling() as machine:
                self._machine = machine.close()
