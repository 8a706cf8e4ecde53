"""What an approval may write into a policy: only what is not there, and nothing else moves."""

from collections.abc import Callable
from pathlib import Path

import pytest

from umbel_client.site.config import load_config
from umbel_client.site.policy import judge_plan
from umbel_client.site.policy_file import PolicyFile
from umbel_common.errors import ConfigError, PolicyRefusal, StorageError
from umbel_common.plans.plan import CausalLm, Classification, TrainingPlan

MakePlan = Callable[..., TrainingPlan]
LABELS = ("Grippe", 'so "genannt"', "Müdigkeit # 1")
HEAD = """\
# Ours, by the security officer.
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"
[data]
path = "data.jsonl"
public_size = 100
[model]
path = "model"
"""


@pytest.fixture
def plan(make_plan: MakePlan) -> TrainingPlan:
    return make_plan(task=Classification(labels=LABELS, max_tokens=64))


def site(folder: Path, policy: str) -> Path:
    config = folder / "client.toml"
    config.write_text(f"{HEAD}\n{policy}")
    return config


@pytest.mark.parametrize(
    "policy",
    [
        "[policy]\n{own}\nlabels = []  # none yet\n# as agreed\nmax_epsilon = 8.0\n",
        "[policy]\n{own}\nmax_epsilon = 8.0\n",
        "policy = {{ {inline}, max_epsilon = 8.0 }}\n",
    ],
)
def test_a_policy_takes_what_it_lacks_and_keeps_all_else(
    tmp_path: Path, plan: TrainingPlan, policy: str
) -> None:
    own = (f'models = ["{plan.model.digest.hex()}"]', "minimum_cohort = 2")
    table = policy.format(own="\n".join(own), inline=", ".join(own))
    config = tmp_path / "client.toml"
    config.write_text(f"{table}{HEAD}" if table.startswith("policy") else f"{HEAD}\n{table}")
    former, before = config.read_text(), load_config(config)
    with pytest.raises(PolicyRefusal, match="labels"):
        judge_plan(before.policy, plan)
    policy_file = PolicyFile(config)
    assert policy_file.missing(plan) == {"labels": LABELS, "max_tokens": (64,)}
    policy_file.add(policy_file.missing(plan))
    after = load_config(config)
    judge_plan(after.policy, plan)
    assert (after.policy.labels, after.policy.max_tokens) == (LABELS, (64,))
    assert (after.data, after.model, after.policy.models, after.policy.max_epsilon) == (
        before.data,
        before.model,
        before.policy.models,
        8.0,
    )
    for line in former.splitlines():
        assert "labels" in line or line.startswith("policy") or line in config.read_text()
    assert PolicyFile(config).missing(plan) == {}


def test_what_a_policy_says_is_never_offered_or_changed(tmp_path: Path, plan: TrainingPlan) -> None:
    config = site(tmp_path, '[policy]\nlabels = ["a", "b"]\nmax_tokens = [32]\n')
    policy, text = PolicyFile(config), config.read_text()
    assert policy.missing(plan) == {}
    for values in ({"labels": LABELS}, {"max_tokens": (64,)}):
        with pytest.raises(ConfigError, match="already"):
            policy.add(values)  # type: ignore[arg-type]  # one kind of value each
    assert config.read_text() == text


def test_an_empty_list_of_lengths_was_meant(tmp_path: Path, plan: TrainingPlan) -> None:
    config = site(tmp_path, '[policy]\nlabels = ["a", "b"]\nmax_tokens = []\n')
    assert PolicyFile(config).missing(plan) == {}


def test_a_language_model_brings_length_and_template(tmp_path: Path, make_plan: MakePlan) -> None:
    config = site(tmp_path, "[policy]\n")
    plan = make_plan(task=CausalLm(max_tokens=96, template="plain"))
    assert PolicyFile(config).missing(plan) == {"max_tokens": (96,), "templates": ("plain",)}


def test_a_policy_in_a_file_of_its_own_is_the_one_that_is_written(
    tmp_path: Path, plan: TrainingPlan
) -> None:
    config, own = tmp_path / "client.toml", tmp_path / "policy.toml"
    own.write_text("# The officer's.\nmax_epsilon = 1.0\n")
    own.chmod(0o600)
    config.write_text(f'policy = "policy.toml"\n{HEAD}')
    before = config.read_text()
    policy = PolicyFile(config)
    policy.add(policy.missing(plan))
    assert config.read_text() == before
    assert own.read_text().startswith("# The officer's.\nmax_epsilon = 1.0\n")
    assert own.stat().st_mode & 0o777 == 0o600
    assert load_config(config).policy.labels == LABELS


def test_a_policy_that_cannot_be_written_or_is_not_there(
    tmp_path: Path, plan: TrainingPlan
) -> None:
    with pytest.raises(ConfigError, match="no policy"):
        PolicyFile(site(tmp_path, ""))
    with pytest.raises(ConfigError, match="not TOML"):
        PolicyFile(site(tmp_path, "[policy"))
    policy = PolicyFile(site(tmp_path, "[policy]\n"))
    policy.path = Path("/proc/client.toml")
    with pytest.raises(StorageError, match="cannot be written"):
        policy.add(policy.missing(plan))


@pytest.mark.parametrize(
    "line",
    ["max_epsilon = 1.0\n", 'labels = ["one", "other"]\n', "# Never labels.\n"],
)
def test_what_others_wrote_while_a_person_was_asked_is_kept(
    tmp_path: Path, plan: TrainingPlan, line: str
) -> None:
    config = site(tmp_path, "[policy]\n")
    policy = PolicyFile(config)
    values = policy.missing(plan)
    text = config.read_text() + line
    config.write_text(text)
    with pytest.raises(StorageError, match="stays as it is") as caught:
        policy.add(values)
    assert caught.value.found == "it was changed while you were asked"
    assert config.read_text() == text


def test_a_policy_is_written_in_its_own_place_for_its_own_user(
    tmp_path: Path, plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, managed = site(tmp_path, "[policy]\n"), tmp_path / "managed.toml"
    policy = PolicyFile(config)
    text = config.read_text()
    monkeypatch.setattr("os.geteuid", lambda: config.stat().st_uid + 1)
    with pytest.raises(StorageError, match="stays as it is"):
        policy.add(policy.missing(plan))
    monkeypatch.undo()
    config.rename(managed)
    config.symlink_to(managed)
    policy = PolicyFile(config)
    with pytest.raises(StorageError, match="stays as it is"):
        policy.add(policy.missing(plan))
    assert config.is_symlink()
    assert managed.read_text() == text
