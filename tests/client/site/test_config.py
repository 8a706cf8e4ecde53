"""client.toml: read exactly, refused with what to do."""

from pathlib import Path

import pytest

from umbel_client.site.config import (
    ClientConfig,
    DataConfig,
    ModelConfig,
    load_config,
    load_local_config,
)
from umbel_client.site.joining import set_up_alone
from umbel_client.site.policy import Policy
from umbel_common.errors import ConfigError, StorageError

TEXT = """
site = "north"
state = "state"
identity = "keys/identity.pem"
roster = "/etc/umbel/roster.json"

[data]
path = "notes.jsonl"
public_size = 5000

[model]
path = "models/minilm"

[policy]
models = ["{digest}"]
labels = ["benign", "malignant"]
max_epsilon = 8
""".format(digest="ab" * 32)


def load(folder: Path, text: str) -> ClientConfig:
    path = folder / "client.toml"
    path.write_text(text)
    return load_config(path)


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT)
    assert config.state == str(tmp_path / "state")
    assert config.identity == str(tmp_path / "keys/identity.pem")
    assert config.roster == "/etc/umbel/roster.json"
    assert config.data.path == str(tmp_path / "notes.jsonl")
    assert config.model.path == str(tmp_path / "models/minilm")


def test_paths_do_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "client.toml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    relative = load_config(Path("client.toml"))
    monkeypatch.chdir("/")
    assert relative == load_config(tmp_path / "client.toml")
    assert relative.state == str(tmp_path / "state")


def test_what_is_not_given_has_the_strict_default(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT)
    wanted = Policy(models=("ab" * 32,), labels=("benign", "malignant"), max_epsilon=8.0)
    assert config.policy == wanted
    assert (config.data.text_column, config.data.label_column) == ("text", "label")
    assert not config.policy.allow_without_privacy
    assert not config.policy.examples_as_weights
    assert (config.policy.minimum_cohort, config.policy.colluding_sites) == (3, 1)
    assert config.threads == 1
    assert config.physical_batch_size == "auto"


def test_what_is_given_stays_as_it_is(tmp_path: Path) -> None:
    columns = 'public_size = 5000\ntext_column = "note"\nlabel_column = "finding"\n'
    text = TEXT.replace("public_size = 5000\n", columns).replace(
        'path = "models/minilm"\n', 'path = "models/minilm"\nprecision = "bfloat16"\n'
    )
    config = load(tmp_path, text)
    assert config.data == DataConfig(str(tmp_path / "notes.jsonl"), 5000, "note", "finding")
    assert config.model == ModelConfig(str(tmp_path / "models/minilm"), "bfloat16")


def test_the_device_is_one_that_the_sites_people_name(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT).model.device == "auto"
    text = TEXT.replace('path = "models/minilm"\n', 'path = "models/minilm"\ndevice = {}\n')
    assert load(tmp_path, text.replace("{}", '"cuda:1"')).model.device == "cuda:1"
    several = load(tmp_path, text.replace("{}", '["cuda:0", "cuda:1"]'))
    assert several.model.device == ("cuda:0", "cuda:1")
    for given in ('"gpu"', "[]", '["cuda:0", "gpu"]', '["cuda:0", "cpu"]', "1", '"cuda:0,cuda:1"'):
        with pytest.raises(ConfigError) as error:
            load(tmp_path, text.replace("{}", given))
        assert (error.value.file, error.value.field) == (tmp_path / "client.toml", "model.device")


def test_only_several_devices_divide_records(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT).model.split == "layers"
    text = TEXT.replace(
        'path = "models/minilm"\n', 'path = "models/minilm"\nsplit = "records"\ndevice = {}\n'
    )
    both = load(tmp_path, text.replace("{}", '["cuda:0", "cuda:1"]'))
    assert both.model.split == "records"
    assert load(tmp_path, text.replace("{}", '["cuda:0"]')).model.split == "records"
    for given in ('"auto"', '"cuda:1"', '"cpu"'):
        with pytest.raises(ConfigError, match="only several devices") as error:
            load(tmp_path, text.replace("{}", given))
        assert (error.value.file, error.value.field) == (tmp_path / "client.toml", "model.split")
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text.replace("device = {}", "").replace('"records"', '"tokens"'))
    assert error.value.field == "model.split"


