"""What people decide about plans holds over restarts, for the plan that they saw and no other."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from umbel_client.site.decisions import MOST_WAITING, Decisions
from umbel_client.site.state_folder import StateFolder
from umbel_common.errors import PolicyRefusal, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.trust.identity import Identity, sign

MakePlan = Callable[..., TrainingPlan]
OPERATOR = Identity.generate(os.urandom)


def refusal(decisions: Decisions, plan: TrainingPlan) -> str | None:
    try:
        decisions.require_approval(plan, sign(OPERATOR, plan))
    except PolicyRefusal as error:
        return error.check
    return None


def test_a_plan_waits_until_it_is_approved(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    assert refusal(Decisions(StateFolder(tmp_path)), plan) == "awaiting-approval"
    (waiting,) = Decisions(StateFolder(tmp_path)).proposals()
    assert (waiting.plan, waiting.digest) == (plan, plan.digest())
    Decisions(StateFolder(tmp_path)).approve(waiting.digest)
    assert refusal(Decisions(StateFolder(tmp_path)), plan) is None
    assert Decisions(StateFolder(tmp_path)).proposals() == []


def test_an_approval_is_of_one_plan(tmp_path: Path, make_plan: MakePlan) -> None:
    decisions = Decisions(StateFolder(tmp_path))
    decisions.approve(make_plan().digest())
    assert refusal(decisions, make_plan(job="other")) == "awaiting-approval"


def test_a_rejected_plan_waits_again_when_it_is_proposed_again(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    decisions = Decisions(StateFolder(tmp_path))
    assert refusal(decisions, make_plan()) == "awaiting-approval"
    decisions.reject(make_plan().digest())
    assert decisions.proposals() == []
    assert refusal(decisions, make_plan()) == "awaiting-approval"
    assert len(decisions.proposals()) == 1


def test_a_server_cannot_fill_the_disk_with_proposals(tmp_path: Path, make_plan: MakePlan) -> None:
    decisions = Decisions(StateFolder(tmp_path))
    plans = [make_plan(job=f"job-{number}") for number in range(MOST_WAITING + 1)]
    checks = [refusal(decisions, plan) for plan in plans]
    assert checks == ["awaiting-approval"] * MOST_WAITING + ["too-many-waiting"]
    # One that waits already is not one more.
    assert refusal(decisions, plans[0]) == "awaiting-approval"
    assert len(decisions.proposals()) == MOST_WAITING


def test_a_pause_holds_until_it_is_undone(tmp_path: Path) -> None:
    Decisions(StateFolder(tmp_path)).pause()
    with pytest.raises(PolicyRefusal) as caught:
        Decisions(StateFolder(tmp_path)).require_running()
    assert caught.value.check == "site-paused"
    Decisions(StateFolder(tmp_path)).resume()
    Decisions(StateFolder(tmp_path)).require_running()


def test_what_was_damaged_is_named(tmp_path: Path, make_plan: MakePlan) -> None:
    decisions = Decisions(StateFolder(tmp_path))
    assert refusal(decisions, make_plan()) == "awaiting-approval"
    path = tmp_path / "decisions" / "waiting" / make_plan().digest().hex()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=path.name):
        decisions.proposals()


def test_only_the_sites_own_user_can_read_its_decisions(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    refusal(Decisions(StateFolder(tmp_path)), make_plan())
    for folder in (tmp_path / "decisions", tmp_path / "decisions" / "waiting"):
        assert folder.stat().st_mode & 0o077 == 0
