"""A plan is refused before people are asked or anything is charged, where its round could not
succeed or be paid for."""

from collections.abc import Callable

import msgspec
import pytest
from adversarial.federation import Federation

from umbel_client.site.decisions import Decisions
from umbel_client.site.state_folder import StateFolder
from umbel_client.trainer import handler
from umbel_common.errors import BudgetError, RemoteProtocolError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.protocol.wire import OfferReply, OfferUnderRoster, TrainReply
from umbel_common.trust.identity import Roster, sign

OpenFederation = Callable[..., Federation]
ASKED = 'approval = "each-plan"'
FORMER, NEWCOMER = "site-00", "site-02"


def offer(
    federation: Federation, plan: TrainingPlan | None = None, roster: Roster | None = None
) -> OfferUnderRoster:
    signed = sign(federation.operator, plan or federation.plan)
    return OfferUnderRoster(plan=signed, roster=(roster or federation.roster).digest())


def waiting(federation: Federation, site: str) -> int:
    state = StateFolder(federation.folder / site / "state")
    return len(Decisions(state).proposals())


def approve(federation: Federation, site: str) -> None:
    state = StateFolder(federation.folder / site / "state")
    Decisions(state).approve(federation.plan.digest())


def test_a_site_with_another_roster_costs_the_others_no_round(
    open_federation: OpenFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = open_federation(policies={"*": ASKED})
    older = federation.make_roster(
        {site: key for site, key in federation.identities.items() if site != NEWCOMER}
    )
    federation.start(FORMER, roster=older)
    # With the check, nobody is asked, and the operator reads which site it is and why.
    assert federation.refusal(FORMER, offer(federation)) == "roster-digest"
    assert waiting(federation, FORMER) == 0
    error = federation.observers[FORMER].errors[-1]
    assert isinstance(error, RemoteProtocolError)
    assert (error.found, error.accepted) == (
        federation.roster.digest().hex(),
        older.digest().hex(),
    )
    assert "umbel-client roster approve FILE" in str(error.remedy)
    # Without it, everybody accepts, and the newcomer pays for a round that cannot succeed.
    for site in (FORMER, NEWCOMER):
        approve(federation, site)
        with monkeypatch.context() as patch:
            patch.setattr(handler, "check_roster", lambda *_: None)
            assert isinstance(federation.send(site, offer(federation)), OfferReply)
    assert isinstance(federation.send(NEWCOMER, federation.train_request()), TrainReply)
    assert federation.spent_rounds(NEWCOMER) == 1
    assert federation.refusal(FORMER, federation.train_request()) == "roster-digest"
    # A job that began under the roster before it continues where both were pinned.
    federation.start(FORMER, former=(older,))
    assert isinstance(federation.send(FORMER, offer(federation, roster=older)), OfferReply)
    assert isinstance(federation.send(FORMER, offer(federation)), OfferReply)


def test_nobody_is_asked_about_a_plan_that_the_budget_cannot_pay(
    open_federation: OpenFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = open_federation(count=3, policies={"*": ASKED})
    approve(federation, FORMER)
    assert isinstance(federation.send(FORMER, offer(federation)), OfferReply)
    assert isinstance(federation.send(FORMER, federation.train_request()), TrainReply)
    # Half of the first plan and all of a second one are more than the total of 10.
    second = msgspec.structs.replace(federation.plan, job="second")
    assert federation.refusal(FORMER, offer(federation, second)) == "budget"
    assert isinstance(federation.observers[FORMER].errors[-1], BudgetError)
    assert waiting(federation, FORMER) == 0
    # Without the check, people are asked in vain.
    monkeypatch.setattr(handler, "check_payable", lambda *_: None)
    assert federation.refusal(FORMER, offer(federation, second)) == "awaiting-approval"
    assert waiting(federation, FORMER) == 1