@pytest.mark.parametrize(("given", "found"), [("24", 24), ('"auto"', "auto")])
def test_a_physical_batch_size_is_a_number_or_found_out(
    tmp_path: Path, given: str, found: object
) -> None:
    config = load(tmp_path, f"physical_batch_size = {given}\n{TEXT}")
    assert config.physical_batch_size == found


@pytest.mark.parametrize("given", ["0", "-1", "65537", '"all"', "1.5"])
def test_another_physical_batch_size_is_refused(tmp_path: Path, given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"physical_batch_size = {given}\n{TEXT}")
    assert caught.value.field == "physical_batch_size"


def test_a_policy_without_labels_has_none(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT.replace('labels = ["benign", "malignant"]\n', ""))
    assert config.policy.labels == ()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "none.toml")
    assert caught.value.file == tmp_path / "none.toml"
    assert "No such file" in caught.value.diagnostics()


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_bytes(b"site = \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('site = "north"', 'site = "North Hospital"', "site"),
        ('site = "north"', "", "site"),
        ("max_epsilon = 8", "max_epsilon = -1", "policy.max_epsilon"),
        ("max_epsilon = 8", "max_epsilon = nan", "policy.max_epsilon"),
        ("max_epsilon = 8", "minimum_cohort = 1", "policy.minimum_cohort"),
        ("ab" * 32, "minilm", "policy.models[0]"),
        ("[data]", "[dataset]", "dataset"),
        ("public_size = 5000", "", "data.public_size"),
        ("public_size = 5000", "public_size = 0", "data.public_size"),
        ("public_size = 5000", "public_size = 1_000_000_001", "data.public_size"),
        ("public_size = 5000", "public_size = 5000.5", "data.public_size"),
        ('labels = ["benign", "malignant"]', "labels = [0, 1]", "policy.labels[0]"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    tmp_path: Path, old: str, new: str, field: str
) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, TEXT.replace(old, new))
    assert caught.value.field == field


def with_policy_file(folder: Path, policy: str) -> ClientConfig:
    head, _, table = TEXT.partition("[policy]")
    (folder / "policy.toml").write_text(policy.replace("TABLE", table))
    return load(folder, 'policy = "policy.toml"\n' + head)


def test_a_policy_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert with_policy_file(tmp_path, "TABLE").policy == load(tmp_path / "one", TEXT).policy


def test_what_is_wrong_in_a_policys_file_is_said_of_that_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.toml") as caught:
        with_policy_file(tmp_path, "max_epsilom = 8")
    assert caught.value.field == "max_epsilom"
    assert "max_epsilon" in caught.value.diagnostics()
    (tmp_path / "policy.toml").unlink()
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        load_config(tmp_path / "client.toml")


@pytest.mark.parametrize("text", [TEXT, 'policy = "policy.toml"\n' + TEXT])
def test_two_policies_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_text("max_epsilon = 100\n")
    with pytest.raises(ConfigError, match=r"two policies|name each field once"):
        load(tmp_path, text)


def test_a_policys_file_does_not_hide_that_the_rest_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, 'policy = "policy.toml"\nsite = "north"\n')
    assert caught.value.field == (
        "state, identity, roster, data.path, data.public_size, model.path"
    )


ALONE = '[data]\npath = "d.jsonl"\npublic_size = 8\n[model]\npath = "m"\n'


def test_work_alone_needs_data_and_model_only(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text(ALONE)
    found = load_local_config(path)
    assert (found.data.path, found.model.path) == (str(tmp_path / "d.jsonl"), str(tmp_path / "m"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.field == "site, state, identity, roster, policy"
    path.write_text("")
    with pytest.raises(ConfigError) as caught:
        load_local_config(path)
    assert caught.value.field == "data.path, data.public_size, model.path"


def test_work_alone_takes_what_a_site_has(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text('policy = "policy.toml"\nthreads = 3\n' + ALONE)
    (tmp_path / "policy.toml").write_text('labels = ["a"]\n')
    found = load_local_config(path)
    assert (found.policy.labels, found.threads) == (("a",), 3)
    path.write_text(ALONE + "[policy]\n")
    with pytest.raises(ConfigError, match="two policies"):
        load_local_config(path)


def test_init_alone_writes_such_a_file(tmp_path: Path) -> None:
    path = set_up_alone(tmp_path / "new")
    assert load_local_config(path).data.public_size == 1000
    with pytest.raises(StorageError):
        set_up_alone(tmp_path / "new")
