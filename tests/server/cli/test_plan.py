"""`umbel-server plan`: what is signed has been tried, or is signed unchecked in so many words."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.enrolling import Enrolling

import umbel_server.cli.plan
from umbel_common.errors import ConfigError, PlanError, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import is_not_tried, plan_from_json, plan_to_json
from umbel_host.processes.supervisor import belong_to_parent

MakePlan = Callable[..., TrainingPlan]


@pytest.fixture
def operator(tmp_path: Path) -> Enrolling:
    return Enrolling(tmp_path)


def test_a_plan_that_was_not_tried_is_signed_only_unchecked(
    operator: Enrolling, make_plan: MakePlan
) -> None:
    plan = make_plan(federation="clinics")
    untried = operator.operator / "plan.json"
    untried.write_text(plan_to_json(plan, not_tried=True))
    words = ("plan", "sign", "plan.json", "--out", "signed.json")
    with pytest.raises(PlanError, match="plan try") as caught:
        operator.server(*words)
    assert caught.value.field == "not_tried"
    operator.server(*words, "--unchecked")
    text = (operator.operator / "signed.json").read_text()
    signed, signature = plan_from_json(text, "signed.json")
    assert (signed, signature is not None, is_not_tried(text)) == (plan, True, False)
    # The mark is a note beside the plan, and no part of what is signed.
    untried.write_text(plan_to_json(plan))
    operator.server("plan", "sign", "plan.json", "--out", "other.json")
    assert (operator.operator / "other.json").read_text() == text


@pytest.mark.parametrize("python", [None, "/srv/client/bin/python"])
def test_the_python_that_evaluates_makes_plans_too(
    operator: Enrolling,
    make_plan: MakePlan,
    monkeypatch: pytest.MonkeyPatch,
    python: str | None,
) -> None:
    used = []

    def run(command: list[str], **how: object) -> SimpleNamespace:
        assert how["preexec_fn"] is belong_to_parent
        used.append((command[0], command[3:]))
        return SimpleNamespace(returncode=0, stdout=plan_to_json(make_plan(), not_tried=True))

    monkeypatch.setattr(umbel_server.cli.plan, "subprocess", SimpleNamespace(run=run, PIPE=-1))
    config = operator.operator / "server.toml"
    if python is not None:
        evaluation = f'[evaluation]\nholdout = "h.jsonl"\nmodel = "model"\npython = "{python}"\n'
        config.write_text(config.read_text() + evaluation)
    shown = operator.server("plan", "new", "draft.toml", "--out", "plan.json")
    assert used == [(python or sys.executable, ["umbel_client.drafting", "draft.toml"])]
    assert "not tried: " in shown
    assert is_not_tried((operator.operator / "plan.json").read_text())


def test_a_configuration_that_was_named_must_be_there(operator: Enrolling) -> None:
    with pytest.raises(ConfigError) as caught:
        operator.server("plan", "new", "draft.toml", "--out", "plan.json", "--config", "typo.toml")
    assert str(caught.value.file) == "typo.toml"


def test_nothing_is_made_where_there_is_no_place_for_it(operator: Enrolling) -> None:
    for out in ("server.toml", "/proc/plan.json", "x" * 300, "nowhere/plan.json"):
        with pytest.raises(StorageError):
            operator.server("plan", "new", "draft.toml", "--out", out)


@pytest.mark.parametrize("words", [("plan", "show"), ("job", "start")])
def test_a_plan_that_is_missing_is_a_plans_error(operator: Enrolling, words: tuple[str]) -> None:
    with pytest.raises(PlanError, match="a file is missing"):
        operator.server(*words, "nowhere.json")
