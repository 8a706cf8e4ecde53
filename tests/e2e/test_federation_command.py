"""`umbel-simulate federation` runs a whole deployment on one machine by its commands."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.conftest import TinyScenario

from umbel_common.errors import JobFailed
from umbel_simulations.backends import processes


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="umbel-") as short:
        yield Path(short) / "federation"


@pytest.mark.soak
def test_it_ends_with_an_adapter_that_every_site_has(tiny: TinyScenario, folder: Path) -> None:
    done = tiny.simulate("federation", tiny.path, "--folder", folder)
    assert done.returncode == 0, (done.stdout, done.stderr)
    adapters = [folder / "adapter", *folder.glob("hospital-*/state/adapters/tiny")]
    assert len(adapters) == 4
    weights = {(path / "adapter_model.safetensors").read_bytes() for path in adapters}
    assert len(weights) == 1
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2
    for command in ("umbel-server init", "umbel-client join", "umbel-client approve", "finish"):
        assert command in done.stdout
    assert not _processes_in(folder)


def _processes_in(folder: Path) -> list[str]:
    """Command lines of processes that still work in a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line:
            lines.append(line)
    return lines


def test_a_folder_that_holds_something_is_left_alone(tiny: TinyScenario, folder: Path) -> None:
    folder.mkdir()
    (folder / "precious").touch()
    done = tiny.simulate("federation", tiny.path, "--folder", folder)
    assert done.returncode == 51
    assert [path.name for path in folder.iterdir()] == ["precious"]


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_a_job_that_failed_before_a_plan_was_offered_says_why(tmp_path: Path, state: str) -> None:
    """As where the operator's server cannot score the initial adapter."""

    class Told(processes.Party):
        def run(self, command: str, *arguments: str, shown: bool = True) -> str:
            if command == "umbel-client":
                return "[]"
            return json.dumps({"state": state, "detail": "row 1 is too long"})

    party = Told(tmp_path, print)
    with pytest.raises(JobFailed, match="row 1 is too long"):
        processes._wait_for_plan(party, party, "tiny")
