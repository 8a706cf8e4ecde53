"""`umbel-client approve`: what a person sees, and what a yes may write into a policy."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from support.shared_noise_plans import shared_noise_plan
from typer.testing import CliRunner

from umbel_client.cli import plans
from umbel_client.cli.command import app
from umbel_client.privacy.attempt_cost import attempt_cost
from umbel_client.site.config import load_config
from umbel_client.site.decisions import Decisions
from umbel_common.errors import PolicyRefusal
from umbel_common.plans.plan import Classification, LocalPrivacy, TrainingPlan
from umbel_common.trust.identity import Identity, sign

MakePlan = Callable[..., TrainingPlan]
CLIENT_TOML = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"
[data]
path = "notes.jsonl"
public_size = 1000
[model]
path = "model"
[policy]
models = ["{model}"]
minimum_cohort = 2
{policy}
"""


@pytest.fixture
def approve_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Says yes to everything that is asked about a plan."""
    monkeypatch.setattr(plans, "confirm", lambda *_, **__: None)

    def give(plan: TrainingPlan, policy: str) -> Result:
        config = tmp_path / "client.toml"
        config.write_text(CLIENT_TOML.format(model=plan.model.digest.hex(), policy=policy))
        (tmp_path / "state").mkdir()
        decisions = Decisions(load_config(config).state_folder)
        with pytest.raises(PolicyRefusal, match="waits for the approval"):
            decisions.require_approval(plan, sign(Identity(b"\x01" * 32), plan))
        command = ["approve", plan.job, "--config", str(config)]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    return give


@pytest.fixture
def approve(approve_plan: Callable[..., Result], make_plan: MakePlan) -> Callable[..., Result]:
    """Says yes to everything that is asked about a plan with these labels."""

    def give(labels: tuple[str, ...], policy: str, *, epsilon: float = 1.0) -> Result:
        privacy = LocalPrivacy(epsilon=epsilon, delta=1e-5, clip_norm=1.0)
        plan = make_plan(task=Classification(labels=labels), privacy=privacy)
        return approve_plan(plan, policy)

    return give


def test_a_yes_writes_the_labels_that_were_shown(
    approve: Callable[..., Result], tmp_path: Path
) -> None:
    done = approve(("flu", "cold"), "labels = []")
    assert done.exit_code == 0
    assert "labels, 2 in all:\n  flu\n  cold\n" in done.stdout
    assert load_config(tmp_path / "client.toml").policy.labels == ("flu", "cold")


@pytest.mark.parametrize(
    ("policy", "epsilon"),
    [('approval = "none"\nlabels = []', 1.0), ("max_rank = 1\nlabels = []", 1.0), ("", 3.5)],
    ids=["nobody is asked", "another rule refuses", "too large an epsilon"],
)
def test_nothing_is_written_that_would_let_nothing_run_or_ask_nobody(
    approve: Callable[..., Result], tmp_path: Path, policy: str, epsilon: float
) -> None:
    approve(("flu", "cold"), policy, epsilon=epsilon)
    assert load_config(tmp_path / "client.toml").policy.labels == ()
    assert "max_tokens" not in (tmp_path / "client.toml").read_text()


def test_a_label_is_one_line_and_labels_that_look_alike_are_named(
    approve: Callable[..., Result],
) -> None:
    done = approve(("flu\n  cold", "Flu", "flu", "\u202ethgir"), "labels = []")
    assert "labels, 4 in all:\n  flu\\n  cold\n  Flu\n  flu\n  \\u202ethgir\n" in done.stdout
    assert "LOOK ALIKE: 'Flu' and 'flu' differ only in upper and lower case" in done.stdout


SHARING = 'labels = ["a", "b", "c"]\nmax_shared_epsilon = 1.0\ntotal_shared_epsilon = 1.5\n'


def test_a_plan_that_shares_noise_is_shown_with_both_figures(
    approve_plan: Callable[..., Result], make_plan: MakePlan
) -> None:
    plan = shared_noise_plan(make_plan())
    cost = attempt_cost(plan)
    assert cost is not None
    everybody, shared = cost.epsilons(1e-5)
    shown = " ".join(approve_plan(plan, SHARING).stdout.split())
    assert (
        "epsilon 1 at delta 1e-05 against readers of the sums, while 3 sites in each keep their"
        f" noise secret; epsilon {everybody:.4g} against everybody" in shown
    )
    assert "at most 100, each with a new batch at sampling rate 0.0927" in shown
    assert f"after it {everybody:.4g} of 3, at delta 1e-05, against everybody" in shown
    assert f"after it {shared:.4g} of 1.5, at delta 1e-05, against readers of the sums" in shown
    assert "refuses" not in shown


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ('labels = ["a", "b", "c"]', "refuses it all the same: distributed-not-allowed"),
        (f"{SHARING}max_epsilon = 1.9", "refuses it all the same: epsilon-too-large"),
        (SHARING.replace("1.5", "0.9"), "of 0.9, at delta 1e-05: IT IS REFUSED, against readers"),
        (f"{SHARING}total_epsilon = 1.9", "of 1.9, at delta 1e-05: IT IS REFUSED, against every"),
    ],
)
def test_a_plan_that_costs_too_much_in_either_total_is_said_to_be_refused(
    approve_plan: Callable[..., Result], make_plan: MakePlan, policy: str, told: str
) -> None:
    assert told in " ".join(approve_plan(shared_noise_plan(make_plan()), policy).stdout.split())
