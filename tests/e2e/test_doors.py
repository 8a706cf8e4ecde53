"""Each program starts in an interpreter that has imported nothing before.

Other tests start them from `support.warm_python`, which has.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from umbel_common.errors import ConfigError, UnreachableError

PROGRAMS = {
    "umbel_client.relay": ("nowhere.toml", ConfigError),
    "umbel_client.trainer_process": ("nowhere.toml", ConfigError),
    "umbel_server.port_process": ("nowhere.toml", ConfigError),
    "umbel_server.rounds_process": ("nowhere.toml", ConfigError),
    "umbel_host.probe": ("unix:nowhere.sock", UnreachableError),
}


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_process_starts_and_says_what_it_lacks(tmp_path: Path, module: str) -> None:
    argument, kind = PROGRAMS[module]
    done = subprocess.run(
        [sys.executable, "-m", module, argument],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == kind.exit_code, done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["umbel-client", "umbel-server", "umbel-simulate"])
def test_a_command_starts(name: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name(name), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
