"""`umbel-client approve`: what a person sees, and what a yes may write into a policy."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from umbel_client.cli import plans
from umbel_client.cli.command import app
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
def approve(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Says yes to everything that is asked about a plan with these labels."""
    monkeypatch.setattr(plans, "confirm", lambda *_, **__: None)

    def give(labels: tuple[str, ...], policy: str, *, epsilon: float = 1.0) -> Result:
        privacy = LocalPrivacy(epsilon=epsilon, delta=1e-5, clip_norm=1.0)
        plan = make_plan(task=Classification(labels=labels), privacy=privacy)
        config = tmp_path / "client.toml"
        config.write_text(CLIENT_TOML.format(model=plan.model.digest.hex(), policy=policy))
        (tmp_path / "state").mkdir()
        decisions = Decisions(load_config(config).state_folder)
        with pytest.raises(PolicyRefusal, match="waits for the approval"):
            decisions.require_approval(plan, sign(Identity(b"\x01" * 32), plan))
        command = ["approve", plan.job, "--config", str(config)]
        return CliRunner().invoke(app, command, catch_exceptions=False)

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
